"""RMSNorm over features that are cut over the ranks, of which autograd keeps the input and one number a row.

========  ==========================================================  ==============  ==============================
pass      computes                                                    result          communication
========  ==========================================================  ==============  ==============================
forward   rstd = 1 / sqrt(sum over all features of x^2 / N + eps)     [..., S, 1]     all-reduce of one number a row
forward   y = x * rstd * weight                                       [..., S, N/t]   none
dx        rstd * (g - x * rstd * sum(g * x * rstd) / N), g = dy * w   [..., S, N/t]   all-reduce of one number a row
dweight   sum of dy * x * rstd over rows                              [N/t]           none
========  ==========================================================  ==============  ==============================

N features on t ranks; sums are fp32 (fp64 for fp64). In eager mode only: torch.compile sees PyTorch operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.spec import accumulation_dtype
from .mappings import all_reduce
from .remake import readable, require_memory


def _scaled(x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered: bool) -> Tensor:
    """y of a forward whose statistics are known. [..., S, N/t]"""
    y = x.to(rstd.dtype) * rstd
    if weight is not None:
        y = y * (weight + 1 if zero_centered else weight)
    return y.to(x.dtype)


class SplitNorm(torch.autograd.Function):
    """Keeps x, rstd and the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, features: int, eps: float, zero_centered: bool, group: str
    ) -> Tensor:
        rows = x.to(accumulation_dtype(x.dtype))
        total = all_reduce(rows.square().sum(-1, keepdim=True), group)
        rstd = torch.rsqrt(total / features + eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.features, ctx.zero_centered, ctx.group = features, zero_centered, group
        return _scaled(x, rstd, weight, zero_centered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        dx = dweight = None
        normed, g = x.to(rstd.dtype) * rstd, dy.to(rstd.dtype)
        if need_weight:
            dweight = (g * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if need_x:
            if weight is not None:
                g = g * (weight + 1 if ctx.zero_centered else weight)
            mean = all_reduce((g * normed).sum(-1, keepdim=True), ctx.group) / ctx.features
            dx = ((g - normed * mean) * rstd).to(x.dtype)
        return dx, dweight, None, None, None, None

    @staticmethod
    def made_again(ctx: Any, number: int, out: Tensor | None) -> Callable[[], Tensor] | None:
        """How y is made again without the ranks, see :mod:`.remake`."""
        return functools.partial(_again, ctx) if readable(*ctx._raw_saved_tensors) else None


def _again(ctx: Any) -> Tensor:
    x, rstd, weight = ctx.saved_tensors
    require_memory(weight)
    return _scaled(x, rstd, weight, ctx.zero_centered)
