"""``seqpar::dropout_add_norm``: schema, fake and autograd of the fused dropout + residual + norm."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels import NormKind, NormSpec, NormWants, RowMap, select
from ..kernels.spec import accumulation_dtype
from ..overlap.pipeline import reshaped, rows_of
from .library import register

_SCALARS = (
    "int kind, bool zero_centered, float eps, float p, SymInt block, SymInt stride, SymInt offset, "
    "ScalarType z_dtype, ScalarType w_dtype, str backend"
)


_TENSORS = 9  # leading arguments of the forward that are tensors


@functools.lru_cache(maxsize=4096)
def _spec(
    x_dtype: torch.dtype,
    kind: int,
    zero_centered: bool,
    eps: float,
    p: float,
    block: int,
    stride: int,
    offset: int,
    z_dtype: torch.dtype,
    w_dtype: torch.dtype,
) -> NormSpec:
    rows = RowMap(int(block), int(stride), int(offset))
    return NormSpec(NormKind(kind), zero_centered, eps, p, rows, x_dtype, z_dtype, x_dtype, w_dtype)


def _matrix(t: Tensor | None) -> Tensor | None:
    """[..., H] as [rows, H] with contiguous columns; copies only where strides leave no other way."""
    if t is None:
        return None
    t = rows_of(t)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward_kernel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    store_z: bool,
    two_norms: bool,
    *scalars: Any,
) -> list[Tensor]:
    spec = _spec(x.dtype, *scalars[:-1])
    matrix = _matrix(x)
    assert matrix is not None
    out = select(scalars[-1], x.device).norm_forward(
        matrix,
        _vector(x_bias),
        _vector(row_scale),
        _matrix(residual),
        _vector(weight),
        _vector(bias),
        _vector(weight2),
        _vector(bias2),
        seed,
        spec,
        store_z=store_z,
        two_norms=two_norms,
    )
    full = [reshaped(t, x.shape) for t in (out.y, out.y2, out.z) if t is not None]
    return full + [t for t in (out.mean, out.rstd) if t is not None]


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    store_z: bool,
    two_norms: bool,
    kind: int,
    *scalars: Any,
) -> list[Tensor]:
    z_dtype = scalars[-3]
    rows = x.numel() // x.shape[-1]
    stats_dtype = accumulation_dtype(x.dtype)
    out = []
    if kind != NormKind.NONE:
        out += [x.new_empty(x.shape) for _ in range(2 if two_norms else 1)]
    if store_z:
        out.append(x.new_empty(x.shape, dtype=z_dtype))
    if kind == NormKind.LAYER:
        out.append(x.new_empty(rows, dtype=stats_dtype))
    if kind != NormKind.NONE:
        out.append(x.new_empty(rows, dtype=stats_dtype))
    return out


class _DropoutAddNorm(torch.autograd.Function):
    """Keeps z (or x, when they are the same), the statistics and the seed; no mask, no norm output."""

    @staticmethod
    def forward(ctx: Any, scalars: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, residual, weight, _bias, weight2, _bias2, _x_bias, row_scale, seed = tensors
        assert x is not None
        out = dropout_add_norm.below_autograd(*tensors, *scalars)
        store_z, two_norms, kind, *rest = scalars
        statistics = out[{NormKind.NONE: len(out), NormKind.LAYER: -2, NormKind.RMS: -1}[NormKind(kind)] :]
        z: Any = None
        if kind != NormKind.NONE:
            z = out[-1 - len(statistics)] if store_z else x
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        mean = statistics[0] if kind == NormKind.LAYER else None
        rstd = statistics[-1] if statistics else None
        ctx.save_for_backward(z, mean, rstd, row_scale, weight, weight2, seed)
        ctx.has_residual, ctx.store_z, ctx.two_norms = residual is not None, store_z, two_norms
        ctx.x_dtype, ctx.kind, ctx.scalars = x.dtype, kind, rest
        ctx.z_dtype = x.dtype if z is x else rest[-3]
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        z, mean, rstd, row_scale, weight, weight2, seed = ctx.saved_tensors
        pending = list(grads)
        dy = pending.pop(0) if ctx.kind != NormKind.NONE else None
        dy2 = pending.pop(0) if ctx.two_norms else None
        dz = pending.pop(0) if ctx.store_z else None
        needs = ctx.needs_input_grad[1:]
        if dy is None and dy2 is None and dz is None:
            return (None,) * (1 + len(needs))
        # g and dx are one tensor where nothing stands between them: then one is computed and handed out twice.
        same = seed is None and row_scale is None and ctx.z_dtype == ctx.x_dtype
        wants_residual = ctx.has_residual and needs[1]
        wants = NormWants(
            dx=needs[0] or (same and wants_residual),
            dresidual=wants_residual and not same,
            dweight=needs[2],
            dbias=needs[3],
            dweight2=needs[4],
            dbias2=needs[5],
            dx_bias=needs[6],
        )
        scalars = list(ctx.scalars)
        scalars[-3] = ctx.z_dtype
        out = iter(
            dropout_add_norm_backward(
                dy,
                dy2,
                dz,
                z,
                mean,
                rstd,
                row_scale,
                weight,
                weight2,
                seed,
                list(wants),
                ctx.x_dtype,
                ctx.kind,
                *scalars,
            )
        )
        got = [next(out) if want else None for want in wants]
        if same and wants_residual:
            got[1] = got[0]
        dx, dresidual, dweight, dbias, dweight2, dbias2, dx_bias = got
        vectors = (dweight, dbias, dweight2, dbias2, dx_bias)
        return (None, dx if needs[0] else None, dresidual, *vectors, None, None)


def _forward_autograd(*args: Any) -> list[Tensor]:
    """Scalars travel as one argument: autograd looks at every argument it is given."""
    return list(_DropoutAddNorm.apply(args[_TENSORS:], *args[:_TENSORS]))


# --- backward --------------------------------------------------------------------------------------------------------


def _backward_kernel(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    wants: list[bool],
    x_dtype: torch.dtype,
    *scalars: Any,
) -> list[Tensor]:
    spec = _spec(x_dtype, *scalars[:-1])
    like = next(t for t in (dz, dy, dy2) if t is not None)
    grads = select(scalars[-1], like.device).norm_backward(
        _matrix(dy),
        _matrix(dy2),
        _matrix(dz),
        _matrix(z),
        mean,
        rstd,
        _vector(row_scale),
        _vector(weight),
        _vector(weight2),
        seed,
        spec,
        NormWants(*wants),
    )
    full = [reshaped(t, like.shape) for t in grads[:2] if t is not None]
    return full + [t for t in grads[2:] if t is not None]


def _backward_fake(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    wants: list[bool],
    x_dtype: torch.dtype,
    *scalars: Any,
) -> list[Tensor]:
    z_dtype, w_dtype = scalars[-3], scalars[-2]
    like = next(t for t in (dz, dy, dy2) if t is not None)
    out = [
        like.new_empty(like.shape, dtype=dtype) for dtype, want in zip((x_dtype, z_dtype), wants, strict=False) if want
    ]
    return out + [like.new_empty(like.shape[-1], dtype=w_dtype) for want in wants[2:] if want]


#: Returns, in this order and only where they exist: y, y2, z, mean, rstd.
dropout_add_norm = register(
    "dropout_add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? weight2, Tensor? bias2, "
    f"Tensor? x_bias, Tensor? row_scale, Tensor? seed, bool store_z, bool two_norms, {_SCALARS}) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
    _forward_autograd,
)

#: Returns the wanted ones among dx, dresidual, dweight, dbias, dweight2, dbias2, dx_bias.
dropout_add_norm_backward = register(
    "dropout_add_norm_backward(Tensor? dy, Tensor? dy2, Tensor? dz, Tensor? z, Tensor? mean, Tensor? rstd, "
    "Tensor? row_scale, Tensor? weight, Tensor? weight2, Tensor? seed, bool[] wants, ScalarType x_dtype, "
    f"{_SCALARS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)
