"""``seqpar::linear_reduce_scatter_dropout_add_norm``: a row-parallel linear whose reduction goes on to the next norm.

The kernel that sums the partial results of the ranks also adds bias and residual, drops and normalises, so the sum is
never written. Backward: that of the norm gives the gradient of the sum, that of the row-parallel linear does the rest.

=========  ================================================  ===================  ======================================
pass       computes                                          result               communication
=========  ================================================  ===================  ======================================
forward    z = dropout(reduce_scatter(a @ W.T) + bias)       [..., S/t, ..., N]   reduce-scatter of [..., S, ..., N]
           + residual
forward    y = norm(z) * norm_weight + norm_bias             [..., S/t, ..., N]   none
dresidual  dz + norm'(dy * norm_weight)                      [..., S/t, ..., N]   none
dsum       dropout'(dresidual)                               [..., S/t, ..., N]   none
dgrad      da = all_gather(dsum) @ W; dx, dgate from da      [..., S, ..., K/t]   all-gather of dsum
wgrad      dW = all_gather(dsum).T @ a                       [N, K/t]             none: that of dgrad
dbias      sum of dsum over this rank's rows                 [N]                  none
dnorm      dnorm_weight, dnorm_bias: sums over rows          [N]                  none
=========  ================================================  ===================  ======================================

a is x [..., S, ..., K/t], activation(x), or activation(gate) * x; t the ranks of the group. Gradients of bias and of
the norm's vectors are summed over the ranks by :class:`.mappings.SumGradients`, through which a public function passes
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import NormGiven, NormKind, NormSpec, NormTensors, NormWants, select
from ..kernels.spec import accumulation_dtype
from ..overlap import engines
from ..overlap.profiling import span
from ..tensors import rows_of
from .linear_common import PLACE
from .linear_scatter import scatter_gradients, scattered_shape
from .norm import (
    KEPT_OF_NORM,
    SPEC,
    can_make_again,
    declared,
    dropout_add_norm_backward,
    existing,
    shaped,
    statistics_shape,
    y_again,
)
from .recompute import activate, activation_gradients
from .registry import group_named, register, without_autocast
from .remake import MAX, NONE, made_again, readable
from .remake_heads import release_heads

_NAME = "linear_reduce_scatter_dropout_add_norm"
_PLACES = 5  # how many arguments say where


class _Given(NamedTuple):
    """The op's arguments as the values that they are."""

    tensors: NormTensors  # x: the input of the linear, whose sum over the ranks the norm takes
    weight: Tensor
    gate: Tensor | None
    place: tuple[Any, ...]
    activation: str
    spec: NormSpec
    backend: str

    def shape(self) -> torch.Size:
        """That of y and z."""
        group, seq_dim, seq_len, _, _ = self.place
        return torch.Size(scattered_shape(self.tensors.x, self.weight, group, seq_dim, seq_len))


_WEIGHT = len(NormTensors._fields)  # the place of the first argument behind those of the norm
_TENSORS = _WEIGHT + 2  # how many of the arguments are tensors
_BEFORE = 3  # how many arguments of the autograd.Function come before them


def _packed(args: Sequence[Any]) -> _Given:
    weight, gate, *rest = args[_WEIGHT:]
    place, (activation, *scalars, backend) = tuple(rest[:_PLACES]), rest[_PLACES:]
    tensors = NormTensors(*args[:_WEIGHT])
    return _Given(tensors, weight, gate, place, activation, NormSpec.from_flat(scalars), backend)


@without_autocast
def _kernel(*args: Any) -> list[Tensor]:
    given = _packed(args)
    tensors, weight, gate, (group, seq_dim, _, chunks, engine), activation, spec, backend = given
    pg, x = group_named(group), tensors.x
    if activation:
        x = activate(x, gate, activation)
    if pg is None:
        summed = rows_of(torch.nn.functional.linear(x, weight))
    else:
        summed = engines.named(engine).matmul_scatter(_NAME, pg, x, weight, seq_dim, chunks).matrices()
    readable = tensors._replace(x=summed).readable(stacked=summed.dim() == 3)
    with span(_NAME, "sum and norm"):
        out = select(backend, x.device).norm_forward(readable, spec, stacked=summed.dim() == 3)
    return existing(shaped(out, given.shape()))


def _fake(*args: Any) -> list[Tensor]:
    given = _packed(args)
    x, kind, shape = given.tensors.x, given.spec.kind, given.shape()
    z = x.new_empty(shape, dtype=given.spec.z_dtype)
    if kind == NormKind.NONE:
        return [z]
    statistics = x.new_empty(statistics_shape(kind, shape), dtype=accumulation_dtype(x.dtype))
    return [x.new_empty(shape), z, statistics]


class _LinearNorm(torch.autograd.Function):
    """Keeps the linear's input, or what its activation is made again from, z, the statistics and the seed."""

    @staticmethod
    def forward(
        ctx: Any, main_grad: Tensor | None, scalars: tuple[Any, ...], remake: int, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        """``remake``: x may be made again from what its producer keeps."""
        out = linear_reduce_scatter_dropout_add_norm.below_autograd(*flat, *scalars)
        given = _packed((*flat, *scalars))
        tensors = given.tensors
        ctx.main_grad = main_grad  # not saved: other micro-batches may add to it first
        ctx.place, ctx.activation, ctx.spec, ctx.backend = given[3:]
        z = statistics = None
        if ctx.spec.kind != NormKind.NONE:
            _, z, statistics = out
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.made = made_again(tensors.x) if remake and not ctx.activation else None
        if remake == MAX:
            release_heads(tensors.x)
        x = tensors.x if ctx.made is None else None
        kept = (z, statistics, tensors.row_scale, tensors.weight, tensors.weight2, tensors.seed, tensors.bias)
        ctx.save_for_backward(*kept, x, given.weight, given.gate)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *kept, _, x, weight, gate = ctx.saved_tensors
        spec: NormSpec = ctx.spec
        dy, dz = (None, grads[0]) if spec.kind == NormKind.NONE else grads[:2]
        if dy is None and dz is None:
            return (None,) * (_BEFORE + _TENSORS)
        tensors = NormGiven(dy, None, dz, *kept)
        need_weight, need_gate = ctx.needs_input_grad[_BEFORE + _WEIGHT :]
        needs: dict[str, bool] = dict(zip(NormTensors._fields, ctx.needs_input_grad[_BEFORE:], strict=False))
        needs_linear = (needs["x"], need_gate, need_weight)
        # The residual's gradient is that of the sum where nothing stands between them.
        same = tensors.seed is None and tensors.row_scale is None and spec.z_dtype == spec.x_dtype
        wants = NormWants(
            dx=any(needs_linear) or (same and needs["residual"]),
            dresidual=needs["residual"] and not same,
            dweight=needs["weight"],
            dbias=needs["bias"],
            dx_bias=needs["x_bias"],
        )
        found = iter(dropout_add_norm_backward(*tensors, list(wants), *spec.flat(), ctx.backend))
        dsum, dresidual, *dvectors = (next(found) if want else None for want in wants)
        if same and needs["residual"]:
            dresidual = dsum
        dx = dgate = dweight = None
        if any(needs_linear):
            assert dsum is not None
            if ctx.made is not None:
                x = ctx.made(need_weight)
            if ctx.activation:
                rest = (dsum, x, gate, weight, None, [*needs_linear, False], ctx.activation)
                dx, dgate, dweight, _ = activation_gradients(ctx.main_grad, *rest, *ctx.place)
            else:
                wanted = (needs["x"], need_weight, False)
                dx, dweight, _ = scatter_gradients(ctx.main_grad, dsum, x, weight, None, *wanted, *ctx.place)
        return None, None, None, dx, dresidual, *dvectors, None, None, None, dweight, dgate

    @staticmethod
    def made_again(ctx: Any, number: int, out: Tensor | None) -> Callable[[], Tensor] | None:
        """How y = norm(z) is made again, see :mod:`.remake`; None for other results."""
        if number or not can_make_again(ctx.spec) or not readable(*ctx._raw_saved_tensors[:KEPT_OF_NORM]):
            return None
        return functools.partial(y_again, ctx, ctx.spec, ctx.backend)


def _autograd(*args: Any) -> list[Tensor]:
    return linear_reduce_scatter_dropout_add_norm_into(None, *args)


def linear_reduce_scatter_dropout_add_norm_into(
    main_grad: Tensor | None, *args: Any, remake: int = NONE
) -> list[Tensor]:
    """The op with the gradient of its weight added to ``main_grad``; not traceable where there is one."""
    # What is no tensor travels as one argument: autograd looks at every argument it is given.
    return list(_LinearNorm.apply(main_grad, args[_TENSORS:], remake, *args[:_TENSORS]))


#: Returns, in this order and only where they exist: y, z, statistics.
linear_reduce_scatter_dropout_add_norm = register(
    f"{_NAME}({declared(NormTensors)}, Tensor linear_weight, Tensor? gate, {PLACE}, str activation, {SPEC}) "
    "-> Tensor[]",
    _kernel,
    _fake,
    _autograd,
)
