"""Detects what a norm of unknown class computes, by calling a copy of it: class names do not tell."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import NormKind

#: Epsilons that model code writes into its forward instead of keeping them as an attribute.
_USUAL_EPS = (1e-5, 1e-6, 1e-12, torch.finfo(torch.float32).eps)


class NormForm(NamedTuple):
    """``norm(x) * weight + bias`` or, zero-centred, ``norm(x) * (1 + weight)``."""

    kind: NormKind
    eps: float
    zero_centered: bool


@torch.no_grad()
def norm_form(module: nn.Module, size: int | None = None) -> NormForm:
    """The form of a norm over the last dimension, detected from the output of a copy of ``module`` for random rows.

    Args:
        module: any module with at most the parameters ``weight`` and ``bias`` of one dimension.
        size: of the last dimension; None: that of the weight.

    Raises:
        ValueError: no module, parameters of another kind, on the meta device, or it computes something else.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: expected a norm, got {type(module).__name__}")
    name = type(module).__name__
    params = dict(module.named_parameters())
    others = [key for key, param in params.items() if key not in ("weight", "bias") or param.dim() != 1]
    if others:
        raise ValueError(f"module: expected no parameter but a weight and a bias of one dimension, {name} has {others}")
    if any(param.is_meta for param in params.values()):
        raise ValueError(f"module: {name} is on the meta device and cannot be tried; materialise it first")
    size = params["weight"].numel() if "weight" in params else (size or 64)
    probe = copy.deepcopy(module).float().cpu()
    generator = torch.Generator().manual_seed(0)
    for param in probe.parameters():  # a weight of all ones or zeros would not tell the kinds apart
        param.copy_(torch.rand(param.shape, generator=generator) + 0.5)
    # Rows of different scale tell epsilons apart. A mean far from zero tells LayerNorm, which subtracts it.
    scales = torch.tensor([1e-4, 0.01, 1.0, 1.0, 100.0])[:, None]
    x = (torch.randn(5, size, generator=generator) + 3) * scales
    try:
        got = probe(x)
    except Exception as error:
        raise ValueError(f"module: {name} cannot be tried on a matrix: {type(error).__name__}: {error}") from error
    if not isinstance(got, Tensor) or got.shape != x.shape:
        raise ValueError(f"module: {name} does not return a tensor of its input's shape")
    own = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1]
    weight, bias = (getattr(probe, key, None) for key in ("weight", "bias"))
    kinds = (NormKind.RMS, NormKind.LAYER) if bias is None else (NormKind.LAYER,)
    for kind in kinds:
        rows = x.double() if kind == NormKind.RMS else x.double() - x.double().mean(-1, keepdim=True)
        for eps in dict.fromkeys([*own, *_USUAL_EPS]):
            normalized = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
            for zero_centered in (False, True) if weight is not None else (False,):
                expected = normalized if weight is None else normalized * (weight.double() + zero_centered)
                expected = expected if bias is None else expected + bias.double()
                if torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5):
                    return NormForm(kind, eps, zero_centered)
    raise ValueError(f"module: {name} computes neither RMSNorm(x) nor LayerNorm(x), times weight or (1 + weight)")
