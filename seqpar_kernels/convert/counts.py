"""Integers that know where they come from, during the first forward of a converted model.

``view(..., self.n_head, -1)`` computes something else where ``n_head`` still counts the heads of all ranks; nothing but
where the number comes from tells. So the integer attributes of modules around colwise layers, and the sizes of marked
tensors, are replaced by integers that carry a note through arithmetic: how they scale with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_CONFIGS = ("config", "cfg", "args", "hparams", "params")


class Count(int):
    """An int with a note.

    ``features``: the power of 1/ranks by which it scales (1: this rank's heads or features); ``rows``: whether it comes
    from the length of a shard; ``origin``: the attribute it was read from; ``session``: the check that made it.
    """

    features: int
    rows: bool
    origin: str
    session: Any

    @staticmethod
    def of(value: int, session: Any, features: int = 0, rows: bool = False, origin: str = "") -> Count:
        new = Count(value)
        new.features, new.rows, new.origin, new.session = features, rows, origin, session
        return new

    def _with(self, value: Any, other: Any, features: int) -> Any:
        if type(value) is not int:
            return value  # NotImplemented
        rows = self.rows or (isinstance(other, Count) and other.rows)
        origin = self.origin or (other.origin if isinstance(other, Count) else "")
        return Count.of(value, self.session, features, rows, origin)

    def __mul__(self, other: Any) -> Any:
        return self._with(int.__mul__(self, other), other, self.features + _power(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._with(int.__floordiv__(self, other), other, self.features - _power(other))

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(int.__rfloordiv__(self, other), other, _power(other) - self.features)

    def __add__(self, other: Any) -> Any:
        return self._with(int.__add__(self, other), other, max(self.features, _power(other), key=abs))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._with(int.__sub__(self, other), other, max(self.features, _power(other), key=abs))

    def __rsub__(self, other: Any) -> Any:
        return self._with(int.__rsub__(self, other), other, max(self.features, _power(other), key=abs))

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __truediv__(self, other: Any) -> Any:
        return self._number(int.__truediv__(self, other))

    def __rtruediv__(self, other: Any) -> Any:
        return self._number(int.__rtruediv__(self, other))

    def __pow__(self, other: Any, *modulus: Any) -> Any:
        return self._number(int.__pow__(self, other, *modulus))

    def __float__(self) -> float:
        if self.rows:
            self.session.number_of_rows()
        return float(int(self))

    def _number(self, value: Any) -> Any:
        return LocalNumber(value) if self.rows and isinstance(value, float) else value


class LocalNumber(float):
    """A float made from the length of a shard."""

    def _with(self, value: Any) -> Any:
        return LocalNumber(value) if isinstance(value, float) else value

    def __mul__(self, other: Any) -> Any:
        return self._with(float.__mul__(self, other))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return self._with(float.__add__(self, other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._with(float.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return self._with(float.__rsub__(self, other))

    def __truediv__(self, other: Any) -> Any:
        return self._with(float.__truediv__(self, other))

    def __rtruediv__(self, other: Any) -> Any:
        return self._with(float.__rtruediv__(self, other))

    def __pow__(self, other: Any, *modulus: Any) -> Any:
        return self._with(float.__pow__(self, other))

    def __float__(self) -> float:
        return float.__add__(self, 0.0)

    def __reduce__(self) -> Any:
        return float, (float(self),)


def _power(value: Any) -> int:
    return value.features if isinstance(value, Count) else 0


def known(value: Any, session: Any) -> Count | None:
    """``value`` as a Count of this check; a cache may hold those of others."""
    return value if isinstance(value, Count) and value.session is session else None


def numbers_in(*values: Any) -> list[int]:
    """All integers of the arguments of a call, those of slices too."""
    found: list[int] = []
    for leaf in tree_leaves(values):
        inner = (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)
        found += [n for n in inner if isinstance(n, int) and not isinstance(n, bool)]
    return found


class Counts:
    """Lends the integer attributes of modules their notes."""

    def __init__(self, model: nn.Module, session: Any, divided: Iterable[tuple[str, str]], leaves: Iterable[str]):
        self._model, self._session = model, session
        self._divided = frozenset(divided)  # (module, attribute), "config.name" for the config's
        self._leaves = tuple(leaves)  # modules that the plan handles: nothing of theirs is read
        self._lent: list[tuple[dict[str, Any], str, Count]] = []
        self.values: dict[str, dict[str, tuple[int, bool]]] = {}  # module -> attribute -> (value, whether divided)

    def lend(self) -> None:
        if any(module._compiled_call_impl is not None for module in self._model.modules()):
            return  # what torch.compile traces shall be plain
        seen: set[int] = set()
        for name, module in self._model.named_modules():
            inside = any(name == leaf or name.startswith(leaf + ".") for leaf in self._leaves)
            if not inside and not type(module).__module__.startswith(("torch.", "seqpar_kernels.")):
                self._lend(name, "", vars(module), seen)
                for attribute in _CONFIGS:
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
                lent = Count.of(value, self._session, int(divided), origin=origin)
                attributes[attribute] = lent
                self._lent.append((attributes, attribute, lent))
        seen.add(id(attributes))

    def take_back(self) -> None:
        for attributes, attribute, lent in self._lent:
            if attributes.get(attribute) is lent:
                attributes[attribute] = int(lent)
        self._lent.clear()

    def around(self, stack: list[str]) -> dict[str, tuple[int, bool]]:
        """attribute -> (value, whether divided) of the modules being run, the innermost last."""
        found: dict[str, tuple[int, bool]] = {}
        for name in ("", *stack):
            found.update(self.values.get(name, {}))
        return found
