"""What an expert does between its two matmuls, and the gradient of it: plain torch, some rows at a time.

Computed in fp32 (fp64 for fp64) and rounded once. A block of rows fits a core's cache, so that the passes over it cost
no memory traffic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import accumulation_dtype

#: Functions of the gate, or of the only projection where there is no gate.
EXPERT_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")

_BLOCK_ELEMENTS = 1 << 17
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # its formula's name in PyTorch


class ExpertActivation(NamedTuple):
    """``f(gate) * (up + up_shift)``, or ``f(h)`` without a gate. (GLU variants: Shazeer 2020, arXiv 2002.05202.)"""

    name: str = "silu"  # one of EXPERT_ACTIVATIONS
    gated: bool = True
    interleaved: bool = False  # columns of h are gate, up, gate, up ...; else all gates, then all ups
    alpha: float = 1.0  # of silu: g * sigmoid(alpha * g)
    limit: float | None = None  # gates are cut off above it, ups beyond it on both sides
    up_shift: float = 0.0

    def width(self, inner: int) -> int:
        """Columns of the first projection for ``inner`` of the second."""
        return 2 * inner if self.gated else inner


def activate_experts(h: Tensor, activation: ExpertActivation) -> Tensor:
    """[P, 2 * I] (without a gate [P, I]) -> [P, I]"""
    inner = h.shape[1] // 2 if activation.gated else h.shape[1]
    out = h.new_empty(h.shape[0], inner)
    for rows in _blocks(h):
        gate, up = _split(h[rows].to(accumulation_dtype(h.dtype)), activation)
        value = _function(gate, activation)
        if up is None:
            out[rows] = value
        else:
            _product(value, _shifted(up, activation), out[rows])
    return out


class ActivationGrads(NamedTuple):
    """What :func:`activate_experts_backward` makes in one pass."""

    scaled: Tensor  # the activation again, times the row's weight. [P, I]
    h: Tensor  # gradient of h, like h
    weights: Tensor  # gradient of the row's weight as far as it comes from here. [P] in the accumulation dtype


def activate_experts_backward(
    h: Tensor,
    da: Tensor,
    weights: Tensor,
    activation: ExpertActivation,
    out: tuple[Tensor, Tensor] | None = None,
) -> ActivationGrads:
    """The gradient of ``weights[:, None] * activation(h)``.

    Args:
        h: [P, 2 * I], without a gate [P, I].
        da: [P, I].
        weights: [P] in the accumulation dtype.
        out: where ``scaled`` and the gradient of h are to be written.
    """
    wide = accumulation_dtype(h.dtype)
    scaled, dh = (torch.empty_like(da, dtype=h.dtype), torch.empty_like(h)) if out is None else out
    dweights = torch.empty(h.shape[0], dtype=wide, device=h.device)
    for rows in _blocks(h):
        whole, dout, weight = h[rows].to(wide), da[rows].to(wide), weights[rows, None]
        gate, up = _split(whole, activation)
        f = _function(gate, activation)
        shifted = None if up is None else _shifted(up, activation)
        a = f if shifted is None else f * shifted
        _product(a, weight, scaled[rows])
        torch.linalg.vecdot(dout, a, out=dweights[rows])
        dout = dout * weight
        if shifted is None:
            _function_backward(dout, gate, activation, dh[rows])
            continue
        into_gate, into_up = _columns(dh[rows], activation)
        _product(dout, f, into_up)
        _function_backward(dout.mul_(shifted), gate, activation, into_gate)
        if activation.limit is not None:  # beyond the limits nothing moves
            raw_gate, raw_up = _columns(whole, activation)
            into_gate.masked_fill_(raw_gate > activation.limit, 0)
            into_up.masked_fill_(raw_up.abs() > activation.limit, 0)
    return ActivationGrads(scaled, dh, dweights)


def _blocks(h: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS // max(1, h.shape[1])) if h.is_cpu else max(1, h.shape[0])
    return [slice(start, min(start + rows, h.shape[0])) for start in range(0, h.shape[0], rows)]


def _columns(h: Tensor, activation: ExpertActivation) -> tuple[Tensor, Tensor]:
    """Views of gate and up."""
    if activation.interleaved:
        return h[:, 0::2], h[:, 1::2]
    gate, up = h.chunk(2, dim=1)
    return gate, up


def _split(h: Tensor, activation: ExpertActivation) -> tuple[Tensor, Tensor | None]:
    """Gate and up within the limits; without a gate all of h and None."""
    if not activation.gated:
        return h, None
    gate, up = _columns(h, activation)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate, up


def _shifted(up: Tensor, activation: ExpertActivation) -> Tensor:
    return up if activation.up_shift == 0 else up + activation.up_shift


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a * b``, rounded once."""
    if a.dtype == out.dtype:
        torch.mul(a, b, out=out)
    else:
        out.copy_(a * b)


def _function(g: Tensor, activation: ExpertActivation) -> Tensor:
    """f(g)"""
    match activation.name:
        case "silu":
            return F.silu(g) if activation.alpha == 1 else g * torch.sigmoid(activation.alpha * g)
        case "gelu" | "gelu_tanh":
            return F.gelu(g, approximate=_GELU[activation.name])
        case "relu":
            return g.relu()
        case "relu2":
            return g.relu().square()
        case _:
            raise ValueError(f"activation: expected one of {EXPERT_ACTIVATIONS}, got {activation.name!r}")


def _function_backward(df: Tensor, g: Tensor, activation: ExpertActivation, out: Tensor) -> None:
    """out = df * f'(g)"""
    aten, same = torch.ops.aten, out.dtype == df.dtype
    match activation.name:
        case "silu" if activation.alpha == 1:
            made = aten.silu_backward.grad_input(df, g, grad_input=out) if same else aten.silu_backward(df, g)
        case "silu":
            sigmoid = torch.sigmoid(activation.alpha * g)
            made = df * (sigmoid * (1 + activation.alpha * g * (1 - sigmoid)))
        case "gelu" | "gelu_tanh":
            made = aten.gelu_backward(df, g, approximate=_GELU[activation.name])
        case "relu":
            made = aten.threshold_backward(df, g, 0)
        case "relu2":
            made = df * (2 * g.relu())
        case _:
            raise ValueError(f"activation: expected one of {EXPERT_ACTIVATIONS}, got {activation.name!r}")
    if made is not out:
        out.copy_(made)
