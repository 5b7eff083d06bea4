"""The compiled kernels (csrc/) on torch tensors: CPU and CUDA, chosen by where ``x`` lives.

Same functions, same arguments as :mod:`.reference`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .spec import (
    NormGrads,
    NormKind,
    NormOutputs,
    NormSpec,
    NormWants,
    accumulation_dtype,
    dropout_scale,
    dropout_threshold,
)

try:
    from .. import _native
except ImportError as error:  # an unbuilt checkout: the reason is kept and shown where somebody needs the kernels
    _native = None  # type: ignore[assignment]
    build_error: str | None = str(error)
else:
    build_error = None

DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.float8_e4m3fn: 4,
}

_CPU = torch.device("cpu")  # comparing costs less than the name of a device's type

#: CUDA multiprocessors the kernels leave free for communication running beside them.
sm_margin = 0


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``; None when they can."""
    if _native is None:
        return f"the compiled extension is missing ({build_error})"
    if device.type == "cuda":
        return None if _native.has_cuda else "the extension was built without nvcc"
    return None if device.type == "cpu" else f"there are compiled kernels for cpu and cuda, not for {device.type}"


def _place(device: torch.device) -> tuple[bool, int, int]:
    if device == _CPU:
        return False, torch.get_num_threads(), 0
    return True, sm_margin, torch._C._cuda_getCurrentRawStream(device.index)


def _at(device: torch.device, kernel: Callable[..., None]) -> Callable[..., None]:
    """``kernel`` where its tensors are: a launch goes to the current device."""
    if device == _CPU or device.index == torch._C._cuda_getDevice():
        return kernel

    def elsewhere(*args: object) -> None:
        with torch.cuda.device(device):
            kernel(*args)

    return elsewhere


def _new(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def _prepared(spec: NormSpec) -> Any:
    """``spec`` as the kernels take it."""
    codes = (DTYPE_CODE[t] for t in (spec.x_dtype, spec.z_dtype, spec.y_dtype, spec.w_dtype))
    dropout = (dropout_threshold(spec.p), dropout_scale(spec.p))
    return _native.NormSpec(int(spec.kind), spec.zero_centered, spec.eps, *codes, *dropout, *spec.rows)


def norm_forward(
    x: Tensor,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    seed: Tensor | None,
    spec: NormSpec,
    *,
    store_z: bool,
    two_norms: bool = False,
    y_scale: Tensor | None = None,
    stacked: bool = False,
) -> NormOutputs:
    """See :func:`.reference.norm_forward`."""
    shards, shard_stride = 1, 0
    if stacked:
        shards, shard_stride, x = x.shape[0], x.stride(0), x[0]
    cols = x.shape[-1]
    rows = x.numel() // max(cols, 1)  # no columns at all is for the kernels to refuse
    device = x.device
    y = y2 = z = statistics = None
    if spec.kind != NormKind.NONE:
        y = _new(x, spec.y_dtype)
        count = 2 if spec.kind == NormKind.LAYER else 1
        statistics = torch.empty(count, rows, dtype=accumulation_dtype(x.dtype), device=device)
        if two_norms:
            y2 = _new(x, spec.y_dtype)
    if store_z:
        z = _new(x, spec.z_dtype)
    _at(device, _native.norm_forward)(
        *_place(device),
        _prepared(spec),
        rows,
        cols,
        x,
        shards,
        shard_stride,
        x_bias,
        row_scale,
        residual,
        weight,
        bias,
        weight2,
        bias2,
        seed,
        z,
        y,
        y2,
        y_scale,
        statistics,
    )
    return NormOutputs(y, y2, z, statistics)


@lru_cache(maxsize=4096)
def _workspace_size(
    is_cuda: bool, threads_or_margin: int, spec: NormSpec, rows: int, cols: int, wants: NormWants
) -> int:
    """Bytes for the partial sums of the vectors' gradients."""
    vectors = sum(1 << i for i, wanted in enumerate(wants[2:]) if wanted)
    size: int = _native.norm_backward_workspace(is_cuda, threads_or_margin, _prepared(spec), rows, cols, vectors)
    return size


def norm_backward(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    statistics: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    spec: NormSpec,
    wants: NormWants,
) -> NormGrads:
    """See :func:`.reference.norm_backward`."""
    like = dz if dz is not None else dy if dy is not None else dy2
    assert like is not None
    cols = like.shape[-1]
    rows = like.shape[:-1].numel()
    device = like.device
    dx = _new(like, spec.x_dtype) if wants.dx else None
    dresidual = _new(like, spec.z_dtype) if wants.dresidual else None
    vectors = [torch.empty(cols, dtype=spec.w_dtype, device=device) if wanted else None for wanted in wants[2:]]
    place = _place(device)
    size = _workspace_size(*place[:2], spec, rows, cols, wants)
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    _at(device, _native.norm_backward)(
        *place,
        _prepared(spec),
        rows,
        cols,
        dy,
        dy2,
        dz,
        z,
        statistics,
        row_scale,
        weight,
        weight2,
        seed,
        dx,
        dresidual,
        *vectors,
        workspace,
    )
    return NormGrads(dx, dresidual, *vectors)


def reduce_shards(parts: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """See :func:`.reference.reduce_shards`."""
    count, rows, cols = parts.shape
    if out is None:
        out = torch.empty((rows, cols), dtype=parts.dtype, device=parts.device)
    _at(parts.device, _native.reduce_shards)(
        *_place(parts.device),
        rows,
        cols,
        count,
        DTYPE_CODE[parts.dtype],
        DTYPE_CODE[parts.dtype if bias is None else bias.dtype],
        parts,
        parts.stride(0),
        parts.stride(1),
        bias,
        out,
    )
    return out
