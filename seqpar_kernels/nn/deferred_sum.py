"""A row-parallel output whose sum over ranks is deferred to the norm that follows.

A model computes ``norm(residual + dropout(linear(x)))`` in separate statements. Its row-parallel linear returns a
:class:`DeferredSum`. Dropout and addition record their arguments in it, and the norm does all three in the kernel that
sums over the ranks. Any other function that takes the tensor makes it compute its value first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..functional import (
    NormOptions,
    NormTensors,
    checked_linear_norm,
    replicated,
)
from ..kernels import NormKind
from ..kernels.spec import accumulation_dtype
from ..layout import SequenceShard
from ..random import draw_seed
from .own_forward import trusted
from .region import Region

_ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})
_DESCRIPTIONS = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")
) | frozenset(
    {Tensor.size, Tensor.dim, Tensor.__len__, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point}
)


class SummingLinear(Protocol):
    """The row-parallel linear that makes a :class:`DeferredSum`, as far as the sum uses it."""

    region: Region
    out_features: int
    weight: Any
    bias: Any
    chunks: int | None
    engine: str
    remake_input: int
    ran: Any

    def summed(self, x: Tensor) -> Tensor: ...
    def _linear_weight(self) -> Tensor: ...
    def _main_grad(self) -> Tensor | None: ...
    def _note_kept(self, x: Tensor, out: Tensor) -> None: ...


class Dropping(Protocol):
    """A dropout between the linear and the norm."""

    p: float
    training: bool
    fused: bool

    def dropped(self, x: Tensor, seed: Tensor | None) -> Tensor: ...


class Normalizing(Protocol):
    """The norm whose kernel may compute a deferred sum."""

    region: Region
    weight: Any
    eps: float | None
    kind: NormKind
    zero_centered_weight: bool
    fused: bool


class DeferredSum(Tensor):
    """``dropout(reduce_scatter(linear(x)) + bias) + residual``, [..., S/t, ..., N], not computed yet.

    It has shape, dtype and device. Adding a tensor of the same shape and dtype gives another deferred sum. Every other
    function gets the value, which is computed once, in the grad mode in which the sum was made.

    Raises:
        RuntimeError: when it is computed, where ``x`` or the residual has been changed in place since (not under
            inference mode, whose tensors count no changes).
    """

    linear: SummingLinear
    x: Tensor | None
    residual: Tensor | None
    dropout: Dropping | None
    seed: Tensor | None
    computed: Tensor | None
    grad_mode: bool
    _versions: list[int]

    @staticmethod
    def __new__(
        cls,
        linear: SummingLinear,
        x: Tensor,
        residual: Tensor | None = None,
        dropout: Dropping | None = None,
        seed: Tensor | None = None,
    ) -> DeferredSum:
        region, shape = linear.region, list(x.shape)
        shape[region.seq_dim] = SequenceShard(shape[region.seq_dim], region.ranks, region.rank).size
        shape[-1] = linear.out_features
        place: Any = {"dtype": x.dtype, "device": x.device}
        operands = (x, residual, linear.weight, linear.bias)
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
        new: Any = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), requires_grad=trained, **place)
        if trained:
            with torch._C.DisableTorchFunctionSubclass():
                new.register_hook(_lost)
        new.linear, new.x, new.residual, new.dropout, new.seed = linear, x, residual, dropout, seed
        new.grad_mode, new.computed = torch.is_grad_enabled(), None
        new._versions = [version_of(t) for t in (x, residual) if t is not None]
        return new

    def value(self) -> Tensor:
        """The value, computed by the model's own statements."""
        if self.computed is None:
            x = self._input()
            with torch.set_grad_enabled(self.grad_mode), trusted():
                out = self.linear.summed(x)
                if self.dropout is not None:
                    out = self.dropout.dropped(out, self.seed)
                self._settle(out if self.residual is None else self.residual + out)
        assert self.computed is not None
        return self.computed

    def dropped(self, dropout: Dropping) -> Tensor | None:
        """A deferred sum with ``dropout`` recorded; None where the value must be computed now."""
        if self.computed is not None or self.residual is not None or self.dropout is not None:
            return None
        if not dropout.training or dropout.p == 0:
            return self
        x = self._input()
        return DeferredSum(self.linear, x, None, dropout, draw_seed(x.device))

    def plus(self, other: Any) -> DeferredSum | None:
        """A deferred sum with a residual recorded; None where the value must be computed now."""
        if self.computed is not None or self.residual is not None or not isinstance(other, Tensor):
            return None
        if (other.shape, other.dtype, other.device) != (self.shape, self.dtype, self.device):
            return None
        return DeferredSum(self.linear, self._input(), settled(other), self.dropout, self.seed)

    def normalized(self, norm: Normalizing) -> Tensor | None:
        """``norm`` of the sum in one kernel, which also computes the sum's value; None where it is computed already."""
        linear, region = self.linear, self.linear.region
        if self.computed is not None or norm.region is not region:
            return None
        x = self._input()
        with torch.set_grad_enabled(self.grad_mode):
            (weight, bias), sums = region.parameters(norm.weight, getattr(norm, "bias", None))
            linear_bias = linear.bias
            if sums and region.group is not None:
                (linear_bias,) = replicated([linear_bias], region.group)
            eps = norm.eps if norm.eps is not None else torch.finfo(accumulation_dtype(x.dtype)).eps
            p, training = (0.0, False) if self.dropout is None else (self.dropout.p, True)
            call, operands = checked_linear_norm(
                NormTensors(x, self.residual, weight, bias, x_bias=linear_bias),
                linear._linear_weight(),
                NormOptions(norm.kind, p, eps, training, True, norm.zero_centered_weight, seq_dim=region.seq_dim),
                region.group,
                self.seed,
                linear.chunks,
                linear.engine,
                main_grad=linear._main_grad(),
                sum_gradients=not sums,
                remake=linear.remake_input,
            )
            linear.ran = call.plan
            y, z = call(*operands)
            linear._note_kept(x, z)
        norm.fused = True
        if self.dropout is not None:
            self.dropout.fused = True
        self._settle(z)
        return y

    def _input(self) -> Tensor:
        """``x``; an error where ``x`` or the residual was changed in place since the sum was made."""
        assert self.x is not None
        if self._versions != [version_of(t) for t in (self.x, self.residual) if t is not None]:
            raise RuntimeError(
                f"{self.linear!r}: its input, or the residual added to its output, was changed in place before the "
                f"norm that sums the output over the ranks; write x = x + y, not x += y, in between"
            )
        return self.x

    def _settle(self, value: Tensor) -> None:
        for name, note in vars(self).items():
            if name.startswith("_seqpar"):  # marks of the check of a first forward hold for the value too
                setattr(value, name, note)
        self.computed = value
        self.x = self.residual = self.seed = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            for this, other in (args[::-1], args):
                if isinstance(this, DeferredSum) and (waiting := this.plus(other)) is not None:
                    return waiting
        args, kwargs = tree_map(settled, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own default is no class method
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func}: takes a row-parallel output that is still to be summed over the ranks")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # of an untyped signature
        return f"DeferredSum({tuple(self.shape)}, {'computed' if self.computed is not None else 'waiting'})"


def version_of(t: Tensor) -> int:
    """How often ``t`` has been changed in place; a constant for inference tensors, which do not count it."""
    return 0 if not torch.compiler.is_compiling() and t.is_inference() else t._version


def _lost(grad: Tensor) -> None:
    """Raise in the backward: a torch.autograd.Function ignores tensor subclasses and would take the sum for a leaf."""
    raise RuntimeError(
        "a custom autograd function was given a row-parallel output that is still to be summed over the ranks, and its "
        "gradient would be lost: give it x.clone()"
    )


def settled(x: Any) -> Any:
    """``x``, and the value of a deferred sum."""
    return x.value() if isinstance(x, DeferredSum) else x
