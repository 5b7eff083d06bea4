"""``seqpar::all_gather_linear`` and ``seqpar::linear_reduce_scatter``: schemas, fakes, autograd.

Column-parallel keeps its local shard of x and gathers again in the backward; row-parallel keeps its input and gathers
dy (Korthikanti et al. 2022, section 4.2.2). Bias gradients are complete on every rank: of a column-parallel bias
because dy is whole there, of a row-parallel one because dy has been gathered anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..layout import SequenceShard, group_rank, group_size
from ..overlap import schedule as schedules
from ..overlap.pipeline import Call, Partials, Sequence3D, matmul_into, reshaped, rows_of, run
from ..overlap.schedule import Compute, Transfer
from .library import group_named, register, without_autocast

_PLACE = "str group, int seq_dim, SymInt seq_len, int chunks, bool pipelined"


def _sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums of [rows, N], accumulated in fp32 (fp64) and rounded once. [N]"""
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.sum(0, dtype=acc).to(dtype)


def _weights_signature(weights: list[Tensor], *more: object) -> tuple[object, ...]:
    return (f"K={weights[0].shape[1]}", f"N={[w.shape[0] for w in weights]}", *more)


def _shape_with(x: Tensor, seq_dim: int, length: int, features: int) -> list[int]:
    shape = list(x.shape)
    shape[seq_dim], shape[-1] = length, features
    return shape


# --- all_gather_linear -----------------------------------------------------------------------------------------------


@without_autocast
def _gather_kernel(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    pipelined: bool,
) -> list[Tensor]:
    pg = group_named(group)
    if pg is None:
        return [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    details = _weights_signature(weights, f"chunks={chunks}", f"pipelined={pipelined}")
    call = Call("all_gather_linear", x, seq_dim, seq_len, pg, *details)
    mine = call.mine(x)
    whole = call.empty_whole(x.shape[-1], x) if pipelined else call.around(mine)
    outs = [call.empty_whole(w.shape[0], x) for w in weights]

    def matmul(step: Compute) -> None:
        own = step.start == call.shard.start and step.stop == call.shard.stop
        rows = (mine if own else whole).matrices(step.start, step.stop)
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            matmul_into(out.matrices(step.start, step.stop), rows, weight.t(), bias)

    run(
        schedules.gather_matmul(call.shard, chunks, pipelined=pipelined),
        call.exchange(),
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=lambda t: whole.window(t.rows.start, t.rows.stop),
        compute=matmul,
    )
    return [reshaped(out.data, call.shape(seq_len, out.features)) for out in outs]


def _gather_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    pipelined: bool,
) -> list[Tensor]:
    return [x.new_empty(_shape_with(x, seq_dim, seq_len, w.shape[0])) for w in weights]


class _AllGatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *args: Any) -> tuple[Tensor, ...]:
        weights, biases, place = args[:count], args[count : 2 * count], args[2 * count :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        ctx.count, ctx.place = count, place
        return tuple(all_gather_linear.below_autograd(x, list(weights), list(biases), *place))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        count, needs = ctx.count, ctx.needs_input_grad
        reached = [grad is not None for grad in grads]
        if not any(reached):
            return (None,) * len(needs)
        want_dw = [need and hit for need, hit in zip(needs[2 : 2 + count], reached, strict=True)]
        want_db = [need and hit for need, hit in zip(needs[2 + count : 2 + 2 * count], reached, strict=True)]
        out = iter(all_gather_linear_backward(x, list(grads), list(weights), needs[0], want_dw, want_db, *ctx.place))
        dx = next(out) if needs[0] else None
        dws = [next(out) if want else None for want in want_dw]
        dbs = [next(out) if want else None for want in want_db]
        return (dx, None, *dws, *dbs, *(None,) * len(ctx.place))


def _gather_autograd(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *place: Any) -> list[Tensor]:
    """Spreads the lists: autograd sees only tensors that are arguments of their own."""
    return list(_AllGatherLinear.apply(x, len(weights), *weights, *biases, *place))


@without_autocast
def _gather_backward_kernel(
    x: Tensor,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    pipelined: bool,
) -> list[Tensor]:
    pg = group_named(group)
    wants = f"dx={want_dx} dw={want_dw}"
    details = _weights_signature(weights, f"chunks={chunks}", wants)
    call = Call("all_gather_linear backward", x, seq_dim, seq_len, pg, *details)
    shard, features = call.shard, x.shape[-1]
    # A weight whose output nobody used has no gradient and adds nothing to dx.
    used = [(i, call.whole(g.contiguous())) for i, g in enumerate(grads) if g is not None]
    mine = call.mine(x)
    whole = call.around(mine) if pg is not None and any(want_dw) else mine
    outgoing: dict[tuple[int, int], Sequence3D] = {}
    partials = Partials(call, features, x) if want_dx else None
    dws: dict[int, Tensor] = {}

    def compute(step: Compute) -> None:
        if step.stage == "dgrad":
            assert partials is not None
            if (step.start, step.stop) == (shard.start, shard.stop):
                out = partials.own_matrices(step.start, step.stop)
            else:
                buffer = Sequence3D.empty(call.layout, step.start, step.stop, features, x)
                outgoing[step.start, step.stop] = buffer
                out = buffer.matrices(step.start, step.stop)
            for position, (i, dy) in enumerate(used):
                matmul_into(out, dy.matrices(step.start, step.stop), weights[i], add=position > 0)
        elif step.stage == "wgrad":
            rows = whole.data.reshape(-1, features)
            for i, dy in used:
                if want_dw[i]:
                    dws[i] = dy.data.reshape(-1, dy.features).t().mm(rows)

    def source(transfer: Transfer) -> Tensor:
        rows = transfer.rows
        return mine.window(rows.start, rows.stop) if transfer.kind == "gather" else outgoing[rows.start, rows.stop].data

    def target(transfer: Transfer) -> Tensor:
        rows = transfer.rows
        if transfer.kind == "gather":
            return whole.window(rows.start, rows.stop)
        assert partials is not None
        return partials.window(transfer.source, rows.start, rows.stop)

    steps = schedules.column_backward(shard, chunks if pipelined else 1, dgrad=want_dx, wgrad=any(want_dw))
    run(steps, call.exchange(), source, target, compute)
    dys = dict(used)
    out = [partials.reduce(None)] if partials is not None else []
    out += [dws[i] for i, want in enumerate(want_dw) if want]
    return out + [
        _sum_rows(dys[i].data.reshape(-1, dys[i].features), weights[i].dtype) for i, want in enumerate(want_db) if want
    ]


def _gather_backward_fake(
    x: Tensor,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    *place: Any,
) -> list[Tensor]:
    out = [x.new_empty(x.shape)] if want_dx else []
    out += [w.new_empty(w.shape) for w, want in zip(weights, want_dw, strict=True) if want]
    return out + [w.new_empty(w.shape[0]) for w, want in zip(weights, want_db, strict=True) if want]


# --- linear_reduce_scatter -------------------------------------------------------------------------------------------


@without_autocast
def _scatter_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, seq_dim: int, seq_len: int, chunks: int, pipelined: bool
) -> Tensor:
    pg = group_named(group)
    if pg is None:
        return torch.nn.functional.linear(x, weight, bias)
    details = _weights_signature([weight], f"bias={bias is not None}", f"chunks={chunks}", f"pipelined={pipelined}")
    call = Call("linear_reduce_scatter", x, seq_dim, seq_len, pg, *details)
    shard, features = call.shard, weight.shape[0]
    whole = call.whole(x)
    outgoing: dict[int, Sequence3D] = {}
    partials = Partials(call, features, x)

    def compute(step: Compute) -> None:
        if step.stage != "matmul":
            return
        if not pipelined:
            outgoing[0] = everything = call.empty_whole(features, x)
            matmul_into(everything.matrices(0, seq_len), whole.matrices(0, seq_len), weight.t())
            partials.window(shard.rank, shard.start, shard.stop).copy_(everything.window(shard.start, shard.stop))
            return
        if (step.start, step.stop) == (shard.start, shard.stop):
            out = partials.own_matrices(step.start, step.stop)
        else:
            buffer = outgoing[step.start] = Sequence3D.empty(call.layout, step.start, step.stop, features, x)
            out = buffer.matrices(step.start, step.stop)
        matmul_into(out, whole.matrices(step.start, step.stop), weight.t())

    run(
        schedules.matmul_scatter(shard, chunks, pipelined=pipelined),
        call.exchange(),
        source=lambda t: outgoing[t.rows.start if pipelined else 0].window(t.rows.start, t.rows.stop),
        target=lambda t: partials.window(t.source, t.rows.start, t.rows.stop),
        compute=compute,
    )
    return partials.reduce(bias)


def _shard_size(group: str, seq_len: int) -> int:
    pg: ProcessGroup | None = group_named(group)
    return SequenceShard(seq_len, group_size(pg), group_rank(pg)).size


def _scatter_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, seq_dim: int, seq_len: int, chunks: int, pipelined: bool
) -> Tensor:
    return x.new_empty(_shape_with(x, seq_dim, _shard_size(group, seq_len), weight.shape[0]))


class _LinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear_reduce_scatter.below_autograd(x, weight, bias, *place)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        out = iter(linear_reduce_scatter_backward(dy, x, weight, ctx.bias_dtype, *needs, *ctx.place))
        return (*(next(out) if need else None for need in needs), *(None,) * len(ctx.place))


@without_autocast
def _scatter_backward_kernel(
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
    pipelined: bool,
) -> list[Tensor]:
    pg = group_named(group)
    features_out, features_in = weight.shape
    details = _weights_signature([weight], f"chunks={chunks}", f"dx={want_dx} dw={want_dw} db={want_db}")
    call = Call("linear_reduce_scatter backward", dy, seq_dim, seq_len, pg, *details)
    shard = call.shard
    mine = call.mine(dy.contiguous())
    whole = mine if pg is None else call.around(mine)
    dx = call.empty_whole(features_in, x) if want_dx else None
    dws: list[Tensor] = []

    def compute(step: Compute) -> None:
        if step.stage == "dgrad":
            assert dx is not None
            matmul_into(dx.matrices(step.start, step.stop), whole.matrices(step.start, step.stop), weight)
        elif step.stage == "wgrad":
            dws.append(whole.data.reshape(-1, features_out).t().mm(rows_of(x)))

    steps = schedules.row_backward(shard, chunks if pipelined else 1, dgrad=want_dx, wgrad=want_dw)
    run(
        steps,
        call.exchange(),
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=lambda t: whole.window(t.rows.start, t.rows.stop),
        compute=compute,
    )
    out = [reshaped(dx.data, call.shape(seq_len, features_in))] if dx is not None else []
    out += dws
    if want_db:
        assert bias_dtype is not None
        out.append(_sum_rows(whole.data.reshape(-1, features_out), bias_dtype))
    return out


def _scatter_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    *place: Any,
) -> list[Tensor]:
    out = [x.new_empty(x.shape)] if want_dx else []
    if want_dw:
        out.append(weight.new_empty(weight.shape))
    if want_db:
        out.append(weight.new_empty(weight.shape[0], dtype=bias_dtype))
    return out


all_gather_linear = register(
    f"all_gather_linear(Tensor x, Tensor[] weights, Tensor?[] biases, {_PLACE}) -> Tensor[]",
    _gather_kernel,
    _gather_fake,
    _gather_autograd,
)

#: Returns dx if wanted, then the wanted weight gradients, then the wanted bias gradients.
all_gather_linear_backward = register(
    "all_gather_linear_backward(Tensor x, Tensor?[] grads, Tensor[] weights, bool want_dx, bool[] want_dw, "
    f"bool[] want_db, {_PLACE}) -> Tensor[]",
    _gather_backward_kernel,
    _gather_backward_fake,
    None,
)

linear_reduce_scatter = register(
    f"linear_reduce_scatter(Tensor x, Tensor weight, Tensor? bias, {_PLACE}) -> Tensor",
    _scatter_kernel,
    _scatter_fake,
    _LinearReduceScatter.apply,
)

#: Returns the wanted ones among dx, dweight, dbias.
linear_reduce_scatter_backward = register(
    "linear_reduce_scatter_backward(Tensor dy, Tensor x, Tensor weight, ScalarType? bias_dtype, bool want_dx, "
    f"bool want_dw, bool want_db, {_PLACE}) -> Tensor[]",
    _scatter_backward_kernel,
    _scatter_backward_fake,
    None,
)
