"""Inputs of linears that are not kept, but made again in the backward from what their producers keep anyway.

autograd keeps the input of an activation, both factors of a product and the rows that a norm reads. A linear that takes
the result keeps it once more. Where the linear may, it keeps the graph node of the producer instead and lets it repeat
its one pass. The backward of the linear runs before that of the producer, whose tensors are there until then; torch's
own check of versions watches them. A result that was changed in place on its way to the linear is kept. A factor of a
product that can be made again is not kept either: silu(gate) in silu(gate) * up. No matmul and no collective is
repeated. (Chen et al. 2016, arXiv 1604.06174.)

=====================  =======================================  ==================================================
producer               keeps                                    makes again
=====================  =======================================  ==================================================
norm                   z [..., S/t, ..., H], statistics         norm(z) * weight + bias
silu, gelu             x [..., S, ..., F/t]                     the activation of x
a * b                  a and b                                  a * b; a or b themselves where they can be made
a ** n                 a                                        a ** n
cast, view             nothing                                  cast or view of what can be made
=====================  =======================================  ==================================================

Results have the bits of the forward: the same kernel runs on the same values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, AUTO, MAX = range(3)  # how much is made again: nothing, what takes one pass, also what takes several
LEVELS = {"none": NONE, "auto": AUTO, "max": MAX}

_Make = Callable[[], Tensor]
#: (node, which of its results, the result or None where it is not at hand) -> how it is made again, or None.
Way = Callable[[Any, int, Tensor | None], "_Make | None"]


class Held:
    """What a pack hook of :func:`torch.autograd.graph.saved_tensors_hooks` may return for a tensor that it keeps.

    A tensor that can be made again is then let go, as it is without hooks.
    """

    def __init__(self, tensor: Tensor, given_up: Callable[[], None] | None = None):
        """``given_up`` is called when the tensor is let go."""
        self.tensor: Tensor | None = tensor
        self._made: Made | None = None
        self._given_up = given_up

    def give_up(self, made: Made) -> None:
        self.tensor, self._made = None, made
        if self._given_up is not None:
            self._given_up()

    def unpack(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        assert self._made is not None
        return self._made.shared()


class _Depth(threading.local):
    inside = 0  # how many tensors this thread is making


_depth = _Depth()


class Made:
    """A tensor that is made again when it is called for."""

    __slots__ = ("_make", "_waiting")

    def __init__(self, make: _Make):
        self._make = make
        self._waiting: Tensor | None = None

    def again(self) -> Tensor:
        _depth.inside += 1
        try:
            if not (torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()):
                return self._make()
            with torch.no_grad(), _without_autocast():
                return self._make()
        finally:
            _depth.inside -= 1

    def shared(self) -> Tensor:
        """The same for a tensor with two readers: a product that is being made, and then the product's own backward.

        The first reader leaves the tensor for the second.
        """
        found, inside = self._waiting, _depth.inside > 0
        if found is None:
            found = self.again()
        self._waiting = found if inside else None
        return found


class _without_autocast:  # a context, as torch's are
    """What the forward computed in a dtype is computed in it again, in whichever context the backward runs."""

    def __enter__(self) -> None:
        self._contexts = [torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda")]
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


class Input:
    """The input of a linear that is made again. ``source``: the name of the node that made it first."""

    __slots__ = ("_made", "_options", "_shape", "source")

    def __init__(self, made: Made, x: Tensor):
        self._made, self.source = made, source_of(x)
        self._shape = x.shape
        self._options: Any = {"dtype": x.dtype, "device": x.device}

    def __call__(self, read: bool) -> Tensor:
        """The tensor; where nothing will read it (the weight wants no gradient), memory of its shape."""
        return self._made.again() if read else torch.empty(self._shape, **self._options)


def made_again(x: Tensor) -> Input | None:
    """How ``x`` is made again; None where it has to be kept.

    Nothing is made from tensors with hooks of others: torch.utils.checkpoint gives them out once, and moves or repeats
    what it has chosen.
    """
    node = x.grad_fn
    if node is None or x._version or (way := way_of(type(node))) is None:
        return None
    try:
        make = way(node, x.output_nr, x)
    except RuntimeError:  # its backward has run already, and its tensors are gone
        return None
    return None if make is None else Input(Made(make), x)


class Kept(NamedTuple):
    """What the last forward kept of a module's input, and of which node it is the result ("": of no node)."""

    bytes: int
    source: str
    again: bool = False  # made again instead of kept
    asked: bool = True  # whether it was to be made again if possible

    def why(self) -> str:
        source = _NAMES.get(self.source, self.source.lstrip("_"))
        if self.again:
            return f"input made again from {source}"
        if not self.asked:
            return f"input kept: the result of {source}, and recompute='none'"
        return f"input kept: the result of {source}, which is not repeated in one pass"


def source_of(x: Tensor) -> str:
    """The name of the node that ``x`` is the result of, casts and views passed over; "" for a leaf."""
    node = x.grad_fn
    while node is not None and type(node).__name__ in _OF_OTHERS and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return "" if node is None else type(node).__name__.removesuffix("Backward0").removesuffix("Backward")


_NAMES = {
    "": "nothing that is differentiated",
    "Add": "a sum",
    "View": "a view (of what attention keeps too, for one)",
    "_DropoutAddNorm": "the norm",
    "_LinearNorm": "the norm",
    "SplitNorm": "the norm",
    "Mul": "a product",
    "Silu": "silu",
    "Gelu": "gelu",
    "Pow": "a power",
}


def kept_of(x: Tensor, out: Tensor, level: int, gathered: bool) -> Kept | None:
    """What a linear keeps of ``x`` for the backward of ``out``; None where there will be none.

    ``level``: NONE, AUTO or MAX. ``gathered``: all rows of x are kept.
    """
    node = out.grad_fn
    if node is None:
        return None
    made: Input | None = getattr(node, "made", None)
    if made is not None:
        return Kept(0, made.source, True)
    rows = (out if gathered else x).shape[:-1].numel()
    return Kept(rows * x.shape[-1] * x.element_size(), source_of(x), asked=level != NONE)


# --- ways ------------------------------------------------------------------------------------------------------------


def _silu(node: Any) -> Tensor:
    return F.silu(node._saved_self)


def _gelu(node: Any) -> Tensor:
    return F.gelu(node._saved_self, approximate=node._saved_approximate)


def _power(node: Any) -> Tensor:
    base: Tensor = node._saved_self
    return base.pow(node._saved_exponent)


def _product(node: Any) -> Tensor:
    product: Tensor = node._saved_self * node._saved_other
    return product


def readable(*saved: Any) -> bool:
    """Whether saved tensors may be read more than once: they have no hooks but this module's."""
    return all(kept.unpack_hook is None or _is_ours(kept) for kept in saved)


def _is_ours(kept: Any) -> bool:
    return isinstance(kept.data, (Held, Made))


def _from_input(make: Callable[[Any], Tensor], node: Any, number: int, out: Tensor | None) -> _Make | None:
    if not readable(node._raw_saved_self):
        return None
    _ = node._saved_self  # raises where it is gone
    return partial(make, node)


def _from_power(node: Any, number: int, out: Tensor | None) -> _Make | None:
    if not readable(node._raw_saved_self):
        return None
    _release(node._raw_saved_self, node._saved_self, node.next_functions[0])
    return partial(_power, node)


def _from_product(node: Any, number: int, out: Tensor | None) -> _Make | None:
    first, second = node.next_functions
    if first[0] is None or second[0] is None:
        return None  # it keeps one factor, or none
    if not readable(node._raw_saved_self, node._raw_saved_other):
        return None
    a, b = node._saved_self, node._saved_other
    _release(node._raw_saved_self, a, first)
    _release(node._raw_saved_other, b, second)
    return partial(_product, node)


def _from_cast(node: Any, number: int, out: Tensor | None) -> _Make | None:
    if out is None or (made := _of_input(node, None)) is None:
        return None
    options: Any = {"dtype": out.dtype, "device": out.device}
    return lambda: made().to(**options)


def _from_view(node: Any, number: int, out: Tensor | None) -> _Make | None:
    if out is None or not out.is_contiguous() or (made := _of_input(node, None)) is None:
        return None
    shape = out.shape
    return lambda: made().reshape(shape)


def _of_input(node: Any, out: Tensor | None) -> _Make | None:
    before, number = node.next_functions[0]
    way = None if before is None else way_of(type(before))
    return None if way is None else way(before, number, out)


def _release(kept: Any, tensor: Tensor, source: tuple[Any, int]) -> None:
    """Let a saved ``tensor`` go that came from ``source``, if that can make it again."""
    node, number = source
    if tensor._version:  # changed in place since then, where autograd does not look
        return
    if (way := way_of(type(node))) is None or type(node).__name__ in _OF_OTHERS:
        return
    if kept.unpack_hook is not None and isinstance(kept.data, Made):
        return
    if (make := way(node, number, None)) is not None:
        let_go(kept, make)


def require_memory(*vectors: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: ``fully_shard`` has given the memory of such a parameter back, and gathers it later.
    """
    if any(v is not None and v.numel() and not v.untyped_storage().size() for v in vectors):
        raise RuntimeError(
            "recompute: a norm's weight has no memory in the backward of the linear behind it: fully_shard was applied "
            "to the norm alone. Apply it to a module that holds both, or parallelize(..., recompute='none')"
        )


def let_go(kept: Any, make: _Make) -> None:
    """Let a saved tensor go that ``make`` makes again, unless it has hooks of others: whoever hooked it keeps it."""
    made = Made(make)
    if kept.unpack_hook is None:
        kept.register_hooks(lambda _: made, Made.shared)
    elif isinstance(kept.data, Held):
        kept.data.give_up(made)


#: Results of these are made from the results of others, whose shapes are not at hand for a factor.
_OF_OTHERS = frozenset({"ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0"})
_BY_NAME: dict[str, Way] = {
    "HardswishBackward0": partial(_from_input, lambda node: F.hardswish(node._saved_self)),
    "MishBackward0": partial(_from_input, lambda node: F.mish(node._saved_self)),
    "SiluBackward0": partial(_from_input, _silu),
    "GeluBackward0": partial(_from_input, _gelu),
    "PowBackward0": _from_power,
    "MulBackward0": _from_product,
    "ToCopyBackward0": _from_cast,
    "ViewBackward0": _from_view,
    "UnsafeViewBackward0": _from_view,
}


def way_of(kind: type) -> Way | None:
    function = getattr(kind, "_forward_cls", None)  # of an autograd.Function
    return _BY_NAME.get(kind.__name__) if function is None else getattr(function, "made_again", None)
