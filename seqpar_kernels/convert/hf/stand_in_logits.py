"""A stand-in for logits that never exist: it remembers how a model changes them before the loss.

Models scale their logits (Cohere, Granite) or cap them (Gemma 2, NanoChat) between the head and the loss. Elementwise
products with numbers and one tanh are remembered, and the loss makes them of its own logits. Another result is no
stand-in, and writing into one is seen in its version: the loss refuses both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LogitChange(NamedTuple):
    """``softcap * tanh(logit_scale * logits / softcap)`` for logits; without a softcap ``logit_scale * logits``."""

    logit_scale: float = 1.0
    softcap: float = 0.0

    def multiplied(self, factor: float) -> LogitChange:
        """And then a product with a number."""
        if self.softcap:  # the factor scales the cap, and the slope at 0
            return LogitChange(self.logit_scale * factor, self.softcap * abs(factor))
        return LogitChange(self.logit_scale * factor)

    def squashed(self) -> LogitChange | None:
        """And then tanh; None after another one."""
        return None if self.softcap else LogitChange(self.logit_scale, 1.0)

    def of(self, logits: Tensor) -> Tensor:
        """[...] -> [...]"""
        if self.softcap:
            return self.softcap * (logits * (self.logit_scale / self.softcap)).tanh()
        return logits * self.logit_scale


UNCHANGED = LogitChange()

Step = Callable[[LogitChange, Any], LogitChange | None]

_MULTIPLY: Step = lambda change, number: change.multiplied(number)  # noqa: E731
_DIVIDE: Step = lambda change, number: change.multiplied(1 / number) if number else None  # noqa: E731
#: By the name of the function of torch. A name that ends in "_" changes its tensor in place; so do __imul__ and such.
_STEPS: dict[str, Step] = {
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"), _MULTIPLY),
    **dict.fromkeys(("div", "div_", "divide", "divide_", "true_divide", "true_divide_"), _DIVIDE),
    **dict.fromkeys(("__truediv__", "__itruediv__"), _DIVIDE),
    **dict.fromkeys(("tanh", "tanh_"), lambda change, number: change.squashed()),
}
_CASTS = ("float", "double", "to", "type", "contiguous")


class StandInLogits(Tensor):
    """[..., V] of NaN without memory, and the change that the model has made so far."""

    change: LogitChange
    written: int  # the version of its memory when that was made

    @staticmethod
    def like(x: Tensor, features: int) -> StandInLogits:
        """For hidden states x [..., H]."""
        return StandInLogits._changed(x.new_full((), float("nan")).expand(*x.shape[:-1], features), UNCHANGED, None)

    @staticmethod
    def _changed(values: Tensor, change: LogitChange, written: int | None) -> StandInLogits:
        new: StandInLogits = torch.Tensor._make_subclass(StandInLogits, values)
        new.change, new.written = change, values._version if written is None else written
        return new

    @property
    def intact(self) -> bool:
        """Whether nothing was written into it or into a view of it."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._version == self.written

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], StandInLogits) and not kwargs:
            own, *rest = args
            step, number = _STEPS.get(name), rest[0] if rest else None
            fits = not rest if name.startswith("tanh") else type(number) in (int, float)
            if step is not None and len(rest) <= 1 and fits:
                change = step(own.change, number)
                if change is not None:
                    if name.endswith("_") and (not name.startswith("__") or name.startswith("__i")):
                        own.change = change
                        return own
                    with torch._C.DisableTorchFunctionSubclass():
                        return cls._changed(own.view_as(own), change, own.written)
            if name in _CASTS and all(isinstance(given, torch.dtype) for given in rest):
                return own  # the loss is computed in fp32 or fp64 whatever the model casts to
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
