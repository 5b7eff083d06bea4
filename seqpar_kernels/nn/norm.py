"""Norms and dropout on a sequence shard, with the parameters and state_dict of their torch.nn twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_eps, check_probability
from ..functional import run_norm
from ..kernels import NormKind
from ..layout import Group
from .region import Region


def _last_size(normalized_shape: int | Sequence[int]) -> int:
    """Norms run over the last dimension only: one row of the residual stream."""
    sizes = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(f"normalized_shape: expected one positive size, that of the last dimension, got {sizes}")
    return int(sizes[0])


class _Norm(nn.Module):
    """Forward of LayerNorm and RMSNorm."""

    kind: NormKind
    region: Region
    weight: Any  # a Parameter or None, and eps a float or None: LayerNorm and RMSNorm declare them differently
    eps: Any
    zero_centered_weight: bool = False

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        p: float,
        prenorm: bool,
        seq_len: int | None,
        x_bias: Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> Any:
        region = self.region
        (weight, bias), summed = region.parameters(self.weight, getattr(self, "bias", None))
        eps = self.eps if self.eps is not None else torch.finfo(x.dtype).eps
        return run_norm(
            self.kind,
            x,
            residual,
            weight,
            bias,
            p,
            eps,
            self.training,
            prenorm,
            x_bias,
            self.zero_centered_weight,
            residual_dtype,
            region.group,
            region.seq_dim,
            None,
            None,
            region.seq_len if seq_len is None else seq_len,
            None,
            None,
            None,
            sum_gradients=not summed,
        )


class LayerNorm(nn.LayerNorm, _Norm):
    """``torch.nn.LayerNorm`` over the last dimension of a sequence shard [..., S/t, ..., H], in one kernel.

    Weight and bias are replicated; their gradients are summed over ``group``.
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
    def from_torch(cls, module: nn.LayerNorm, group: Group = None, *, seq_dim: int = -2) -> LayerNorm:
        """The same norm on a shard; takes over the parameters themselves, so optimizers keep working."""
        size = _last_size(module.normalized_shape)
        new = cls(size, module.eps, False, group=group, seq_dim=seq_dim)
        new.elementwise_affine = module.elementwise_affine
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)

    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., H] -> the same shape."""
        y: Tensor = self._run(x, None, 0.0, False, seq_len)
        return y


class RMSNorm(nn.RMSNorm, _Norm):
    """``torch.nn.RMSNorm`` over the last dimension of a sequence shard, in one kernel; statistics in fp32."""

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

        The module is run once on random numbers to see that it does, which also tells plain from zero-centred weights.

        Raises:
            ValueError: it computes something else.
        """
        weight = getattr(module, "weight", None)
        eps = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
        size = weight.numel() if isinstance(weight, nn.Parameter) else _last_size(module.normalized_shape)  # type: ignore[arg-type]
        new = cls(size, eps, False, group=group, seq_dim=seq_dim)
        new.elementwise_affine = weight is not None
        new.weight = weight  # type: ignore[assignment]
        if not isinstance(module, nn.RMSNorm):
            new.zero_centered_weight = _probe_rms(module, weight, eps, size)
        return new.train(module.training)

    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., H] -> the same shape."""
        y: Tensor = self._run(x, None, 0.0, False, seq_len)
        return y


@torch.no_grad()
def _probe_rms(module: nn.Module, weight: Tensor | None, eps: float | None, size: int) -> bool:
    """Whether a foreign RMSNorm scales by 1 + weight; ValueError when it is no RMSNorm over the last dimension."""
    name = type(module).__name__
    if eps is None:
        raise ValueError(f"module: expected a norm with variance_epsilon, eps or epsilon, {name} has none of them")
    device = torch.device("cpu") if weight is None else weight.device
    if device.type == "meta":
        raise ValueError(f"module: {name} is on the meta device and cannot be tried; materialise it first")
    dtype = torch.float32 if weight is None else weight.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, size, generator=generator).to(device, dtype)
    got = module(x).double()
    xhat = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    scale = torch.ones(size, device=device).double() if weight is None else weight.double()
    tolerance = 16 * torch.finfo(dtype).eps * xhat.abs().amax()
    for zero_centered in (False, True):
        expected = xhat * (1 + scale if zero_centered else scale)
        if (got - expected).abs().amax() <= tolerance * (1 + scale.abs().amax()):
            return zero_centered
    raise ValueError(f"module: {name} does not compute RMSNorm(x) * weight nor RMSNorm(x) * (1 + weight)")


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
    """

    def __init__(
        self,
        hidden_size: int,
        p: float = 0.0,
        *,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
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
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        new = cls(_last_size(norm.normalized_shape), p, norm=name, eps=eps, group=group, seq_dim=seq_dim)
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
    """``torch.nn.Dropout`` whose mask depends on (seed, global row, column) only: the same for every sharding."""

    def __init__(self, p: float = 0.5, inplace: bool = False, *, group: Group = None, seq_dim: int = -2):
        super().__init__(p, False)
        self.region = Region(group, seq_dim)

    @classmethod
    def from_torch(cls, module: nn.Dropout, group: Group = None, *, seq_dim: int = -2) -> Dropout:
        """The same probability on a shard."""
        return cls(module.p, group=group, seq_dim=seq_dim).train(module.training)

    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., H] -> the same shape."""
        region = self.region
        y: Tensor = run_norm(
            NormKind.NONE,
            x,
            None,
            None,
            None,
            self.p,
            1.0,
            self.training,
            True,
            None,
            False,
            None,
            region.group,
            region.seq_dim,
            None,
            None,
            region.seq_len if seq_len is None else seq_len,
            None,
            None,
            None,
        )
        return y
