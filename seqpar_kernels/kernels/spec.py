"""What a kernel is asked to do, declared once: the values that every layer from the public function to a backend takes.

A norm's call is three values: the tensors it reads, the outputs it stores (the gradients it makes), and the scalars.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor


class NormKind(IntEnum):
    """Which normalisation follows the residual add; the numbers are those of ``csrc/seqpar.h``."""

    NONE = 0
    LAYER = 1
    RMS = 2

    __hash__ = int.__hash__  # Enum's own is Python code, and a call of the norm is looked up by its kind


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

    def flat(self) -> tuple[Any, ...]:
        """The scalars one by one, as an op takes them."""
        kind, zero_centered, eps, p, rows, *dtypes = self
        return (int(kind), zero_centered, eps, p, *rows, *dtypes)

    @classmethod
    def from_flat(cls, scalars: Sequence[Any]) -> "NormSpec":
        """The inverse of :meth:`flat`."""
        kind, zero_centered, eps, p, block, stride, offset, *dtypes = scalars
        return cls(NormKind(kind), zero_centered, eps, p, RowMap(block, stride, offset), *dtypes)


class NormTensors(NamedTuple):
    """What a forward reads, in the order of the op's arguments.

    x, residual: [..., cols]. row_scale: float32, one number a row. y_scale: float32, one element. seed: int64, 0-d;
    None drops nothing. The others: [cols].
    """

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    x_bias: Tensor | None = None
    row_scale: Tensor | None = None
    y_scale: Tensor | None = None
    seed: Tensor | None = None

    def readable(self, *, stacked: bool = False) -> "NormTensors":
        """As kernels take them: rows with adjacent columns, contiguous vectors; a stack x stays what it is."""
        x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale, seed = self
        rows = (x if stacked else as_matrix(x), as_matrix(residual))
        vectors = map(as_vector, (weight, bias, weight2, bias2, x_bias, row_scale))
        return NormTensors._make((*rows, *vectors, y_scale, seed))


class NormStores(NamedTuple):
    """Which outputs the forward stores beside the first norm."""

    store_z: bool = True
    two_norms: bool = False


ONLY_Z = NormStores()


class NormOutputs(NamedTuple):
    """``y``, ``y2``, ``z``: [rows, cols] or as x came; None where not asked for.

    ``statistics``: [2, rows], mean and rstd, of a LayerNorm; [1, rows], rstd, of an RMSNorm.
    """

    y: Tensor | None
    y2: Tensor | None
    z: Tensor | None
    statistics: Tensor | None


class NormGiven(NamedTuple):
    """What a backward reads, in the order of the op's arguments: gradients of y, y2 and z, then what was kept."""

    dy: Tensor | None = None
    dy2: Tensor | None = None
    dz: Tensor | None = None
    z: Tensor | None = None
    statistics: Tensor | None = None
    row_scale: Tensor | None = None
    weight: Tensor | None = None
    weight2: Tensor | None = None
    seed: Tensor | None = None

    def like(self) -> Tensor:
        """A gradient that came: all have the shape of x."""
        dy, dy2, dz = self[:3]
        found = dz if dz is not None else dy if dy is not None else dy2
        assert found is not None
        return found

    def readable(self) -> "NormGiven":
        """As kernels take them: rows with adjacent columns, contiguous vectors."""
        dy, dy2, dz, z, statistics, row_scale, weight, weight2, seed = self
        vectors = map(as_vector, (statistics, row_scale, weight, weight2))
        return NormGiven._make((*map(as_matrix, (dy, dy2, dz, z)), *vectors, seed))


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


class Backend(Protocol):
    """The functions of a module of kernels; :mod:`.reference` says what they compute."""

    def norm_forward(
        self, tensors: NormTensors, spec: NormSpec, stores: NormStores = ONLY_Z, *, stacked: bool = False
    ) -> NormOutputs: ...

    def norm_backward(self, tensors: NormGiven, spec: NormSpec, wants: NormWants) -> NormGrads: ...

    def reduce_shards(self, parts: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor: ...


Tensors = TypeVar("Tensors", NormTensors, NormGiven)


def as_matrices(tensors: Tensors, *, stacked: bool = False) -> Tensors:
    """For a backend that thinks in [rows, cols]: contiguous [..., cols] become views of that shape.

    With ``stacked`` the first stays what it is, [shards, rows, cols].
    """
    flat: list[Tensor | None] = [*tensors]
    for i, t in enumerate(flat):
        if t is not None and t.dim() > 2 and not (stacked and i == 0):
            flat[i] = t.view(-1, t.shape[-1])
    return type(tensors)._make(flat)


OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def as_matrix(t: OptionalTensor) -> OptionalTensor:
    """[..., H] as kernels take it; copies only where strides leave no other way. Rows may overlap: they are read."""
    if t is None or t.is_contiguous():
        return t
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def as_parts(parts: Tensor) -> Tensor:
    """[shards, rows, cols] as kernels take it."""
    return parts if parts.stride(2) == 1 or parts.shape[2] == 1 else parts.contiguous()


def as_vector(t: OptionalTensor) -> OptionalTensor:
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
