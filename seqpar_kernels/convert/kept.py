"""Refuses a loss that is computed from a shard, or from this rank's heads, that left the forward by a side door.

A hidden state that a hook has kept, ``self.aux = x.pow(2).mean()`` in a block, an attention entropy that is returned
beside the logits: every rank has another value, and the gradients are parts of no sum. No function mode is active where
the loss is computed. So what the checked forward has marked, and somebody still holds, becomes a :class:`Kept`: it
hands its class on to what is computed from it, and refuses ``backward``. What this package's functions put together
(``gather_sequence``, say) is a plain tensor again.
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
from .culprit import PACKAGE, user_frame, written
from .marks import OWNED, Kind, Local, Mixed, kind_of, mark_of

_NOTE = "_seqpar_kept"
#: Code that hands on what its caller asks of a tensor.
_BETWEEN = (os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, inspect.getfile(DeferredSum))
_BACKWARD = (Tensor.backward, torch.autograd.grad)


class _Made(NamedTuple):
    tensor: weakref.ref[Tensor]
    file: str
    line: int


class Kept(Tensor):
    """A tensor that differs between the ranks, outside the forward that made it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kept = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Kept)]
        for leaf in kept:
            leaf.__class__ = Tensor  # type: ignore[assignment]
        if torch._C._current_graph_task_id() != -1:  # a backward reads what its forward has saved
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
    """What a checked forward has marked, and the statements that made it; keeps none of it alive."""

    def __init__(self, model: str):
        self._model = model
        self._made: list[_Made] = []

    def add(self, tensor: Tensor) -> None:
        if type(tensor) is DeferredSum or (type(tensor) is Tensor and tensor.grad_fn is not None):
            frame = user_frame()
            file, line = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("?", 0)
            self._made.append(_Made(weakref.ref(tensor), file, line))

    def close(self) -> None:
        """The forward has succeeded."""
        for made in self._made:
            tensor = made.tensor()
            if type(tensor) is DeferredSum:  # the norm behind it has computed it
                tensor = tensor.computed
            if type(tensor) is Tensor and (what := _apart(tensor)) is not None:
                _keep(tensor, f"{self._model}: {what}, made by {written(made.file, made.line)},")
        self._made.clear()


def _apart(tensor: Tensor) -> str | None:
    """What it is, if it or its gradient differs between the ranks."""
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
    """Whether it is this package that called the function."""
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)
