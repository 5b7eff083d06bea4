"""Who is timed in ``bench norm``: ours and the peers, each a function ``(x, residual, weight, bias, p) -> (y, z)``.

``z = dropout(x) + residual; y = norm(z)``. A peer that lacks a part of this gets it from torch, as its users would do.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import why_not

NormFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
EPS = 1e-5


class Absent(Exception):
    """This provider cannot do this here; the message says why."""


def eager_norm(kind: str, z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if kind == "layer":
        return F.layer_norm(z, z.shape[-1:], weight, bias, EPS)
    return F.rms_norm(z, z.shape[-1:], weight, EPS)


def eager(kind: str, p: float, device: str) -> NormFunction:
    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
        z = (F.dropout(x, p) if p else x) + residual
        return eager_norm(kind, z, weight, bias), z

    return run


def compiled(kind: str, p: float, device: str) -> NormFunction:
    torch._dynamo.reset()  # each shape a compilation of its own, however many came before
    return torch.compile(eager(kind, p, device), dynamic=False, fullgraph=True)


def ours(backend: str) -> Callable[[str, float, str], NormFunction]:
    def build(kind: str, p: float, device: str) -> NormFunction:
        reason = why_not(backend, torch.device(device))
        if reason is not None:
            raise Absent(reason)

        def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
            if kind == "layer":
                return sp.dropout_add_layer_norm(x, residual, weight, bias, p=p, eps=EPS, prenorm=True, backend=backend)
            return sp.dropout_add_rms_norm(x, residual, weight, p=p, eps=EPS, prenorm=True, backend=backend)

        return run

    return build


def _peer_module(package: str, module: str, device: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    if device != "cuda":
        raise Absent(f"{package} has no CPU kernels")
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Absent(f"{module} does not import here: {error}") from None


def flash_attn(kind: str, p: float, device: str) -> NormFunction:
    fn = _peer_module("flash_attn", "flash_attn.ops.triton.layer_norm", device).layer_norm_fn

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
        return fn(x, weight, bias, residual=residual, eps=EPS, dropout_p=p, prenorm=True, is_rms_norm=kind == "rms")

    return run


def liger(kind: str, p: float, device: str) -> NormFunction:
    if kind == "rms":
        module = _peer_module("liger_kernel", "liger_kernel.ops.fused_add_rms_norm", device)
        if p:
            raise Absent("its fused add + RMSNorm has no dropout")
        fused = module.LigerFusedAddRMSNormFunction.apply
        return lambda x, residual, weight, bias, p: fused(x, residual, weight, EPS, 0.0, "llama", False)
    norm = _peer_module("liger_kernel", "liger_kernel.ops.layer_norm", device).LigerLayerNormFunction.apply
    if p:
        raise Absent("its LayerNorm has no dropout")

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
        z = x + residual
        return norm(z, weight, bias, EPS), z

    return run


def quack(kind: str, p: float, device: str) -> NormFunction:
    fn = _peer_module("quack", "quack", device).rmsnorm
    if kind == "layer":
        raise Absent("its LayerNorm has no backward")
    if p:
        raise Absent("its RMSNorm has no dropout")
    return lambda x, residual, weight, bias, p: fn(x, weight, residual=residual, eps=EPS, prenorm=True)


OURS: dict[str, dict[str, Callable[[str, float, str], NormFunction]]] = {
    "cpu": {"ours": ours("native")},
    "cuda": {"ours": ours("cuda"), "ours-triton": ours("triton")},
}
PEERS: dict[str, Callable[[str, float, str], NormFunction]] = {
    "eager": eager,
    "compile": compiled,
    "flash-attn": flash_attn,
    "liger": liger,
    "quack": quack,
}
