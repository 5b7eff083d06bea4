"""``seqpar::dropout_add_norm``: schema, fake and autograd of the fused dropout + residual + norm."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import NormKind, NormSpec, NormWants, RowMap, select
from ..kernels.spec import accumulation_dtype
from ..overlap.pipeline import reshaped, rows_of
from .library import apply, plain, register

_TENSORS = 10  # leading arguments of the forward that are tensors
SCALARS = (
    "int kind, bool zero_centered, float eps, float p, SymInt block, SymInt stride, SymInt offset, "
    "ScalarType z_dtype, ScalarType y_dtype, ScalarType w_dtype, str backend"
)


class NormScalars(NamedTuple):
    """The forward's arguments after its tensors, in the order of its schema; from ``kind`` on the backward's too."""

    store_z: bool
    two_norms: bool
    kind: int
    zero_centered: bool
    eps: float
    p: float
    block: int
    stride: int
    offset: int
    z_dtype: torch.dtype  # that of x where z is x
    y_dtype: torch.dtype
    w_dtype: torch.dtype
    backend: str


@functools.lru_cache(maxsize=4096)
def prepared(device: torch.device, x_dtype: torch.dtype, scalars: tuple[Any, ...]) -> tuple[ModuleType, NormSpec]:
    """Who computes, and what; ``scalars`` from ``kind`` on."""
    kind, zero_centered, eps, p, block, stride, offset, z_dtype, y_dtype, w_dtype, backend = scalars
    rows = RowMap(int(block), int(stride), int(offset))
    spec = NormSpec(NormKind(kind), zero_centered, eps, p, rows, x_dtype, z_dtype, y_dtype, w_dtype)
    return select(backend, device), spec


def as_matrix(t: Tensor | None) -> Tensor | None:
    """[..., H] as kernels take it; copies only where strides leave no other way."""
    if t is None or t.is_contiguous():
        return t
    t = rows_of(t)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def as_vector(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def shaped(results: Iterable[Tensor | None], shape: torch.Size) -> list[Tensor]:
    """Those there are, in ``shape``: kernels that saw another shape return another shape."""
    return [t if t.shape == shape else reshaped(t, shape) for t in results if t is not None]


# --- forward ---------------------------------------------------------------------------------------------------------


def _compute(tensors: Sequence[Tensor | None], scalars: tuple[Any, ...]) -> list[Tensor]:
    """The forward on plain tensors. Small calls live and die by its host time: nothing is done twice."""
    x, residual = tensors[:2]
    assert x is not None
    vectors = [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors[2:8]]
    weight, bias, weight2, bias2, x_bias, row_scale = vectors
    store_z, two_norms = scalars[:2]
    backend, spec = prepared(x.device, x.dtype, scalars[2:])
    out = backend.norm_forward(
        as_matrix(x),
        x_bias,
        row_scale,
        as_matrix(residual),
        weight,
        bias,
        weight2,
        bias2,
        tensors[9],
        spec,
        store_z=store_z,
        two_norms=two_norms,
        y_scale=tensors[8],
    )
    full = shaped(out[:3], x.shape)
    return full if out.statistics is None else [*full, out.statistics]


def _forward_kernel(*args: Any) -> list[Tensor]:
    return _compute(args[:_TENSORS], args[_TENSORS:])


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    y_scale: Tensor | None,
    seed: Tensor | None,
    store_z: bool,
    two_norms: bool,
    kind: int,
    *scalars: Any,
) -> list[Tensor]:
    z_dtype, y_dtype = scalars[-4:-2]
    rows = x.numel() // x.shape[-1]
    out = []
    if kind != NormKind.NONE:
        out += [x.new_empty(x.shape, dtype=y_dtype) for _ in range(2 if two_norms else 1)]
    if store_z:
        out.append(x.new_empty(x.shape, dtype=z_dtype))
    if kind != NormKind.NONE:
        out.append(x.new_empty((2 if kind == NormKind.LAYER else 1, rows), dtype=accumulation_dtype(x.dtype)))
    return out


class _DropoutAddNorm(torch.autograd.Function):
    """Keeps z (or x, when they are the same), the statistics and the seed; no mask, no norm output."""

    @staticmethod
    def forward(ctx: Any, scalars: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, residual, weight, _bias, weight2, _bias2, _x_bias, row_scale, _y_scale, seed = tensors
        assert x is not None
        out = _compute(tensors, scalars) if plain(tensors) else dropout_add_norm.below_autograd(*tensors, *scalars)
        store_z, two_norms, kind = scalars[:3]
        z = statistics = None
        if kind != NormKind.NONE:
            z = out[two_norms + 1] if store_z else x
            statistics = out[-1]
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, statistics, row_scale, weight, weight2, seed)
        ctx.call = scalars, x.dtype, residual is not None
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (store_z, two_norms, kind, *rest), x_dtype, has_residual = ctx.call
        z, statistics, row_scale, weight, weight2, seed = ctx.saved_tensors
        dy = dy2 = dz = None
        if kind != NormKind.NONE:
            dy, dy2 = grads[0], grads[1] if two_norms else None
        if store_z:
            dz = grads[two_norms + (kind != NormKind.NONE)]
        _, *needs = ctx.needs_input_grad
        if dy is None and dy2 is None and dz is None:
            return (None,) * (1 + len(needs))
        z_dtype = rest[-4]
        # g and dx are one tensor where nothing stands between them: then one is computed and handed out twice.
        same = seed is None and row_scale is None and z_dtype == x_dtype
        wants_residual = has_residual and needs[1]
        wants = [needs[0] or (same and wants_residual), wants_residual and not same, *needs[2:7]]
        saved = (z, statistics, row_scale, weight, weight2, seed)
        out = iter(dropout_add_norm_backward(dy, dy2, dz, *saved, wants, x_dtype, kind, *rest))
        dx, dresidual, *vectors = [next(out) if want else None for want in wants]
        if same and wants_residual:
            dresidual = dx
        return (None, dx if needs[0] else None, dresidual, *vectors, None, None, None)


def _forward_autograd(*args: Any) -> list[Tensor]:
    """Scalars travel as one argument: autograd looks at every argument it is given."""
    return list(apply(_DropoutAddNorm, args[_TENSORS:], *args[:_TENSORS]))


# --- backward --------------------------------------------------------------------------------------------------------


def _like(*grads: Tensor | None) -> Tensor:
    """The first gradient that came: all have the shape of x."""
    return next(grad for grad in grads if grad is not None)


def _backward_kernel(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    statistics: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    wants: list[bool],
    x_dtype: torch.dtype,
    *scalars: Any,
) -> list[Tensor]:
    like = _like(dy, dy2, dz)
    backend, spec = prepared(like.device, x_dtype, scalars)
    grads = backend.norm_backward(
        as_matrix(dy),
        as_matrix(dy2),
        as_matrix(dz),
        as_matrix(z),
        statistics,
        as_vector(row_scale),
        as_vector(weight),
        as_vector(weight2),
        seed,
        spec,
        NormWants(*wants),
    )
    return shaped(grads[:2], like.shape) + [t for t in grads[2:] if t is not None]


def _backward_fake(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    statistics: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    wants: list[bool],
    x_dtype: torch.dtype,
    *scalars: Any,
) -> list[Tensor]:
    z_dtype, w_dtype = scalars[-4], scalars[-2]
    like = _like(dy, dy2, dz)
    out = [
        like.new_empty(like.shape, dtype=dtype) for dtype, want in zip((x_dtype, z_dtype), wants, strict=False) if want
    ]
    return out + [like.new_empty(like.shape[-1], dtype=w_dtype) for want in wants[2:] if want]


#: Returns, in this order and only where they exist: y, y2, z, statistics.
dropout_add_norm = register(
    "dropout_add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? weight2, Tensor? bias2, "
    "Tensor? x_bias, Tensor? row_scale, Tensor? y_scale, Tensor? seed, bool store_z, bool two_norms, "
    f"{SCALARS}) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
    _forward_autograd,
)

#: Returns the wanted ones among dx, dresidual, dweight, dbias, dweight2, dbias2, dx_bias.
dropout_add_norm_backward = register(
    "dropout_add_norm_backward(Tensor? dy, Tensor? dy2, Tensor? dz, Tensor? z, Tensor? statistics, "
    "Tensor? row_scale, Tensor? weight, Tensor? weight2, Tensor? seed, bool[] wants, ScalarType x_dtype, "
    f"{SCALARS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)
