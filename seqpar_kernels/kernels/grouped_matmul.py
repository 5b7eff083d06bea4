"""Matmuls of consecutive rows with a weight for each run of rows: the experts of a mixture.

Row runs are given by ``counts`` on the host, which whoever exchanges tokens knows already: no weight is read for a run
without rows, nothing is padded, and there is no [tokens, experts] one-hot.

On CUDA that is one launch: of PyTorch's own grouped kernel in bfloat16, where it takes the strides, else and for
weights' gradients of ours in Triton (:mod:`.triton_grouped`; 16 bit and fp32). On a CPU, in fp64 and without Triton it
is one matmul a run. The PyTorch kernel leaves rows behind the last run as they were in memory: here every row belongs
to a run.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .spec import accumulation_dtype
from .weight_gradient import add_weight_gradient

_ALIGNMENT = 16  # bytes: of every row and of the first one, for PyTorch's grouped kernel


def grouped_matmul(
    x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``x @ weight[e].T + bias[e]`` for the ``counts[e]`` rows of run e.

    Args:
        x: [R, K], the rows of run 0, then those of run 1, ...
        weight: [E, N, K], any strides.
        counts: rows of each run, E numbers whose sum is R.
        bias: [E, N].
        out: [R, N], where the result is to be written.

    Returns:
        [R, N], accumulated in fp32 (fp64) and rounded once; with ``bias`` once more.
    """
    if x.shape[0] and one_launch(x, weight):
        made = torch._grouped_mm(x, weight.transpose(1, 2), offs=_ends(counts, x.device))
        for e, run in _runs(counts) if bias is not None else ():
            assert bias is not None
            made[run] += bias[e]
        return made if out is None else out.copy_(made)
    kernels = triton_kernels(weight, *(t for t in (x, bias, out) if t is not None))
    if kernels is not None:
        return kernels.grouped_matmul(x, weight, counts, bias, out=out)  # type: ignore[no-any-return]
    out = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    for e, run in _runs(counts):
        if bias is None:
            torch.mm(x[run], weight[e].t(), out=out[run])
        else:
            torch.addmm(bias[e], x[run], weight[e].t(), out=out[run])
    return out


def grouped_weight_gradient(dy: Tensor, x: Tensor, counts: Sequence[int], weight: Tensor) -> Tensor:
    """``dy.T @ x`` over the rows of each run: the gradient of ``weight``, laid out in memory as that is.

    Args:
        dy: [R, N].
        x: [R, K].
        counts: rows of each run, as in :func:`grouped_matmul`.
        weight: [E, N, K]; the gradient of a run without rows is 0.
    """
    kernels = triton_kernels(weight, dy, x)
    if kernels is not None:
        return kernels.grouped_weight_gradient(dy, x, counts, weight)  # type: ignore[no-any-return]
    out = torch.empty_like(weight)
    if not out.transpose(1, 2).is_contiguous() or out.is_contiguous():
        first, second = dy, x
        target = out
    else:  # [E, K, N] in memory: its products are written without a transposed copy
        first, second, target = x, dy, out.transpose(1, 2)
    start = 0
    for e, count in enumerate(counts):
        run = slice(start, start + count)
        if count:
            torch.mm(first[run].t(), second[run], out=target[e])
        else:
            target[e].zero_()
        start += count
    return out


def add_grouped_weight_gradient(main_grad: Tensor, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    """main_grad [E, N, K] += ``dy.T @ x`` over the rows of each run; products and sums in main_grad's dtype."""
    for e, run in _runs(counts):
        add_weight_gradient(main_grad[e], dy[run], x[run])


def grouped_row_sums(dy: Tensor, counts: Sequence[int], weights: Tensor | None = None) -> Tensor:
    """Sums of the rows of each run: the gradient of a bias.

    Args:
        dy: [R, N].
        counts: rows of each run.
        weights: [R] in the accumulation dtype: of the rows in the sum.

    Returns:
        [E, N] in fp32 (fp64).
    """
    wide = accumulation_dtype(dy.dtype)
    out = torch.zeros(len(counts), dy.shape[1], dtype=wide, device=dy.device)
    for e, run in _runs(counts):
        if weights is None:
            torch.sum(dy[run], 0, dtype=wide, out=out[e])
        else:
            torch.mv(dy[run].to(wide).t(), weights[run], out=out[e])
    return out


def one_matmul_a_run(x: Tensor) -> bool:
    """Whether nothing is gained from several runs in one call."""
    return x.is_cpu


def one_launch(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped kernel takes these and is the faster way: 16-bit tensors on CUDA with aligned rows."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or weight.dtype != x.dtype:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and all(map(_aligned, (x, weight)))


def triton_kernels(weight: Tensor, *matrices: Tensor) -> Any:
    """:mod:`.triton_grouped` where its kernels take these: on CUDA, in a dtype and with strides that they know."""
    module = _triton_module() if weight.is_cuda else None
    if module is None or module.unavailable(weight.device) is not None or not module.takes(weight, *matrices):
        return None
    return module


@cache
def _triton_module() -> Any:
    """None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(".triton_grouped", __package__)


def _aligned(t: Tensor) -> bool:
    """Whether one dimension is contiguous and the others begin at multiples of 16 bytes."""
    size = t.element_size()
    inner = list(t.stride()[-2:])
    return (
        t.data_ptr() % _ALIGNMENT == 0
        and min(inner) == 1
        and max(inner) * size % _ALIGNMENT == 0
        and all(stride * size % _ALIGNMENT == 0 for stride in t.stride()[:-2])
    )


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device=device)


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Index and rows of each run that has rows."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count
