"""``seqpar::all_gather_linear``: schemas, fakes, autograd of the column-parallel linear.

========  =============================================  ===================  ==========================================
pass      computes                                       result               communication
========  =============================================  ===================  ==========================================
forward   y = all_gather(x) @ weight.T + bias            [..., S, ..., N/t]   all-gather of x [..., S/t, ..., K]
dgrad     dx = reduce_scatter(sum of dy @ weight)        [..., S/t, ..., K]   reduce-scatter of dx, beside wgrad
wgrad     dweight = dy.T @ all_gather(x)                 [N/t, K]             all-gather of x, or none if kept
dbias     dbias = sum of dy over its rows                [N/t]                none: dy [..., S, ..., N/t] is whole here
========  =============================================  ===================  ==========================================

Sizes are those of the whole layer, t the ranks of the group. One gather feeds several weights, whose dy @ weight are
summed before the reduce-scatter. The local shard of x is saved and gathered again in the backward (Korthikanti et al.
2022, section 4.2.2), unless all rows are to be kept. Without a group nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..comm.steps import Compute, Transfer
from ..overlap import engines
from ..overlap import schedule as schedules
from ..overlap.pipeline import Call, Partials, Sequence3D, matmul_into, run, weights_signature
from ..overlap.planner import Plan
from ..overlap.unchunked import GatherMatmulReady
from ..tensors import rows_of
from . import linear_unchunked
from .linear_common import PLACE, Place, rows_here, shape_with, sum_rows
from .main_grad import weight_gradients
from .registry import apply, group_named, plain_apply, register, without_autocast
from .remake import NONE, made_again

Several = Sequence[Tensor | None]

# --- forward ---------------------------------------------------------------------------------------------------------


@without_autocast
def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    *,
    keep: bool = False,
) -> list[Tensor]:
    """linear(all_gather(x)) for each weight; last all rows of x if ``keep``."""
    pg = group_named(group)
    if pg is None:
        return _alone(x, weights, biases) + [x.clone()] * keep
    outs = engines.named(engine).gather_matmul(pg, x, weights, biases, seq_dim, seq_len, chunks, keep)
    return outs if keep else outs[:-1]


def _alone(x: Tensor, weights: Sequence[Tensor], biases: Several) -> list[Tensor]:
    """linear(x) for each weight: what there is to do without a group."""
    if len(weights) == 1:  # map takes longer than the call
        return [torch.nn.functional.linear(x, weights[0], biases[0])]
    return list(map(torch.nn.functional.linear, [x] * len(weights), weights, biases))


def _fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    *,
    keep: bool = False,
) -> list[Tensor]:
    features = [w.shape[0] for w in weights] + [x.shape[-1]] * keep
    return [x.new_empty(shape_with(x, seq_dim, seq_len, size)) for size in features]


# --- autograd --------------------------------------------------------------------------------------------------------


class DispatchedGatherLinear:
    """One kind of call as autograd needs it, its forward left to the dispatcher.

    ``keep``: all rows of x are kept for the backward, and come back as one more output. ``remake``: x is not kept where
    it can be made again (:mod:`.remake`).
    """

    def __init__(self, place: Place, keep: bool, remake: int = NONE):
        self.place, self.keep, self.remake = place, keep, remake

    def forward(self, x: Tensor, weights: Sequence[Tensor], biases: Several) -> list[Tensor]:
        op = all_gather_linear_keeping if self.keep else all_gather_linear
        outs: list[Tensor] = op.below_autograd(x, list(weights), list(biases), *self.place)
        return outs


class PreparedGatherLinear:
    """One kind of call on plain tensors in eager mode, checked and planned, ready to run.

    The sizes, dtypes and device of the operands make a kind, and so do the options. All that follows from them has been
    worked out: a small call costs little more than its exchange, its matmul and autograd.Function.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Several,
        several: bool,
        keep: bool,
        remake: int = NONE,
    ):
        """``keep``: whether all rows of x are kept where there will be a backward. ``remake``: as there."""
        self.plan, self.place, self._several, self.remake = plan, place, several, remake
        name, seq_dim, seq_len, chunks, engine = place
        group = group_named(name)
        self.keep = keep and group is not None and any(w.requires_grad for w in weights)
        self._differentiable = any(t is not None and t.requires_grad for t in (x, *weights, *biases))
        #: As :meth:`DispatchedGatherLinear.forward`.
        self.forward: GatherMatmulReady = _alone
        if group is not None:
            way = engines.named(engine)
            self.forward = way.ready_gather_matmul(group, x, weights, seq_dim, seq_len, chunks, self.keep)

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], biases: Several, main_grads: Several, _: None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The result of each weight, or of the only one."""
        if self._differentiable and torch.is_grad_enabled():
            outs: Sequence[Tensor] = _apply(self, main_grads, x, *weights, *biases)
        else:
            outs = self.forward(x, weights, biases)
        return tuple(outs[: len(weights)]) if self._several else outs[0]


class _AllGatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: DispatchedGatherLinear | PreparedGatherLinear,
        main_grads: Several,
        x: Tensor,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        """``operands``: the weights, then as many biases."""
        count = len(main_grads)
        weights = operands[:count]
        outs = call.forward(x, weights, operands[count:])
        ctx.set_materialize_grads(False)
        ctx.call, ctx.main_grads = call, main_grads  # not saved: other micro-batches may add to them first
        if call.keep:
            ctx.mark_non_differentiable(outs[-1])
            x = outs[-1]
        ctx.made = made_again(x) if call.remake else None
        ctx.save_for_backward(x if ctx.made is None else None, *weights)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        call, main_grads = ctx.call, ctx.main_grads
        _, _, need_dx, *needs = ctx.needs_input_grad
        count = len(main_grads)
        grads = grads[:count]
        reached = [grad is not None for grad in grads]
        if not any(reached):
            return (None,) * len(ctx.needs_input_grad)
        want_dw = [need and hit for need, hit in zip(needs[:count], reached, strict=True)]
        want_db = [need and hit for need, hit in zip(needs[count:], reached, strict=True)]
        if ctx.made is not None:
            x = ctx.made(any(want_dw))
        args = (x, list(grads), weights, need_dx, want_dw, want_db, call.keep, *call.place)
        if any(main_grad is not None for main_grad in main_grads):
            out = iter(all_gather_linear_backward_into(*args, main_grads))
        else:
            out = iter(all_gather_linear_backward(*args))
        dx = next(out) if need_dx else None
        dws = [next(out) if want else None for want in returned(want_dw, main_grads)]
        dbs = [next(out) if want else None for want in want_db]
        return (None, None, dx, *dws, *dbs)


_apply = plain_apply(_AllGatherLinear)


def all_gather_linear_into(
    main_grads: list[Tensor | None] | None,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    *place: Any,
    keep: bool = False,
    remake: int = NONE,
) -> list[Tensor]:
    """all_gather_linear with gradients of weights added to ``main_grads``; not traceable where there are any.

    With ``keep`` it is all_gather_linear_keeping. ``remake`` is for plain tensors in eager mode.
    """
    if main_grads is None:
        main_grads = [None] * len(weights)
    # Spreads the lists: autograd sees only tensors that are arguments of their own.
    return list(apply(_AllGatherLinear, DispatchedGatherLinear(place, keep, remake), main_grads, x, *weights, *biases))


# --- backward --------------------------------------------------------------------------------------------------------


def returned(want_dw: list[bool], main_grads: list[Tensor | None] | None) -> list[bool]:
    """Which weight gradients come back: the others are added to their main_grad."""
    if main_grads is None:
        return want_dw
    return [want and main_grad is None for want, main_grad in zip(want_dw, main_grads, strict=True)]


@without_autocast
def _backward_kernel(
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


def _backward_fake(
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


# --- ops -------------------------------------------------------------------------------------------------------------

all_gather_linear = register(
    f"all_gather_linear(Tensor x, Tensor[] weights, Tensor?[] biases, {PLACE}) -> Tensor[]",
    _forward,
    _fake,
    partial(all_gather_linear_into, None),
)

#: The same for a backward that does not gather again: returns all rows of x too, last, and keeps them.
all_gather_linear_keeping = register(
    f"all_gather_linear_keeping(Tensor x, Tensor[] weights, Tensor?[] biases, {PLACE}) -> Tensor[]",
    partial(_forward, keep=True),
    partial(_fake, keep=True),
    partial(all_gather_linear_into, None, keep=True),
)

_BACKWARD = (
    f"Tensor x, Tensor?[] grads, Tensor[] weights, bool want_dx, bool[] want_dw, bool[] want_db, bool gathered, {PLACE}"
)

#: Returns dx if wanted, then the wanted weight gradients, then the wanted bias gradients. ``gathered``: x is all rows.
all_gather_linear_backward = register(
    f"all_gather_linear_backward({_BACKWARD}) -> Tensor[]", _backward_kernel, _backward_fake, None
)

#: The same, but a weight gradient that has a main_grad is added to it and not returned. An op of its own, since
#: torch.compile takes no op that both changes an argument and returns a list.
all_gather_linear_backward_into = register(
    f"all_gather_linear_backward_into({_BACKWARD}, Tensor(a!)?[] main_grads) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)
