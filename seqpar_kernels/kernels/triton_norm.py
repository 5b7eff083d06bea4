"""The Triton kernels on torch tensors. Same functions, same arguments as :mod:`.reference`.

On CUDA tensors; on CPU tensors too where ``TRITON_INTERPRET=1`` was set before this module was first imported.
"""

import struct
from functools import cache, lru_cache

import torch
import triton.language as tl
from torch import Tensor

from . import NormGiven, NormGrads, NormOutputs, RowMap, triton_norm_backward, triton_norm_forward, triton_reduce
from .spec import (
    ONLY_Z,
    NormKind,
    NormSpec,
    NormStores,
    NormTensors,
    NormWants,
    accumulation_dtype,
    as_matrices,
    as_parts,
    dropout_scale,
    dropout_threshold,
)
from .triton_config import LAUNCH, PARTIALS, backward_tile, forward_tile, shards_tile
from .triton_interpreter import as_on_a_gpu, interpreted, rounds

_INTERPRETED = interpreted(triton_norm_forward.norm_forward_kernel)
norm_forward_kernel = as_on_a_gpu(triton_norm_forward.norm_forward_kernel)
norm_forward_chunked_kernel = as_on_a_gpu(triton_norm_forward.norm_forward_chunked_kernel)
norm_backward_kernel = as_on_a_gpu(triton_norm_backward.norm_backward_kernel)
norm_backward_chunked_kernel = as_on_a_gpu(triton_norm_backward.norm_backward_chunked_kernel)
sum_partials_kernel = as_on_a_gpu(triton_norm_backward.sum_partials_kernel)
reduce_shards_kernel = as_on_a_gpu(triton_reduce.reduce_shards_kernel)
_INTERPRETED_MULTIPROCESSORS = 2  # enough for partial sums to reduce, few enough to interpret
_ACC = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
}

#: Multiprocessors the backward's persistent grid leaves free for communication running beside it.
sm_margin = 0


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``; None when they can."""
    if device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        return "the Triton kernels need compute capability 8.0 or newer"
    if device.type == "cpu":
        return None if _INTERPRETED else "Triton runs on the CPU only where TRITON_INTERPRET=1 was set before import"
    return f"there are Triton kernels for cuda, not for {device.type}"


def remark(device: torch.device) -> str | None:
    """What there is to say of these kernels where they run on ``device``."""
    if device.type == "cuda":
        return None
    return (
        "interpreted, rounding as a GPU does"
        if rounds()
        else "interpreted; bfloat16 is truncated, not rounded as on a GPU"
    )


@lru_cache(maxsize=256)
def _dropout(p: float) -> tuple[int, int]:
    """Threshold, and the bits of the scale as a double (see :func:`.triton_philox.dropout`)."""
    return dropout_threshold(p), struct.unpack("<q", struct.pack("<d", dropout_scale(p)))[0]


def _positive_block(row_map: RowMap) -> RowMap:
    return row_map if row_map.block > 0 else row_map._replace(block=1)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


@cache
def _slots(wants: NormWants, dy: bool, dy2: bool) -> tuple[tuple[int, ...], int]:
    """Slot of each vector gradient in the partial sums, and how many slots there are.

    -1 for one not wanted, -2 for one that nothing flows into, which is zero.
    """
    slots, count = [], 0
    for wanted, flows in zip(wants[2:], (dy, dy, dy2, dy2, True), strict=True):
        slots.append(count if wanted and flows else -2 if wanted else -1)
        count += wanted and flows
    return tuple(slots), count


def _mean_and_rstd(statistics: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if statistics is None:
        return None, None
    return statistics[0] if len(statistics) == 2 else None, statistics[-1]


def norm_forward(
    tensors: NormTensors, spec: NormSpec, stores: NormStores = ONLY_Z, *, stacked: bool = False
) -> NormOutputs:
    """See :func:`.reference.norm_forward`."""
    tensors = as_matrices(tensors, stacked=stacked)
    x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale, seed = tensors
    rows, cols = x.shape[-2:]
    shards, shard_stride = (x.shape[0], x.stride(0)) if stacked else (1, 0)
    device = x.device
    y = y2 = z = statistics = mean = rstd = None
    if spec.kind != NormKind.NONE:
        stats_dtype = accumulation_dtype(x.dtype)
        y = torch.empty((rows, cols), dtype=spec.y_dtype, device=device)
        statistics = torch.empty((1 + (spec.kind == NormKind.LAYER), rows), dtype=stats_dtype, device=device)
        mean, rstd = _mean_and_rstd(statistics)
        if stores.two_norms:
            y2 = torch.empty((rows, cols), dtype=spec.y_dtype, device=device)
    if stores.store_z:
        z = torch.empty((rows, cols), dtype=spec.z_dtype, device=device)
    if rows:
        tile = forward_tile(cols, max(x.dtype.itemsize, spec.z_dtype.itemsize))
        kernel = norm_forward_kernel if tile.held else norm_forward_chunked_kernel
        with torch.cuda.device_of(x):
            kernel[(-(-rows // tile.rows),)](
                x, x_bias, row_scale, residual, seed, weight, bias, weight2, bias2, y_scale, z, y, y2, mean, rstd,
                x.stride(-2), shard_stride, _stride(residual), rows, cols, *_dropout(spec.p),
                *_positive_block(spec.rows), int(spec.kind), spec.zero_centered, spec.eps, _ACC[x.dtype], shards,
                tile.rows, tile.block, tile.early, num_warps=tile.warps, **LAUNCH,
            )  # fmt: skip
    return NormOutputs(y, y2, z, statistics)


def norm_backward(tensors: NormGiven, spec: NormSpec, wants: NormWants) -> NormGrads:
    """See :func:`.reference.norm_backward`."""
    tensors = as_matrices(tensors)
    dy, dy2, dz, z, statistics, row_scale, weight, weight2, seed = tensors
    like = tensors.like()
    mean, rstd = _mean_and_rstd(statistics)
    rows, cols = like.shape
    device = like.device
    dx = torch.empty((rows, cols), dtype=spec.x_dtype, device=device) if wants.dx else None
    dresidual = torch.empty((rows, cols), dtype=spec.z_dtype, device=device) if wants.dresidual else None
    slots, count = _slots(wants, dy is not None, dy2 is not None)
    vectors = [
        (torch.empty if slot >= 0 and rows else torch.zeros)(cols, dtype=spec.w_dtype, device=device)
        if slot != -1
        else None
        for slot in slots
    ]
    if not rows:
        return NormGrads(dx, dresidual, *vectors)
    acc = accumulation_dtype(spec.x_dtype)
    kind = spec.kind if dy is not None or dy2 is not None else NormKind.NONE
    streamed = sum([t.element_size() for t in (dy, dy2, dz, z) if t is not None])
    tile = backward_tile(cols, max(spec.x_dtype.itemsize, spec.z_dtype.itemsize), streamed, count)
    tiles = -(-rows // tile.rows)
    programs = min(tiles, max(_multiprocessors(device) - sm_margin, 1) * tile.programs)
    partials = torch.empty((count, programs, cols), dtype=acc, device=device) if count else None
    kernel = norm_backward_kernel if tile.held else norm_backward_chunked_kernel
    with torch.cuda.device_of(like):
        kernel[(programs,)](
            dy, dy2, dz, z, mean, rstd, row_scale, seed, weight, weight2, dx, dresidual, partials,
            _stride(dy), _stride(dy2), _stride(dz), _stride(z), rows, cols, *_dropout(spec.p),
            *_positive_block(spec.rows), *slots, int(kind), spec.zero_centered, _ACC[spec.x_dtype],
            tile.rows, tile.block, tile.early, tile.stages, num_warps=tile.warps, **LAUNCH,
        )  # fmt: skip
        if count:
            out = [vector for vector, slot in zip(vectors, slots, strict=True) if slot >= 0]
            sum_partials_kernel[(-(-cols // PARTIALS.block), count)](
                partials, *out, *(None,) * (5 - count), programs, cols, PARTIALS.rows, PARTIALS.block,
                num_warps=PARTIALS.warps, **LAUNCH,
            )  # fmt: skip
    return NormGrads(dx, dresidual, *vectors)


def reduce_shards(parts: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """See :func:`.reference.reduce_shards`."""
    count, rows, cols = parts.shape
    parts = as_parts(parts)
    if out is None:
        out = torch.empty((rows, cols), dtype=parts.dtype, device=parts.device)
    if rows:
        tile = shards_tile(cols)
        with torch.cuda.device_of(parts):
            reduce_shards_kernel[(-(-rows // tile.rows) * -(-cols // tile.block),)](
                parts, bias, out, parts.stride(0), parts.stride(1), out.stride(0), rows, cols,
                count, _ACC[parts.dtype], tile.rows, tile.block, num_warps=tile.warps, **LAUNCH,
            )  # fmt: skip
    return out
