"""Refuses a loss computed from a shard, or from this rank's heads, that was kept beyond the forward.

Examples are a hidden state that a hook has stored, ``self.aux = x.pow(2).mean()`` in a block, and an attention entropy
that is returned beside the logits. Every rank has another value, and nothing sums the gradients. No function mode is
active where the loss is computed. So every marked tensor of the checked forward that is still referenced becomes a
:class:`Kept`. Tensors computed from it have that class too, and ``backward`` of one is refused. This package's gathers
(``gather_sequence``, say) return plain tensors again.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..nn.deferred_sum import DeferredSum
from ..ops.registry import in_backward
from .culprit import PACKAGE, user_frame, written
from .marks import OWNED, Kind, Local, Mixed, kind_of, mark_of

_NOTE = "_seqpar_kept"
#: Files whose frames act for their caller.
_BETWEEN = (os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, inspect.getfile(DeferredSum))
_BACKWARD = (Tensor.backward, torch.autograd.grad)


class _Made(NamedTuple):
    tensor: weakref.ref[Tensor]
    file: str
    line: int


class Kept(Tensor):
    """A tensor of one rank, outside of the forward that made it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kept = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Kept)]
        for leaf in kept:
            leaf.__class__ = Tensor  # type: ignore[assignment]
        if in_backward():  # a backward reads tensors that its forward has saved
            return func(*args, **kwargs)
        note = kept[0].__dict__[_NOTE]
        try:
            if func in _BACKWARD:
                raise RuntimeError(
                    f"{note} has entered a loss outside the model's forward. It differs between the ranks, and its "
                    "gradient would be a part of no sum. Put it together first (seqpar_kernels.gather_sequence for "
                    "rows, gather_tensor_parallel for heads or features), detach it, or compute it where the sequence "
                    "is whole"
                )
            out = func(*args, **kwargs)
        finally:
            for leaf in kept:
                leaf.__class__ = Kept
        if not _ours(sys._getframe(1)):
            for leaf in tree_leaves(out):
                if type(leaf) is Tensor and leaf.grad_fn is not None:
                    _keep(leaf, note)
        return out


class Collector:
    """Weak references to the tensors that a checked forward has marked, with the statements that made them."""

    def __init__(self, model: str):
        self._model = model
        self._made: list[_Made] = []

    def add(self, tensor: Tensor) -> None:
        if type(tensor) is DeferredSum or (type(tensor) is Tensor and tensor.grad_fn is not None):
            frame = user_frame()
            file, line = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("?", 0)
            self._made.append(_Made(weakref.ref(tensor), file, line))

    def close(self) -> None:
        """The forward has succeeded: make the tensors that are still referenced :class:`Kept`."""
        for made in self._made:
            tensor = made.tensor()
            if type(tensor) is DeferredSum:  # the norm behind has computed the sum
                tensor = tensor.computed
            if type(tensor) is Tensor and (what := _apart(tensor)) is not None:
                _keep(tensor, f"{self._model}: {what}, made by {written(made.file, made.line)},")
        self._made.clear()


def _apart(tensor: Tensor) -> str | None:
    """Describe ``tensor`` if it or its gradient differs between the ranks."""
    found = mark_of(tensor)
    if isinstance(found, (Mixed, Local)):
        return "a tensor made from this rank's rows, heads or features"
    if found is OWNED:
        return "a tensor made from parameters whose gradients are summed over the ranks"
    kind = kind_of(tensor)
    return kind.value if isinstance(kind, Kind) else None


def _keep(tensor: Tensor, note: str) -> None:
    tensor.__class__ = Kept
    setattr(tensor, _NOTE, note)


def _ours(frame: FrameType | None) -> bool:
    """Whether this package called the function."""
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)
