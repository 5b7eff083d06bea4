"""The backward of a mixture of experts over several ranks; see :mod:`.moe_exchange`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels.expert_activation import ExpertActivation, activate_experts_backward
from ..kernels.grouped_matmul import (
    add_grouped_weight_gradient,
    grouped_matmul,
    grouped_row_sums,
    grouped_weight_gradient,
)
from ..kernels.spec import accumulation_dtype
from .moe_exchange import (
    FIRST_PIECE,
    NAME,
    Call,
    Experts,
    Received,
    Returns,
    selected,
    summed,
)
from .moe_routes import ExpertPlacement, Pairs, pairs_of, sum_of_experts
from .profiling import span


class Wants(NamedTuple):
    """Which gradients are wanted. ``x`` and ``weights`` must be alike on all ranks: they travel."""

    x: bool
    weights: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool


#: Where gradients of w1 and w2 are added, in the accumulation dtype; None: nowhere, they are returned.
MainGrads = tuple[Tensor | None, Tensor | None]


class Gradients(NamedTuple):
    """None where not wanted, or added to a main_grad.

    ``x`` [T, H], ``weights`` [T, K] in the accumulation dtype; the others as in Experts.
    """

    x: Tensor | None
    weights: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None


class _Backward:
    """The experts' backward, piece by piece; gradients of what the experts are made of come at the end."""

    def __init__(self, call: Call, experts: Experts, activation: ExpertActivation, wants: Wants, main_grads: MainGrads):
        self._call, self._experts, self._activation, self._wants = call, experts, activation, wants
        self._main_grads = main_grads
        self._pieces: list[tuple[Pairs, Tensor, Tensor, Tensor, Tensor]] = []
        shapes = (experts.w1.shape[:2], wants.b1), (experts.w2.shape[:2], wants.b2)
        self._db1, self._db2 = (
            torch.zeros(shape, dtype=call.wide, device=experts.w1.device) if want else None for shape, want in shapes
        )

    def columns(self) -> list[tuple[int, torch.dtype]]:
        """Of what goes back for each row."""
        call, wants = self._call, self._wants
        return [(call.features, call.dtype)] * wants.x + [(call.top_k, call.wide)] * wants.weights

    def piece(self, rows: Tensor, dout: Tensor, weights: Tensor, pairs: Pairs, h: Tensor) -> list[Tensor]:
        """What goes back: the gradients of ``rows`` [n, H] and of ``weights`` [n, K], as far as they are wanted."""
        experts, wants, answer = self._experts, self._wants, []
        dy = dout.index_select(0, pairs.rows)  # [P, H], not yet weighted
        of_pairs = weights[pairs.rows, pairs.slots]
        da = grouped_matmul(dy, experts.w2.transpose(1, 2), pairs.counts)
        made = activate_experts_backward(h, da, of_pairs, self._activation)
        if wants.x:
            dx = grouped_matmul(made.h, experts.w1.transpose(1, 2), pairs.counts)
            answer.append(sum_of_experts(dx, None, pairs).to(self._call.dtype))
        if wants.weights:
            dots = made.weights
            if experts.b2 is not None and self._call.adds_bias():
                dots = dots + _dots_with_bias(dy, experts.b2, pairs.counts)
            dweights = torch.zeros(weights.shape, dtype=self._call.wide, device=weights.device)
            dweights[pairs.rows, pairs.slots] = dots
            answer.append(dweights)
        if self._db1 is not None:
            self._db1 += grouped_row_sums(made.h, pairs.counts)
        if self._db2 is not None:
            self._db2 += grouped_row_sums(dy, pairs.counts, of_pairs)
        if wants.w1 or wants.w2:
            self._pieces.append((pairs, rows, dy, made.scaled, made.h))
        return answer

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of w1, b1, w2, b2: one matmul an expert, over the rows of all ranks."""
        into1, into2 = self._main_grads
        experts, pieces = self._experts, self._pieces
        counts = [sum(piece[0].counts[e] for piece in pieces) for e in range(self._call.local)]
        all_pairs = [piece[0] for piece in pieces]
        dw1 = torch.zeros_like(experts.w1) if self._wants.w1 and not pieces and into1 is None else None
        dw2 = torch.zeros_like(experts.w2) if self._wants.w2 and not pieces and into2 is None else None
        with span(NAME, "wgrad"):
            if self._wants.w2 and pieces:
                dys = _by_expert(all_pairs, [piece[2] for piece in pieces], self._call.local)
                scaled = _by_expert(all_pairs, [piece[3] for piece in pieces], self._call.local)
                dw2 = _weight_gradient(into2, dys, scaled, counts, experts.w2)
                del dys, scaled
            if self._wants.w1 and pieces:
                rows = [piece[1].index_select(0, piece[0].rows) for piece in pieces]
                xs = _by_expert(all_pairs, rows, self._call.local)
                dhs = _by_expert(all_pairs, [piece[4] for piece in pieces], self._call.local)
                dw1 = _weight_gradient(into1, dhs, xs, counts, experts.w1)
        db1 = None if self._db1 is None or experts.b1 is None else self._db1.to(experts.b1.dtype)
        db2 = None if self._db2 is None or experts.b2 is None else self._db2.to(experts.b2.dtype)
        return dw1, db1, dw2, db2


def backward(
    group: ProcessGroup | None,
    dout: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    received: Received,
    placement: ExpertPlacement,
    experts: Experts,
    activation: ExpertActivation,
    chunks: int | None,
    wants: Wants,
    details: str,
    main_grads: MainGrads = (None, None),
) -> Gradients:
    """The gradients of :func:`.moe_forward.forward`; ``dout`` [T, H], the other tensors as there."""
    call = Call(group, x, ids, placement, chunks)
    weights = weights.to(call.wide)
    work = _Backward(call, experts, activation, wants, main_grads)
    if group is None:
        own = _own_backward(call, work, dout, x, ids, weights, received.own_h)
        return _gradients(call, x, weights, [own], wants, work.finish())
    with call.messages("backward", f"{details}, gradients of x {wants.x}, of weights {wants.weights}") as messages:
        counts = call.from_peers(received.counts)
        rounds = call.rounds(counts)
        douts = dout.new_empty(received.rows.shape)
        call.post_rows(messages, dout, rounds, douts)
        returns = Returns(call, messages, work.columns(), x)
        own, done = _own_backward(call, work, dout, x, ids, weights, received.own_h), 0
        for number, pieces in enumerate(rounds):
            for piece in pieces:
                some = slice(piece.start, piece.stop)
                messages.wait(piece.source, FIRST_PIECE + number, douts[some])
                pairs = pairs_of(received.ids[some], call.local)
                h = received.h[done : done + pairs.size]
                done += pairs.size
                with span(NAME, "dgrad of a piece"):
                    answer = work.piece(received.rows[some], douts[some], received.weights[some], pairs, h)
                returns.answer(piece, answer)
            returns.close_round(number)
        of_experts = work.finish()
        return _gradients(call, x, weights, returns.wait(own), wants, of_experts)


def _own_backward(
    call: Call, work: _Backward, dout: Tensor, x: Tensor, ids: Tensor, weights: Tensor, own_h: Tensor
) -> list[Tensor]:
    """What :meth:`_Backward.piece` returns, for this rank's own tokens."""
    tokens = call.tokens[call.rank]
    local = call.placement.local(selected(ids, tokens), call.rank)
    own_weights, done = selected(weights, tokens), 0
    parts = [torch.empty(tokens.shape[0], n, dtype=dtype, device=x.device) for n, dtype in work.columns()]
    for piece in call.own():
        some = slice(piece.start, piece.stop)
        pairs = pairs_of(local[some], call.local)
        h = own_h[done : done + pairs.size]
        done += pairs.size
        rows, douts = (t.index_select(0, tokens[some]) for t in (x, dout))
        for part, made in zip(parts, work.piece(rows, douts, own_weights[some], pairs, h), strict=True):
            part[some] = made
    return parts


def _gradients(
    call: Call,
    x: Tensor,
    weights: Tensor,
    parts: list[list[Tensor]],
    wants: Wants,
    of_experts: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> Gradients:
    """Sums over what each rank has sent back."""
    dx = summed(call, x, [part[0] for part in parts]) if wants.x else None
    dweights = summed(call, weights, [part[-1] for part in parts]) if wants.weights else None
    return Gradients(dx, dweights, *of_experts)


def _weight_gradient(into: Tensor | None, dy: Tensor, x: Tensor, counts: list[int], weight: Tensor) -> Tensor | None:
    if into is None:
        return grouped_weight_gradient(dy, x, counts, weight)
    add_grouped_weight_gradient(into, dy, x, counts)
    return None


def _by_expert(pairs: Sequence[Pairs], tensors: Sequence[Tensor], experts: int) -> Tensor:
    """Rows of several pieces, each sorted by expert, as one tensor sorted by expert."""
    if len(tensors) == 1:
        return tensors[0]
    runs = [tensor.split(piece.counts) for piece, tensor in zip(pairs, tensors, strict=True)]
    return torch.cat([run[e] for e in range(experts) for run in runs])


def _dots_with_bias(dy: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
    """dy[p] . bias[e] for the rows of each expert. [P] in the accumulation dtype"""
    wide = accumulation_dtype(dy.dtype)
    runs = dy.split(list(counts))
    return torch.cat([run.to(wide) @ bias[e].to(wide) for e, run in enumerate(runs)])
