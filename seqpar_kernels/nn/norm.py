"""Norms and dropout on a sequence shard, with the parameters and state_dict of their torch.nn twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..checks import check_eps, check_probability
from ..functional import NormOptions, NormRecipe, NormTensors, run_norm
from ..kernels import NormKind
from ..kernels.spec import accumulation_dtype
from ..layout import Group
from .deferred_sum import DeferredSum, settled
from .norm_detection import norm_form
from .own_forward import own_forward
from .region import Region, is_entrance, mark_entrance


def _last_size(normalized_shape: int | Sequence[int]) -> int:
    """Norms run over the last dimension only: one row of the residual stream."""
    sizes = list(normalized_shape) if isinstance(normalized_shape, (list, tuple)) else [normalized_shape]
    if len(sizes) != 1 or not isinstance(sizes[0], int) or sizes[0] < 1:
        raise ValueError(f"normalized_shape: expected one positive size, that of the last dimension, got {sizes}")
    return int(sizes[0])


def _size_of(module: nn.Module) -> int:
    """Of the last dimension; a foreign norm without parameters may not know it, and 1 stands for any."""
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else _last_size(getattr(module, "normalized_shape", 1))


class _Norm(nn.Module):
    """Forward of LayerNorm and RMSNorm."""

    kind: NormKind
    region: Region
    weight: Any  # a Parameter or None, and eps a float or None: LayerNorm and RMSNorm declare them differently
    eps: Any
    zero_centered_weight: bool = False
    fused = False  # whether the last forward was one kernel with the row-parallel output before it
    first = False  # whether nothing came before it on the shard

    def _normalize(self, x: Tensor, seq_len: int | None) -> Tensor:
        if not torch.compiler.is_compiling():  # nothing waits there
            self.fused, self.first = False, is_entrance(x)
            if isinstance(x, DeferredSum):
                y = x.normalized(self)
                if y is not None:
                    return y
        out: Tensor = self._run(settled(x), None, 0.0, False, seq_len)
        return out

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        p: float,
        prenorm: bool,
        seq_len: int | None,
        x_bias: Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        vectors: Sequence[Tensor | None] | None = None,
    ) -> Any:
        """``vectors`` stand for weight and bias where the caller sums their gradients over the ranks."""
        region = self.region
        if vectors is None:
            vectors, summed = region.parameters(self.weight, getattr(self, "bias", None))
        else:
            summed = True
        weight, bias = vectors
        return run_norm(
            NormTensors(x, residual, weight, bias, x_bias=x_bias),
            NormOptions(
                self.kind,
                p,
                self._epsilon(x.dtype),
                self.training,
                prenorm,
                self.zero_centered_weight,
                residual_dtype,
                region.seq_dim,
                region.seq_len if seq_len is None else seq_len,
            ),
            region.group,
            sum_gradients=not summed,
        )

    def _epsilon(self, dtype: torch.dtype) -> float:
        return float(self.eps) if self.eps is not None else torch.finfo(accumulation_dtype(dtype)).eps

    def _take_over(self, module: nn.Module) -> None:
        """The parameters themselves, None where there are none."""
        for name in ("weight", "bias"):
            if hasattr(self, name):
                setattr(self, name, getattr(module, name, None))

    def recipe(self, z: Tensor) -> NormRecipe:
        """How this norm's result is made again from the row it was made from."""
        bias = getattr(self, "bias", None)
        return NormRecipe(z, self.weight, bias, self.kind, self.zero_centered_weight, self._epsilon(z.dtype))


class LayerNorm(nn.LayerNorm, _Norm):
    """``torch.nn.LayerNorm`` over the last dimension of a sequence shard [..., S/t, ..., H], in one kernel.

    Weight and bias are replicated; their gradients are summed over ``group``.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> plain = torch.nn.LayerNorm(16)
        >>> norm = sp.LayerNorm.from_torch(plain, group=None)
        >>> x = torch.randn(2, 8, 16)
        >>> torch.allclose(norm(x), plain(x), atol=1e-5)
        True
    """

    kind = NormKind.LAYER

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group = None,
        seq_dim: int = -2,
    ):
        check_eps(eps)
        super().__init__(_last_size(normalized_shape), eps, elementwise_affine, bias, device, dtype)
        self.region = Region(group, seq_dim)

    @classmethod
    def from_torch(cls, module: nn.Module, group: Group = None, *, seq_dim: int = -2) -> LayerNorm:
        """The same norm on a shard; takes over the parameters themselves, so optimizers keep working.

        From ``torch.nn.LayerNorm`` or any module that is found to compute the same (:func:`.norm_detection.norm_form`).

        Raises:
            ValueError: it computes something else, or scales by 1 + weight.
        """
        own_forward = "forward" not in vars(module) and getattr(type(module), "forward", None) in (
            nn.LayerNorm.forward, cls.forward,
        )  # fmt: skip
        if not isinstance(module, nn.LayerNorm) or not own_forward:
            return cls._from_foreign(module, group, seq_dim)
        size = _last_size(module.normalized_shape)
        new = cls(size, module.eps, False, group=group, seq_dim=seq_dim)
        new.elementwise_affine = module.elementwise_affine
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)

    @classmethod
    def _from_foreign(cls, module: nn.Module, group: Group, seq_dim: int) -> LayerNorm:
        form, size = norm_form(module), _size_of(module)
        if form.kind != NormKind.LAYER or form.zero_centered:
            raise ValueError(f"module: expected a LayerNorm, {type(module).__name__} computes {form}")
        new = cls(size, form.eps, False, group=group, seq_dim=seq_dim)
        new._take_over(module)
        new.elementwise_affine = new.weight is not None
        return new.train(module.training)

    @own_forward
    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., H] -> the same shape."""
        return self._normalize(x, seq_len)


class RMSNorm(nn.RMSNorm, _Norm):
    """``torch.nn.RMSNorm`` over the last dimension of a sequence shard, in one kernel; statistics in fp32.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> norm = sp.RMSNorm(16, eps=1e-6, group=None)
        >>> x = torch.randn(2, 8, 16)
        >>> torch.allclose(norm(x), torch.nn.functional.rms_norm(x, (16,), eps=1e-6), atol=1e-5)
        True
    """

    kind = NormKind.RMS

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered_weight: bool = False,
        group: Group = None,
        seq_dim: int = -2,
    ):
        if eps is not None:
            check_eps(eps)
        super().__init__(_last_size(normalized_shape), eps, elementwise_affine, device, dtype)
        self.zero_centered_weight = zero_centered_weight
        self.region = Region(group, seq_dim)

    @classmethod
    def from_torch(cls, module: nn.Module, group: Group = None, *, seq_dim: int = -2) -> RMSNorm:
        """From ``torch.nn.RMSNorm`` or any module that computes the same from ``weight`` and an epsilon.

        A copy is tried (:func:`.norm_detection.norm_form`), which also tells plain from zero-centred weights.

        Raises:
            ValueError: it computes something else.
        """
        if type(module) in (nn.RMSNorm, cls) and "forward" not in vars(module):
            size = _last_size(cast(Sequence[int], module.normalized_shape))
            eps: Any = module.eps
            zero_centered = module.zero_centered_weight if isinstance(module, cls) else False
        else:
            form = norm_form(module)
            if form.kind != NormKind.RMS:
                raise ValueError(f"module: {type(module).__name__} does not compute RMSNorm but {form}")
            size, eps, zero_centered = _size_of(module), form.eps, form.zero_centered
        new = cls(size, eps, False, zero_centered_weight=zero_centered, group=group, seq_dim=seq_dim)
        new._take_over(module)
        new.elementwise_affine = new.weight is not None
        return new.train(module.training)

    @own_forward
    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., H] -> the same shape."""
        return self._normalize(x, seq_len)


class DropoutAddNorm(_Norm):
    """``z = dropout(x + x_bias) + residual; y = norm(z)`` in one kernel forward and one backward.

    Args:
        hidden_size: H.
        p: dropout probability.
        norm: "layer" or "rms".
        eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm / RMSNorm.
        prenorm: return ``(y, z)``; else ``y``.
        residual_dtype: dtype in which the residual stream is kept.
        group, seq_dim: where the sequence is sharded.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> block = sp.DropoutAddNorm(16, p=0.1, norm="rms")
        >>> x, residual = torch.randn(2, 2, 8, 16).unbind(0)
        >>> y, z = block(x, residual)  # z is the residual of the next block
        >>> y.shape, z.shape
        (torch.Size([2, 8, 16]), torch.Size([2, 8, 16]))
    """

    def __init__(
        self,
        hidden_size: int,
        p: float = 0.0,
        *,
        norm: Literal["layer", "rms"] = "layer",
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        prenorm: bool = True,
        zero_centered_weight: bool = False,
        residual_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: Group = None,
        seq_dim: int = -2,
    ):
        super().__init__()
        check_probability("p", p)
        if eps is not None:
            check_eps(eps)
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm: expected 'layer' or 'rms', got {norm!r}")
        self.hidden_size = _last_size(hidden_size)
        self.kind = NormKind.LAYER if norm == "layer" else NormKind.RMS
        self.p, self.eps, self.prenorm = p, eps, prenorm
        self.zero_centered_weight, self.residual_dtype = zero_centered_weight, residual_dtype
        self.region = Region(group, seq_dim)
        fill = torch.zeros if zero_centered_weight else torch.ones
        weight = fill(hidden_size, device=device, dtype=dtype) if elementwise_affine else None
        has_bias = elementwise_affine and bias and norm == "layer"
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if has_bias else None

    @classmethod
    def from_torch(cls, module: nn.Module, group: Group = None, *, p: float = 0.0, seq_dim: int = -2) -> DropoutAddNorm:
        """Around an existing LayerNorm or RMSNorm, whose parameters it takes over."""
        norm: LayerNorm | RMSNorm
        if isinstance(module, nn.LayerNorm):
            norm = LayerNorm.from_torch(module)
        else:
            norm = RMSNorm.from_torch(module)
        name: Literal["layer", "rms"] = "layer" if norm.kind == NormKind.LAYER else "rms"
        new = cls(_last_size(norm.normalized_shape), p, norm=name, eps=norm.eps, group=group, seq_dim=seq_dim)
        new.weight, new.bias = norm.weight, getattr(norm, "bias", None)
        new.zero_centered_weight = norm.zero_centered_weight
        return new.train(module.training)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, x_bias: Tensor | None = None, seq_len: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual [..., S/t, ..., H] -> y, or (y, z) with ``prenorm``."""
        out: Tensor | tuple[Tensor, Tensor] = self._run(
            x, residual, self.p, self.prenorm, seq_len, x_bias, self.residual_dtype
        )
        return out

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, p={self.p}, norm={self.kind.name.lower()}, eps={self.eps}, prenorm={self.prenorm}"


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` whose mask depends on (seed, global row, column) only: the same for every sharding.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> dropout = sp.Dropout(0.5, group=None)
        >>> dropout(torch.ones(2, 8, 16)).unique()
        tensor([0., 2.])
        >>> dropout.eval()(torch.ones(2, 8, 16)).unique()
        tensor([1.])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, group: Group = None, seq_dim: int = -2):
        super().__init__(p, False)
        self.region = Region(group, seq_dim)
        self.fused = False  # whether the last forward was one kernel with the linear before and the norm behind it
        self.first = False  # whether nothing came before it on the shard

    @classmethod
    def from_torch(cls, module: nn.Dropout, group: Group = None, *, seq_dim: int = -2) -> Dropout:
        """The same probability on a shard."""
        return cls(module.p, group=group, seq_dim=seq_dim).train(module.training)

    @own_forward
    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., H] -> the same shape."""
        if not torch.compiler.is_compiling():
            self.fused, self.first = False, is_entrance(x)
            if isinstance(x, DeferredSum) and (waiting := x.dropped(self)) is not None:
                return waiting
        y = self.dropped(settled(x), None, seq_len)
        if not torch.compiler.is_compiling() and self.first:
            mark_entrance(y)  # still nothing added up for the norm behind it
        return y

    def dropped(self, x: Tensor, seed: Tensor | None, seq_len: int | None = None) -> Tensor:
        """The same with a seed that has been drawn already, never deferred."""
        region = self.region
        seq_len = region.seq_len if seq_len is None else seq_len
        options = NormOptions(NormKind.NONE, self.p, training=self.training, seq_dim=region.seq_dim, seq_len=seq_len)
        y: Tensor = run_norm(NormTensors(x), options, region.group, seed)
        return y
