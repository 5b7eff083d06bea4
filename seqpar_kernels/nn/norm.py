"""Norms and dropout on a sequence shard, with the parameters and state_dict of their torch.nn twins."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_eps, check_probability
from ..functional import run_norm
from ..kernels import NormKind
from ..kernels.spec import accumulation_dtype
from ..layout import Group
from .region import Region


def _last_size(normalized_shape: int | Sequence[int]) -> int:
    """Norms run over the last dimension only: one row of the residual stream."""
    sizes = list(normalized_shape) if isinstance(normalized_shape, (list, tuple)) else [normalized_shape]
    if len(sizes) != 1 or not isinstance(sizes[0], int) or sizes[0] < 1:
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
        eps = self.eps if self.eps is not None else torch.finfo(accumulation_dtype(x.dtype)).eps
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
        """The same norm on a shard; takes over the parameters themselves, so optimizers keep working.

        Raises:
            ValueError: no torch.nn.LayerNorm, or one whose forward has been overridden.
        """
        if not isinstance(module, nn.LayerNorm) or type(module).forward not in (nn.LayerNorm.forward, cls.forward):
            raise ValueError(f"module: expected torch.nn.LayerNorm with its own forward, got {type(module).__name__}")
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

        A copy of the module is run on random numbers to see that it does; this also tells plain from zero-centred
        weights.

        Raises:
            ValueError: it computes something else.
        """
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: expected a norm, got {type(module).__name__}")
        others = [name for name, _ in module.named_parameters() if name != "weight"]
        if others:
            raise ValueError(f"module: expected no parameter but weight, {type(module).__name__} has {others}")
        weight = getattr(module, "weight", None)
        names = ("variance_epsilon", "eps", "epsilon")
        eps = next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)
        known = type(module) in (nn.RMSNorm, cls)
        if eps is None and not known:
            raise ValueError(f"module: expected a norm with one of {names}, {type(module).__name__} has none of them")
        size = weight.numel() if isinstance(weight, Tensor) else _last_size(getattr(module, "normalized_shape", ()))
        new = cls(size, eps, False, group=group, seq_dim=seq_dim)
        new.elementwise_affine = weight is not None
        new.weight = weight  # type: ignore[assignment]
        new.zero_centered_weight = module.zero_centered_weight if isinstance(module, cls) else False
        if not known:
            new.zero_centered_weight = _probe_rms(module, eps, size)
        return new.train(module.training)

    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., H] -> the same shape."""
        y: Tensor = self._run(x, None, 0.0, False, seq_len)
        return y


@torch.no_grad()
def _probe_rms(module: nn.Module, eps: Any, size: int) -> bool:
    """Whether a foreign RMSNorm scales by 1 + weight; ValueError when it is no RMSNorm over the last dimension."""
    name = type(module).__name__
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(f"module: {name} is on the meta device and cannot be tried; materialise it first")
    probe = copy.deepcopy(module).float().cpu()
    generator = torch.Generator().manual_seed(0)
    for param in probe.parameters():  # a weight of all ones or zeros would not tell the kinds apart
        param.copy_(torch.rand(param.shape, generator=generator) + 0.5)
    # Rows of different scale and a mean far from zero, which a LayerNorm would subtract.
    x = (torch.randn(4, size, generator=generator) + 3) * torch.tensor([0.01, 1.0, 1.0, 100.0])[:, None]
    got = probe(x)
    if not isinstance(got, Tensor) or got.shape != x.shape:
        raise ValueError(f"module: {name} does not return a tensor of its input's shape")
    xhat = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    weight = getattr(probe, "weight", None)
    scale = torch.ones(size).double() if weight is None else weight.double()
    for zero_centered in (False, True):
        expected = xhat * (1 + scale if zero_centered else scale)
        if torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5):
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
