"""``seqpar::all_gather_linear``: schemas, fakes, autograd.

Keeps the local shard of x and gathers again in the backward (Korthikanti et al. 2022, section 4.2.2), unless all rows
are to be kept. Bias gradients are complete on every rank, because dy is whole there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm.steps import Compute, Transfer
from ..overlap import engines
from ..overlap import schedule as schedules
from ..overlap.pipeline import Call, Partials, Sequence3D, matmul_into, run, weights_signature
from ..tensors import rows_of
from . import linear_unchunked
from .linear_common import PLACE, rows_here, shape_with, sum_rows
from .main_grad import weight_gradients
from .registry import apply, group_named, register, without_autocast


@without_autocast
def _gather_kernel(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
) -> list[Tensor]:
    return _gather_linear(x, weights, biases, group, seq_dim, seq_len, chunks, engine, keep=False)[:-1]


@without_autocast
def _gather_keeping_kernel(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *place: Any) -> list[Tensor]:
    return _gather_linear(x, weights, biases, *place, keep=True)


def _gather_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    *,
    keep: bool,
) -> list[Tensor]:
    """linear(all_gather(x)) for each weight; last all rows of x, which are only there for sure if ``keep``."""
    pg = group_named(group)
    if pg is None:
        whole_x = x.clone() if keep else x
        return [*(torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)), whole_x]
    return engines.named(engine).gather_matmul(pg, x, weights, biases, seq_dim, seq_len, chunks, keep)


def _gather_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], group: str, seq_dim: int, seq_len: int, *plan: Any
) -> list[Tensor]:
    return [x.new_empty(shape_with(x, seq_dim, seq_len, w.shape[0])) for w in weights]


def _gather_keeping_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], group: str, seq_dim: int, seq_len: int, *plan: Any
) -> list[Tensor]:
    outs = _gather_fake(x, weights, biases, group, seq_dim, seq_len, *plan)
    return [*outs, x.new_empty(shape_with(x, seq_dim, seq_len, x.shape[-1]))]


class _AllGatherLinear(torch.autograd.Function):
    """``keep``: all rows of x are kept for the backward, and come back as one more output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, main_grads: list[Tensor | None], keep: bool, place: tuple[Any, ...], *args: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(main_grads)
        weights, biases = list(args[:count]), list(args[count:])
        ctx.set_materialize_grads(False)
        ctx.main_grads, ctx.place = main_grads, place  # not saved: other micro-batches may add to them first
        ctx.keep = keep
        if keep:
            outs = all_gather_linear_keeping.below_autograd(x, weights, biases, *place)
            ctx.mark_non_differentiable(outs[-1])
            ctx.save_for_backward(outs[-1], *weights)
            return tuple(outs)
        ctx.save_for_backward(x, *weights)
        return tuple(all_gather_linear.below_autograd(x, weights, biases, *place))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        main_grads, needs = ctx.main_grads, ctx.needs_input_grad
        count = len(main_grads)
        grads = grads[:count]
        reached = [grad is not None for grad in grads]
        if not any(reached):
            return (None,) * len(needs)
        want_dw = [need and hit for need, hit in zip(needs[4 : 4 + count], reached, strict=True)]
        want_db = [need and hit for need, hit in zip(needs[4 + count :], reached, strict=True)]
        args = (x, list(grads), weights, needs[0], want_dw, want_db, ctx.keep, *ctx.place)
        if any(main_grad is not None for main_grad in main_grads):
            out = iter(all_gather_linear_backward_into(*args, main_grads))
        else:
            out = iter(all_gather_linear_backward(*args))
        dx = next(out) if needs[0] else None
        dws = [next(out) if want else None for want in returned(want_dw, main_grads)]
        dbs = [next(out) if want else None for want in want_db]
        return (dx, None, None, None, *dws, *dbs)


def returned(want_dw: list[bool], main_grads: list[Tensor | None] | None) -> list[bool]:
    """Which weight gradients come back: the others are added to their main_grad."""
    if main_grads is None:
        return want_dw
    return [want and main_grad is None for want, main_grad in zip(want_dw, main_grads, strict=True)]


def _gather_autograd(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *place: Any) -> list[Tensor]:
    return all_gather_linear_into([None] * len(weights), x, weights, biases, *place)


def _gather_keeping_autograd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *place: Any
) -> list[Tensor]:
    return all_gather_linear_into([None] * len(weights), x, weights, biases, *place, keep=True)


def all_gather_linear_into(
    main_grads: list[Tensor | None],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    *place: Any,
    keep: bool = False,
) -> list[Tensor]:
    """all_gather_linear with gradients of weights added to ``main_grads``; not traceable where there are any.

    With ``keep`` it is all_gather_linear_keeping.
    """
    # Spreads the lists: autograd sees only tensors that are arguments of their own.
    return list(apply(_AllGatherLinear, x, main_grads, keep, place, *weights, *biases))


@without_autocast
def _gather_backward_kernel(
    x: Tensor,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    gathered: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grads: list[Tensor | None] | None = None,
) -> list[Tensor]:
    pg = group_named(group)
    way = engines.named(engine)
    if pg is None or not way.chunked:
        dx, dws = linear_unchunked.gather_linear_backward(
            pg, x, grads, weights, want_dx, want_dw, main_grads, gathered, seq_dim, seq_len
        )
        return _gradients(dx, dws, grads, weights, want_db)
    wants = f"dx={want_dx} dw={want_dw} gathered={gathered}"
    details = weights_signature(weights, f"chunks={chunks}", wants)
    call = Call("all_gather_linear backward", x, seq_dim, seq_len, pg, *details)
    shard, features = call.shard, x.shape[-1]
    # A weight whose output nobody used has no gradient and adds nothing to dx.
    used = [(i, call.whole(g.contiguous())) for i, g in enumerate(grads) if g is not None]
    if gathered:
        mine = whole = call.whole(x)
    else:
        mine = call.mine(x)
        whole = call.around(mine) if any(want_dw) else mine
    outgoing: dict[int, Sequence3D] = {}
    exchange = call.exchange(features, x, way.transport)
    partials = Partials(call, features, x) if want_dx else None
    dws = []

    def compute(step: Compute) -> None:
        if step.stage == "dgrad":
            assert partials is not None
            if (step.start, step.stop) == (shard.start, shard.stop):
                out = partials.own_matrices(step.start, step.stop)
            else:
                buffer = outgoing[step.start] = exchange.empty(step.start, step.stop, features, x)
                out = buffer.matrices(step.start, step.stop)
            for position, (i, dy) in enumerate(used):
                matmul_into(out, dy.matrices(step.start, step.stop), weights[i], add=position > 0)
        elif step.stage == "wgrad":
            dys = [(i, dy.data.reshape(-1, dy.features)) for i, dy in used]
            dws.extend(weight_gradients(main_grads, dys, whole.data.reshape(-1, features), want_dw))

    def source(transfer: Transfer) -> Tensor:
        rows = transfer.rows
        if transfer.buffer == schedules.SHARD:
            return mine.window(rows.start, rows.stop)
        return outgoing.pop(rows.start).data  # the session keeps it until it has left

    def target(transfer: Transfer) -> Tensor:
        rows = transfer.rows
        if transfer.buffer == schedules.SHARD:
            return whole.window(rows.start, rows.stop)
        assert partials is not None
        return partials.window(transfer.source, rows.start, rows.stop)

    window = call.window(chunks, features, x)
    steps = schedules.column_backward(
        shard, chunks, dgrad=want_dx, wgrad=any(want_dw), gather=not gathered, window=window
    )
    run(steps, exchange, source, target, compute)
    dx = partials.reduce(None) if partials is not None else None
    return _gradients(dx, dws, grads, weights, want_db)


def _gradients(
    dx: Tensor | None,
    dws: list[Tensor | None],
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_db: list[bool],
) -> list[Tensor]:
    """What the op returns: dx, the weights' gradients that go nowhere else, the biases'."""
    out = [] if dx is None else [dx]
    out += [dw for dw in dws if dw is not None]
    for weight, grad, want in zip(weights, grads, want_db, strict=True):
        if want:
            assert grad is not None
            out.append(sum_rows(rows_of(grad), weight.dtype))
    return out


def _gather_backward_fake(
    x: Tensor,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    gathered: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grads: list[Tensor | None] | None = None,
) -> list[Tensor]:
    rows = rows_here(group, seq_len) if gathered else x.shape[seq_dim]
    out = [x.new_empty(shape_with(x, seq_dim, rows, x.shape[-1]))] if want_dx else []
    out += [w.new_empty(w.shape) for w, want in zip(weights, returned(want_dw, main_grads), strict=True) if want]
    return out + [w.new_empty(w.shape[0]) for w, want in zip(weights, want_db, strict=True) if want]


all_gather_linear = register(
    f"all_gather_linear(Tensor x, Tensor[] weights, Tensor?[] biases, {PLACE}) -> Tensor[]",
    _gather_kernel,
    _gather_fake,
    _gather_autograd,
)

#: The same for a backward that does not gather again: returns all rows of x too, last, and keeps them.
all_gather_linear_keeping = register(
    f"all_gather_linear_keeping(Tensor x, Tensor[] weights, Tensor?[] biases, {PLACE}) -> Tensor[]",
    _gather_keeping_kernel,
    _gather_keeping_fake,
    _gather_keeping_autograd,
)

_GATHER_BACKWARD = (
    f"Tensor x, Tensor?[] grads, Tensor[] weights, bool want_dx, bool[] want_dw, bool[] want_db, bool gathered, {PLACE}"
)

#: Returns dx if wanted, then the wanted weight gradients, then the wanted bias gradients. ``gathered``: x is all rows.
all_gather_linear_backward = register(
    f"all_gather_linear_backward({_GATHER_BACKWARD}) -> Tensor[]", _gather_backward_kernel, _gather_backward_fake, None
)

#: The same, but a weight gradient that has a main_grad is added to it and not returned. An op of its own, since
#: torch.compile takes no op that both changes an argument and returns a list.
all_gather_linear_backward_into = register(
    f"all_gather_linear_backward_into({_GATHER_BACKWARD}, Tensor(a!)?[] main_grads) -> Tensor[]",
    _gather_backward_kernel,
    _gather_backward_fake,
    None,
)
