"""Integers that know where they come from, during the first forward of a converted model.

``view(..., self.n_head, -1)`` is wrong where ``n_head`` still counts the heads of all ranks, and the shape of the
result does not show it. The origin of the number does. So the integer attributes of modules around colwise layers, and
the sizes of marked tensors, become integers that carry a note through arithmetic: how they scale with the number of
ranks.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .culprit import is_library

CONFIGS = ("config", "cfg", "args", "hparams", "params")


class _Compared:
    """A number of this rank. A comparison that has another result in the unsharded model is refused."""

    def _judge(self, op: Callable[[Any, Any], bool], other: Any, equality: bool = False) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        here, whole = _twice(op, self, other, False)
        counts = [count for number in (self, other) if (count := _count_of(number)) is not None]
        judged = not equality or any(count.rows for count in counts)
        if judged and here is not whole and not _library():
            counts[0].session.branches(counts)
        return here

    def __lt__(self, other: Any) -> Any:
        return self._judge(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._judge(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._judge(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._judge(operator.ge, other)

    def __eq__(self, other: Any) -> Any:  # heads are not judged: caches compare their sizes and keys like this
        return self._judge(operator.eq, other, True)

    def __ne__(self, other: Any) -> Any:
        return self._judge(operator.ne, other, True)


class Count(_Compared, int):
    """An int with a note.

    ``features``: the power of 1/ranks by which it scales (1: this rank's heads or features). ``rows``: whether it comes
    from the length of a shard. ``origin``: the attribute that held it. ``session``: the check that made it. ``whole``:
    its value in the unsharded model. ``unsure``: that value is unknown, and ``whole`` is the number itself.
    """

    features: int
    rows: bool
    origin: str
    session: Any
    whole: int
    unsure: bool = False

    @staticmethod
    def of(
        value: int, session: Any, features: int = 0, rows: bool = False, origin: str = "", whole: int | None = None
    ) -> Count:
        new = Count(value)
        new.features, new.rows, new.origin, new.session = features, rows, origin, session
        new.whole = int(value) if whole is None else int(whole)
        return new

    def _made(self, op: Callable[[Any, Any], Any], other: Any, features: int, swapped: bool = False) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        value, whole = _twice(op, self, other, swapped)
        if not isinstance(value, int) or isinstance(value, bool):
            return _local_number(value, whole, self, other)
        rows = self.rows or (isinstance(other, Count) and other.rows)
        origin = self.origin or (other.origin if isinstance(other, Count) else "")
        new = Count.of(value, self.session, features, rows, origin, whole)
        new.unsure = _unsure(self, other)
        return new

    def __mul__(self, other: Any) -> Any:
        return self._made(operator.mul, other, self.features + _power(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._made(operator.floordiv, other, self.features - _power(other))

    def __rfloordiv__(self, other: Any) -> Any:
        return self._made(operator.floordiv, other, _power(other) - self.features, True)

    def __add__(self, other: Any) -> Any:
        return self._made(operator.add, other, self._larger(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._made(operator.sub, other, self._larger(other))

    def __rsub__(self, other: Any) -> Any:
        return self._made(operator.sub, other, self._larger(other), True)

    def __mod__(self, other: Any) -> Any:
        return self._made(operator.mod, other, self._larger(other))

    def __rmod__(self, other: Any) -> Any:
        return self._made(operator.mod, other, self._larger(other), True)

    def __neg__(self) -> Any:
        return self._made(operator.mul, -1, self.features)

    def _larger(self, other: Any) -> int:
        return max(self.features, _power(other), key=abs)

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __truediv__(self, other: Any) -> Any:
        return self._made(operator.truediv, other, 0)

    def __rtruediv__(self, other: Any) -> Any:
        return self._made(operator.truediv, other, 0, True)

    def __pow__(self, other: Any, *modulus: Any) -> Any:
        if modulus:
            return int.__pow__(self, other, *modulus)
        return self._made(operator.pow, other, self.features * other if isinstance(other, int) else 0)

    def __rpow__(self, other: Any, *modulus: Any) -> Any:
        return self._made(operator.pow, other, self.features, True)

    def __float__(self) -> float:
        if int(self) != self.whole and not _library():
            self.session.number_of(self)
        return float(int(self))

    __hash__ = int.__hash__


class LocalNumber(_Compared, float):
    """A float made from a count of this rank; ``whole`` is its value in the unsharded model."""

    whole: float
    count: Count  # the Count it came from

    def _made(self, op: Callable[[Any, Any], Any], other: Any, swapped: bool = False) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return _local_number(*_twice(op, self, other, swapped), self, other)

    def __mul__(self, other: Any) -> Any:
        return self._made(operator.mul, other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return self._made(operator.add, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._made(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return self._made(operator.sub, other, True)

    def __truediv__(self, other: Any) -> Any:
        return self._made(operator.truediv, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._made(operator.truediv, other, True)

    def __pow__(self, other: Any, *modulus: Any) -> Any:
        return self._made(operator.pow, other)

    def __rpow__(self, other: Any, *modulus: Any) -> Any:
        return self._made(operator.pow, other, True)

    def __neg__(self) -> Any:
        return self._made(operator.mul, -1)

    def __float__(self) -> float:
        return float.__add__(self, 0.0)

    def __reduce__(self) -> Any:
        return float, (float(self),)

    __hash__ = float.__hash__


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Count) else float(value) if isinstance(value, LocalNumber) else value


def _twice(op: Callable[[Any, Any], Any], one: Any, other: Any, swapped: bool) -> tuple[Any, Any]:
    """(result for the numbers of this rank, result for those of the unsharded model) of ``op``."""
    here, whole = (_plain(one), _plain(other)), (one.whole, getattr(other, "whole", other))
    value = op(*(here[::-1] if swapped else here))
    if _unsure(one, other):
        return value, value
    try:
        return value, op(*(whole[::-1] if swapped else whole))
    except (ArithmeticError, ValueError):  # in the unsharded model only
        return value, math.nan


def _local_number(value: Any, whole: Any, one: Any, other: Any) -> Any:
    if not isinstance(value, float) or value == whole or not isinstance(whole, (int, float)):
        return value
    new = LocalNumber(value)
    new.whole = float(whole)
    new.count = next(count for number in (one, other) if (count := _count_of(number)) is not None)
    return new


def _count_of(number: Any) -> Count | None:
    return number if isinstance(number, Count) else number.count if isinstance(number, LocalNumber) else None


def _library() -> bool:
    """Whether torch, einops or this package computes with the number, and not the model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame is None or is_library(frame.f_code.co_filename)


def _unsure(*numbers: Any) -> bool:
    return any(isinstance(number, Count) and number.unsure for number in numbers)


def _power(value: Any) -> int:
    return value.features if isinstance(value, Count) else 0


def known(value: Any, session: Any) -> Count | None:
    """``value`` if it is a Count of this check; a cache may hold Counts of others."""
    return value if isinstance(value, Count) and value.session is session else None


def numbers_in(*values: Any) -> list[int]:
    """All integers in the arguments of a call, also those in slices."""
    found: list[int] = []
    for leaf in tree_leaves(values):
        inner = (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)
        found += [n for n in inner if isinstance(n, int) and not isinstance(n, bool)]
    return found


class Counts:
    """Replaces integer attributes of modules by Counts during the check."""

    def __init__(
        self,
        model: nn.Module,
        session: Any,
        divided: Mapping[tuple[str, str], bool],
        leaves: Iterable[str],
        ranks: int,
    ):
        self._model, self._session, self._ranks = model, session, ranks
        self._divided = divided  # (module, attribute or "config.name") -> whether it was divided
        self._leaves = tuple(leaves)  # modules that the plan handles; their attributes are not read
        self._lent: list[tuple[dict[str, Any], str, Count]] = []
        self.values: dict[str, dict[str, tuple[int, bool]]] = {}  # module -> attribute -> (value, whether divided)

    def lend(self) -> None:
        if any(module._compiled_call_impl is not None for module in self._model.modules()):
            return  # torch.compile must trace plain integers
        seen: set[int] = set()
        for name, module in self._model.named_modules():
            inside = any(name == leaf or name.startswith(leaf + ".") for leaf in self._leaves)
            if not inside and not type(module).__module__.startswith(("torch.", "seqpar_kernels.")):
                self._lend(name, "", vars(module), seen)
                for attribute in CONFIGS:
                    held = vars(module).get(attribute)
                    if hasattr(held, "__dict__") and not isinstance(held, (nn.Module, torch.Tensor, type)):
                        self._lend(name, attribute + ".", vars(held), seen)

    def _lend(self, name: str, prefix: str, attributes: dict[str, Any], seen: set[int]) -> None:
        noted = self.values.setdefault(name, {})
        for attribute, value in list(attributes.items()):
            if isinstance(value, bool) or not isinstance(value, int) or attribute.startswith("_"):
                continue
            divided = (name, prefix + attribute) in self._divided
            noted[prefix + attribute] = int(value), divided
            if id(attributes) not in seen and type(value) is int:
                origin = f"{name}.{prefix}{attribute}" if name else prefix + attribute
                sure = divided and self._divided[name, prefix + attribute]
                whole = value * self._ranks if sure else value
                lent = Count.of(value, self._session, int(divided), origin=origin, whole=whole)
                lent.unsure = divided and not sure
                attributes[attribute] = lent
                self._lent.append((attributes, attribute, lent))
        seen.add(id(attributes))

    def take_back(self) -> None:
        for attributes, attribute, lent in self._lent:
            if attributes.get(attribute) is lent:
                attributes[attribute] = int(lent)
        self._lent.clear()

    def around(self, stack: list[str]) -> dict[str, tuple[int, bool]]:
        """attribute -> (value, whether divided) of the modules that run, the innermost last."""
        found: dict[str, tuple[int, bool]] = {}
        for name in ("", *stack):
            found.update(self.values.get(name, {}))
        return found
