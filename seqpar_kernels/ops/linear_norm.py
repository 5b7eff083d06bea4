"""``seqpar::linear_reduce_scatter_dropout_add_norm``: a row-parallel linear whose reduction goes on to the next norm.

The kernel that sums the partial results of the ranks also adds bias and residual, drops and normalises, so the sum is
never written. Backward: that of the norm gives the gradient of the sum, that of the row-parallel linear does the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels import NormKind, NormWants
from ..kernels.spec import accumulation_dtype
from ..overlap import engines
from ..overlap.profiling import span
from ..tensors import rows_of
from .linear_common import PLACE
from .linear_scatter import scatter_gradients, scattered_shape
from .norm import SCALARS, as_matrix, as_vector, dropout_add_norm_backward, prepared, shaped
from .recompute import activate, activation_gradients
from .registry import group_named, register, without_autocast

_NAME = "linear_reduce_scatter_dropout_add_norm"
_TENSORS, _PLACES = 9, 5  # how many of the arguments are tensors, how many then say where


@without_autocast
def _kernel(
    x: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    gate: Tensor | None,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    activation: str,
    *scalars: Any,
) -> list[Tensor]:
    pg = group_named(group)
    if activation:
        x = activate(x, gate, activation)
    if pg is None:
        summed = rows_of(torch.nn.functional.linear(x, weight))
    else:
        summed = engines.named(engine).matmul_scatter(_NAME, pg, x, weight, seq_dim, chunks).matrices()
    backend, spec = prepared(x.device, x.dtype, scalars)
    with span(_NAME, "sum and norm"):
        out = backend.norm_forward(
            summed,
            as_vector(x_bias),
            as_vector(row_scale),
            as_matrix(residual),
            as_vector(norm_weight),
            as_vector(norm_bias),
            None,
            None,
            seed,
            spec,
            store_z=True,
            stacked=summed.dim() == 3,
        )
    shape = torch.Size(scattered_shape(x, weight, group, seq_dim, seq_len))
    full = shaped((out.y, out.z), shape)
    return full if out.statistics is None else [*full, out.statistics]


def _fake(x: Tensor, weight: Tensor, *args: Any) -> list[Tensor]:
    group, seq_dim, seq_len, _, _, _, kind, *scalars = args[_TENSORS - 2 :]
    shape = scattered_shape(x, weight, group, seq_dim, seq_len)
    out = [x.new_empty(shape, dtype=scalars[-4])]
    if kind != NormKind.NONE:
        out.insert(0, x.new_empty(shape))
        statistics = (2 if kind == NormKind.LAYER else 1, math.prod(shape[:-1]))
        out.append(x.new_empty(statistics, dtype=accumulation_dtype(x.dtype)))
    return out


class _LinearNorm(torch.autograd.Function):
    """Keeps the linear's input, or what its activation is made again from, z, the statistics and the seed."""

    @staticmethod
    def forward(
        ctx: Any, main_grad: Tensor | None, plain: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, weight, _, residual, norm_weight, _, row_scale, seed, gate = tensors
        assert x is not None
        out = linear_reduce_scatter_dropout_add_norm.below_autograd(*tensors, *plain)
        ctx.main_grad = main_grad  # not saved: other micro-batches may add to it first
        ctx.place, ctx.activation, ctx.scalars = plain[:_PLACES], plain[_PLACES], plain[_PLACES + 1 :]
        ctx.normed, ctx.has_residual = ctx.scalars[0] != NormKind.NONE, residual is not None
        z = statistics = None
        if ctx.normed:
            _, z, statistics = out
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, z, statistics, row_scale, norm_weight, seed, gate)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, z, statistics, row_scale, norm_weight, seed, gate = ctx.saved_tensors
        dy, dz = grads[:2] if ctx.normed else (None, grads[0])
        need_x, need_weight, need_bias, need_residual, *need_norm = ctx.needs_input_grad[2:8]
        need_gate = ctx.needs_input_grad[1 + _TENSORS]
        if dy is None and dz is None:
            return (None,) * (2 + _TENSORS)
        # The residual's gradient is that of the sum where nothing stands between them.
        same = seed is None and row_scale is None and ctx.scalars[-4] == x.dtype
        needs = (need_x, need_gate, need_weight)
        linear = any(needs)
        wants = NormWants(
            dx=linear or (same and need_residual),
            dresidual=need_residual and not same,
            dweight=need_norm[0],
            dbias=need_norm[1],
            dx_bias=need_bias,
        )
        saved = (z, statistics, row_scale, norm_weight, None, seed)
        found = iter(dropout_add_norm_backward(dy, None, dz, *saved, list(wants), x.dtype, *ctx.scalars))
        dsum, dresidual, dnorm_weight, dnorm_bias, _, _, dbias = (next(found) if want else None for want in wants)
        if same and need_residual:
            dresidual = dsum
        dx = dgate = dweight = None
        if linear and ctx.activation:
            assert dsum is not None
            given = (dsum, x, gate, weight, None, [*needs, False], ctx.activation)
            dx, dgate, dweight, _ = activation_gradients(ctx.main_grad, *given, *ctx.place)
        elif linear:
            assert dsum is not None
            wanted = (need_x, need_weight, False)
            dx, dweight, _ = scatter_gradients(ctx.main_grad, dsum, x, weight, None, *wanted, *ctx.place)
        return None, None, dx, dweight, dbias, dresidual, dnorm_weight, dnorm_bias, None, None, dgate


def _autograd(*args: Any) -> list[Tensor]:
    return linear_reduce_scatter_dropout_add_norm_into(None, *args)


def linear_reduce_scatter_dropout_add_norm_into(main_grad: Tensor | None, *args: Any) -> list[Tensor]:
    """The op with the gradient of its weight added to ``main_grad``; not traceable where there is one."""
    # What is no tensor travels as one argument: autograd looks at every argument it is given.
    return list(_LinearNorm.apply(main_grad, args[_TENSORS:], *args[:_TENSORS]))


#: Returns, in this order and only where they exist: y, z, statistics.
linear_reduce_scatter_dropout_add_norm = register(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? x_bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
    f"Tensor? row_scale, Tensor? seed, Tensor? gate, {PLACE}, str activation, {SCALARS}) -> Tensor[]",
    _kernel,
    _fake,
    _autograd,
)
