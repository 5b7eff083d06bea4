"""The functions of :mod:`.grouped_matmul` in Triton, one launch each: any number of rows in a run, any row stride.

For dtypes and strides that PyTorch's grouped kernel does not take. A row dimension of a matrix may have any stride, the
other is contiguous; of a weight [E, N, K] either of the two is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import triton_gemm, triton_grouped_kernel
from .triton_config import LAUNCH
from .triton_gemm_config import GemmTile
from .triton_interpreter import as_on_a_gpu

rows_kernel = as_on_a_gpu(triton_grouped_kernel.rows_kernel)
weight_kernel = as_on_a_gpu(triton_grouped_kernel.weight_kernel)
#: Of x, and of everything beside it.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_HALF = GemmTile(128, 128, 64, 8, 3), GemmTile(64, 128, 32, 4, 4)
_TF32 = GemmTile(64, 64, 32, 4, 3)
_IEEE = GemmTile(64, 64, 16, 8, 3)  # without tensor cores arithmetic is the bound for every tile
unavailable = triton_gemm.unavailable


def takes(weight: Tensor, *matrices: Tensor) -> bool:
    """Whether the kernels take these: a weight [E, N, K] and matrices, on one device in one dtype."""
    same = all(t.dtype == weight.dtype for t in matrices) and weight.dtype in DTYPES
    return same and 1 in weight.stride()[1:] and all(t.stride(1) == 1 for t in matrices)


def grouped_matmul(
    x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``x @ weight[e].T + bias[e]`` for the rows of run e, accumulated in fp32 and rounded once.

    Arguments as in :func:`.grouped_matmul.grouped_matmul`, for which :func:`takes` is true; ``bias`` is contiguous.
    """
    n, k = weight.shape[1:]
    out = x.new_empty(x.shape[0], n) if out is None else out
    tile, precision = _tile(x.dtype, counts), _precision(x.dtype)
    strips = [
        (e, row, min(row + tile.rows, end))
        for e, (start, end) in enumerate(itertools.pairwise(_ends(counts)))
        for row in range(start, end, tile.rows)
    ]
    if not strips or not n:
        return out
    table = torch.tensor(strips, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        rows_kernel[(len(strips), -(-n // tile.cols))](
            x, weight, bias, out, table, n, k, x.stride(0), *weight.stride(), 0 if bias is None else bias.stride(0),
            out.stride(0), k % tile.depth == 0, precision, tile.rows, tile.cols, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, **LAUNCH,
        )  # fmt: skip
    return out


def grouped_weight_gradient(dy: Tensor, x: Tensor, counts: Sequence[int], weight: Tensor) -> Tensor:
    """``dy.T @ x`` over the rows of each run, accumulated in fp32, laid out in memory as ``weight``."""
    out = torch.empty_like(weight)
    (experts, n, k), tile = weight.shape, _tile(x.dtype, [min(weight.shape[1:])])
    if not weight.numel():
        return out
    ends = torch.tensor(_ends(counts), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        weight_kernel[(-(-n // tile.rows) * -(-k // tile.cols), experts)](
            dy, x, out, ends, n, k, dy.stride(0), x.stride(0), *out.stride(), _precision(x.dtype),
            tile.rows, tile.cols, tile.depth, num_warps=tile.warps, num_stages=tile.stages, **LAUNCH,
        )  # fmt: skip
    return out


def _ends(counts: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)]


def _precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied in fp32, or as TF32 where ``torch.backends.cuda.matmul`` allows it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _tile(dtype: torch.dtype, counts: Sequence[int]) -> GemmTile:
    """The large one where the runs that have rows fill it, on average."""
    if dtype.itemsize == 4:
        return _TF32 if _precision(dtype) == "tf32" else _IEEE
    some = [count for count in counts if count]
    return _HALF[0] if some and sum(some) >= _HALF[0].rows * len(some) else _HALF[1]
