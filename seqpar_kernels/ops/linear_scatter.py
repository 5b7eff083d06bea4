"""``seqpar::linear_reduce_scatter``: schemas, fakes, autograd of the row-parallel linear.

========  ======================================  ===================  ===============================================
pass      computes                                result               communication
========  ======================================  ===================  ===============================================
forward   y = reduce_scatter(x @ weight.T) + bias  [..., S/t, ..., N]   reduce-scatter of x @ weight.T [..., S, ..., N]
dgrad     dx = all_gather(dy) @ weight            [..., S, ..., K/t]   all-gather of dy [..., S/t, ..., N]
wgrad     dweight = all_gather(dy).T @ x          [N, K/t]             none: that of dgrad
dbias     dbias = sum of all_gather(dy) over rows  [N]                  none: that of dgrad
========  ======================================  ===================  ===============================================

Sizes are those of the whole layer, t the ranks of the group. The input is saved, and dy is gathered in the backward
(Korthikanti et al. 2022, section 4.2.2). Without a group nothing is exchanged.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..comm.steps import Compute
from ..overlap import engines
from ..overlap import schedule as schedules
from ..overlap.pipeline import Call, matmul_into, run, weights_signature
from ..overlap.planner import Plan, Work, spreads_weight_gradient
from ..overlap.tuning import profile_of
from ..overlap.unchunked import MatmulScatterReady
from ..tensors import reshaped, rows_of
from . import linear_unchunked
from .linear_common import PLACE, Place, rows_here, shape_with, sum_rows
from .main_grad import weight_gradient
from .registry import apply, group_named, plain_apply, register, without_autocast
from .remake import MAX, NONE, made_again
from .remake_heads import release_heads

_NAME = "linear_reduce_scatter"


@without_autocast
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, seq_dim: int, seq_len: int, chunks: int, engine: str
) -> Tensor:
    pg = group_named(group)
    if pg is None:
        return torch.nn.functional.linear(x, weight, bias)
    return engines.named(engine).matmul_scatter(_NAME, pg, x, weight, seq_dim, chunks).reduce(bias)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, seq_dim: int, seq_len: int, chunks: int, engine: str
) -> Tensor:
    return x.new_empty(scattered_shape(x, weight, group, seq_dim, seq_len))


def scattered_shape(x: Tensor, weight: Tensor, group: str, seq_dim: int, seq_len: int) -> list[int]:
    """[..., S/t, ..., N], our shard of ``linear(x, weight)``."""
    return shape_with(x, seq_dim, rows_here(group, seq_len), weight.shape[0])


class DispatchedLinearScatter:
    """One kind of call as autograd needs it, its forward left to the dispatcher."""

    def __init__(self, place: Place, remake: int = NONE):
        """``remake``: x is not kept where it can be made again (:mod:`.remake`)."""
        self.place, self.remake = place, remake

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = linear_reduce_scatter.below_autograd(x, weight, bias, *self.place)
        return y


class PreparedLinearScatter:
    """One kind of call on plain tensors in eager mode, checked and planned, ready to run.

    As :class:`.gather_linear.PreparedGatherLinear`.
    """

    def __init__(self, plan: Plan, place: Place, x: Tensor, weight: Tensor, bias: Tensor | None, remake: int = NONE):
        self.plan, self.place, self.remake = plan, place, remake
        self._differentiable = any(t is not None and t.requires_grad for t in (x, weight, bias))
        group = group_named(place[0])
        self._partials: MatmulScatterReady | None = None
        if group is not None:
            way = engines.named(plan.engine)
            self._partials = way.ready_matmul_scatter(_NAME, group, x, weight, place[1], plan.chunks)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, _: None = None
    ) -> Tensor:
        if self._differentiable and torch.is_grad_enabled():
            y: Tensor = _apply(x, weight, bias, main_grad, self)
            return y
        return self.forward(x, weight, bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._partials is None:
            return torch.nn.functional.linear(x, weight, bias)
        return self._partials(x, weight).reduce(bias)


class _LinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        main_grad: Tensor | None,
        call: DispatchedLinearScatter | PreparedLinearScatter,
    ) -> Tensor:
        ctx.made = made_again(x) if call.remake else None
        if call.remake == MAX:
            release_heads(x)
        ctx.save_for_backward(x if ctx.made is None else None, weight)
        ctx.main_grad, ctx.place = main_grad, call.place  # not saved: other micro-batches may add to it first
        ctx.bias_dtype = None if bias is None else bias.dtype
        return call.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if ctx.made is not None:
            x = ctx.made(needs[1])
        dx, dweight, dbias = scatter_gradients(ctx.main_grad, dy, x, weight, ctx.bias_dtype, *needs, *ctx.place)
        return dx, dweight, dbias, None, None


_apply = plain_apply(_LinearReduceScatter)


def scatter_gradients(
    main_grad: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    *place: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight (None where it goes to ``main_grad``), dbias: those wanted."""
    args = (dy, x, weight, bias_dtype, want_dx, want_dw, want_db, *place)
    if main_grad is not None and want_dw:
        out = iter(linear_reduce_scatter_backward_into(*args, main_grad))
    else:
        out = iter(linear_reduce_scatter_backward(*args))
    dx, dw, db = (next(out) if want else None for want in (want_dx, want_dw and main_grad is None, want_db))
    return dx, dw, db


def linear_reduce_scatter_into(
    main_grad: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any, remake: int = NONE
) -> Tensor:
    """linear_reduce_scatter with the gradient of its weight added to ``main_grad``; not traceable if there is one.

    ``remake`` is for plain tensors in eager mode.
    """
    y: Tensor = apply(_LinearReduceScatter, x, weight, bias, main_grad, DispatchedLinearScatter(place, remake))
    return y


@without_autocast
def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grad: Tensor | None = None,
) -> list[Tensor]:
    pg = group_named(group)
    features_out, features_in = weight.shape
    way = engines.named(engine)
    if pg is None or not way.chunked:
        dx, dws, rows = linear_unchunked.linear_scatter_backward(
            pg, dy, x, weight, want_dx, want_dw, want_db, main_grad, seq_dim, seq_len
        )
        db = sum_rows(rows_of(rows), bias_dtype) if want_db and bias_dtype is not None else None
        return [gradient for gradient in (dx, *dws, db) if gradient is not None]
    details = weights_signature([weight], f"chunks={chunks}", f"dx={want_dx} dw={want_dw} db={want_db}")
    call = Call(f"{_NAME} backward", dy, seq_dim, seq_len, pg, *details)
    shard = call.shard
    mine = call.mine(dy.contiguous())
    whole = call.around(mine)
    whole_dx = call.empty_whole(features_in, x) if want_dx else None
    whole_x = call.whole(x) if want_dw else whole
    dw: Tensor | None = None

    def compute(step: Compute) -> None:
        nonlocal dw
        if step.stage == "dgrad":
            assert whole_dx is not None
            matmul_into(whole_dx.matrices(step.start, step.stop), whole.matrices(step.start, step.stop), weight)
        elif step.stage == "wgrad":
            dy_rows, x_rows = (rows_of(of.matrices(step.start, step.stop)) for of in (whole, whole_x))
            made = weight_gradient(main_grad if dw is None else dw, dy_rows, x_rows)
            dw = dw if made is None else made

    window = call.window(chunks, features_out, dy)
    spread = want_dw and _spreads(pg, call, dy, seq_dim, weight, main_grad, chunks, want_dx)
    steps = schedules.row_backward(shard, chunks, dgrad=want_dx, wgrad=want_dw, spread=spread, window=window)
    run(
        steps,
        call.exchange(features_out, dy, way.transport),
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=lambda t: whole.window(t.rows.start, t.rows.stop),
        compute=compute,
    )
    out = [reshaped(whole_dx.data, call.shape(seq_len, features_in))] if whole_dx is not None else []
    out += [] if dw is None else [dw]
    if want_db:
        assert bias_dtype is not None
        out.append(sum_rows(whole.data.reshape(-1, features_out), bias_dtype))
    return out


def _spreads(
    group: ProcessGroup,
    call: Call,
    dy: Tensor,
    seq_dim: int,
    weight: Tensor,
    main_grad: Tensor | None,
    chunks: int,
    want_dx: bool,
) -> bool:
    """Whether wgrad runs chunk by chunk. What is sent is the same either way: each rank may decide for itself."""
    summed_in = weight if main_grad is None else main_grad
    if summed_in.dtype.itemsize < 4:  # every chunk's sum would be rounded to 16 bits
        return False
    profile = profile_of(group)["cpu" if dy.device.type == "cpu" else "cuda"]
    work = Work.of(dy, seq_dim, call.shard, weight.shape[0], weight.numel())
    return spreads_weight_gradient(chunks, work, profile, want_dx)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grad: Tensor | None = None,
) -> list[Tensor]:
    out = [x.new_empty(x.shape)] if want_dx else []
    if want_dw and main_grad is None:
        out.append(weight.new_empty(weight.shape))
    if want_db:
        out.append(weight.new_empty(weight.shape[0], dtype=bias_dtype))
    return out


linear_reduce_scatter = register(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, {PLACE}) -> Tensor",
    _forward,
    _fake,
    partial(linear_reduce_scatter_into, None),
)

_BACKWARD = (
    "Tensor dy, Tensor x, Tensor weight, ScalarType? bias_dtype, bool want_dx, bool want_dw, bool want_db, " + PLACE
)

#: Returns the wanted ones among dx, dweight, dbias.
linear_reduce_scatter_backward = register(
    f"{_NAME}_backward({_BACKWARD}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)

#: The same with dweight, if wanted, added to main_grad.
linear_reduce_scatter_backward_into = register(
    f"{_NAME}_backward_into({_BACKWARD}, Tensor(a!) main_grad) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)
