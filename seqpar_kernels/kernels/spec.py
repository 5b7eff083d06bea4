"""What a kernel is asked to do, in one value that every backend takes."""

import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class NormKind(IntEnum):
    """Which normalisation follows the residual add; the numbers are those of ``csrc/seqpar.h``."""

    NONE = 0
    LAYER = 1
    RMS = 2


class RowMap(NamedTuple):
    """Local row ``r`` is row ``(r // block) * stride + r % block + offset`` of the unsharded tensor."""

    block: int
    stride: int
    offset: int


class NormSpec(NamedTuple):
    """The scalars of one dropout + add + norm; tensors travel beside it."""

    kind: NormKind
    zero_centered: bool
    eps: float
    p: float
    rows: RowMap
    x_dtype: torch.dtype
    z_dtype: torch.dtype  # residual, z and their gradients
    y_dtype: torch.dtype
    w_dtype: torch.dtype  # every [cols] vector and its gradient


class NormOutputs(NamedTuple):
    """``y``, ``y2``, ``z``: [rows, cols] or as x came; None where not asked for.

    ``statistics``: [2, rows], mean and rstd, of a LayerNorm; [1, rows], rstd, of an RMSNorm.
    """

    y: Tensor | None
    y2: Tensor | None
    z: Tensor | None
    statistics: Tensor | None


class NormWants(NamedTuple):
    """Which gradients the backward has to produce."""

    dx: bool = True
    dresidual: bool = False
    dweight: bool = False
    dbias: bool = False
    dweight2: bool = False
    dbias2: bool = False
    dx_bias: bool = False


class NormGrads(NamedTuple):
    """dx, dresidual: [rows, cols] or as the gradients came; the rest: [cols]. None where not wanted."""

    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dweight2: Tensor | None
    dbias2: Tensor | None
    dx_bias: Tensor | None


def on_matrices(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """For a backend that thinks in [rows, cols]: contiguous [..., cols] reach it as views; a stack as it is."""

    @functools.wraps(kernel)
    def run(first: Tensor | None, *args: Any, stacked: bool = False, **options: Any) -> Any:
        flat = [t.view(-1, t.shape[-1]) if isinstance(t, Tensor) and t.dim() > 2 else t for t in (first, *args)]
        if stacked:
            flat[0] = first
        return kernel(*flat, **options)

    return run


def as_matrix(t: Tensor | None) -> Tensor | None:
    """[..., H] as kernels take it; copies only where strides leave no other way. Rows may overlap: they are read."""
    if t is None or t.is_contiguous():
        return t
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def as_parts(parts: Tensor) -> Tensor:
    """[shards, rows, cols] as kernels take it."""
    return parts if parts.stride(2) == 1 or parts.shape[2] == 1 else parts.contiguous()


def as_vector(t: Tensor | None) -> Tensor | None:
    """[H] as kernels take it."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def dropout_threshold(p: float) -> int:
    """An element is kept where its 16 random bits, as an unsigned integer, are >= this (0..65536)."""
    return round(p * 65536)


def dropout_scale(p: float) -> float:
    """The factor of a kept element; 0 at p = 1, where none is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic and statistics: fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
