"""The forward of a mixture of experts over several ranks; see :mod:`.moe_exchange`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels.expert_activation import ExpertActivation, activate_experts
from ..kernels.grouped_matmul import grouped_matmul
from .messages import Messages
from .moe_exchange import (
    COUNT,
    FIRST_PIECE,
    IDS,
    NAME,
    WEIGHTS,
    Call,
    Experts,
    Received,
    Returns,
    selected,
    summed,
)
from .moe_routes import ExpertPlacement, Pairs, pairs_of, sum_of_experts
from .profiling import span


def forward(
    group: ProcessGroup | None,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    placement: ExpertPlacement,
    experts: Experts,
    activation: ExpertActivation,
    chunks: int | None,
    details: str,
) -> tuple[Tensor, Received]:
    """The weighted sum of each token's experts.

    Args:
        x: [T, H], this rank's tokens.
        ids: [T, K] integers, the experts of each token; a number outside of 0 .. E - 1 is no expert.
        weights: [T, K], the weights of each token's experts.
        details: what else the ranks must have alike, for messages.

    Returns:
        [T, H], and what the backward wants.
    """
    call = Call(group, x, ids, placement, chunks)
    weights = weights.to(call.wide)
    if group is None:
        own, own_h = _own_forward(call, x, ids, weights, experts, activation)
        return summed(call, x, [own]), Received(
            call.counts(ids)[None], *call.room(0, x), own_h, torch.empty_like(own_h[:0])
        )
    with call.messages("forward", details) as messages:
        all_counts = _exchange_counts(call, messages, ids)
        counts = call.from_peers(all_counts)
        rows, got_ids, got_weights = call.room(sum(counts), x)
        rounds = call.rounds(counts)
        meta = _post_routing(call, messages, ids, weights, counts, (got_ids, got_weights))
        call.post_rows(messages, x, rounds, rows)
        returns = Returns(call, messages, [(call.features, call.dtype)], x)
        own, own_h = _own_forward(call, x, ids, weights, experts, activation)
        for message in meta:
            messages.wait(*message)
        h, done = x.new_empty(int((got_ids >= 0).sum()), experts.w1.shape[1]), 0
        for number, pieces in enumerate(rounds):
            for piece in pieces:
                some = slice(piece.start, piece.stop)
                messages.wait(piece.source, FIRST_PIECE + number, rows[some])
                with span(NAME, "experts on a piece"):
                    pairs = pairs_of(got_ids[some], call.local)
                    mine = slice(done, done + pairs.size)
                    made = _experts(call, rows[some], got_weights[some], pairs, experts, activation, h[mine])
                done += pairs.size
                returns.answer(piece, [made])
            returns.close_round(number)
        parts = [part for (part,) in returns.wait([own])]
        return summed(call, x, parts), Received(all_counts, rows, got_ids, got_weights, own_h, h)


def _exchange_counts(call: Call, messages: Messages, ids: Tensor) -> Tensor:
    """``Received.counts``. Ranks tell each other all of their counts, for :func:`explain`: 16 bytes for each rank."""
    own = call.counts(ids)
    sent = own.to(ids.device)
    receives = [(peer, COUNT, torch.empty_like(sent)) for peer in call.peers]
    messages.post([(peer, COUNT, sent) for peer in call.peers], receives)
    counts = torch.empty(call.ranks, *own.shape, dtype=torch.int64)
    counts[call.rank] = own
    for peer, index, buffer in receives:
        messages.wait(peer, index, buffer)
        counts[peer] = buffer
    return counts


def _post_routing(
    call: Call,
    messages: Messages,
    ids: Tensor,
    weights: Tensor,
    counts: Sequence[int],
    room: tuple[Tensor, Tensor],
) -> list[tuple[int, int, Tensor]]:
    """Start to send this rank's ids and weights, and to receive the peers' in ``room``; returns those messages."""
    got_ids, got_weights = room
    sends, meta, at = [], [], 0
    for peer in call.peers:
        tokens, some = call.tokens[peer], slice(at, at + counts[peer])
        sends += [
            (peer, IDS, call.placement.local(selected(ids, tokens), peer)),
            (peer, WEIGHTS, selected(weights, tokens)),
        ]
        meta += [(peer, IDS, got_ids[some]), (peer, WEIGHTS, got_weights[some])]
        at += counts[peer]
    messages.post(sends, meta)
    return meta


def _own_forward(
    call: Call, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, activation: ExpertActivation
) -> tuple[Tensor, Tensor]:
    """This rank's experts on its own tokens that have some here: [n, H] and h [P, W]."""
    tokens = call.tokens[call.rank]
    local = call.placement.local(selected(ids, tokens), call.rank)
    own_weights = selected(weights, tokens)
    h, done = x.new_empty(int((local >= 0).sum()), experts.w1.shape[1]), 0
    out = x.new_empty(tokens.shape[0], call.features)
    with span(NAME, "experts on own tokens"):
        for piece in call.own():
            some = slice(piece.start, piece.stop)
            pairs = pairs_of(local[some], call.local)
            mine = slice(done, done + pairs.size)
            rows = x.index_select(0, tokens[some])
            out[some] = _experts(call, rows, own_weights[some], pairs, experts, activation, h[mine])
            done += pairs.size
    return out, h


def _experts(
    call: Call,
    rows: Tensor,
    weights: Tensor,
    pairs: Pairs,
    experts: Experts,
    activation: ExpertActivation,
    h: Tensor,
) -> Tensor:
    """The weighted sum of the experts of ``rows`` [n, H], like them; ``h`` [P, W] is filled."""
    grouped_matmul(rows.index_select(0, pairs.rows), experts.w1, pairs.counts, experts.b1, out=h)
    bias = experts.b2 if call.adds_bias() else None
    y = grouped_matmul(activate_experts(h, activation), experts.w2, pairs.counts, bias)
    return sum_of_experts(y, weights, pairs).to(call.dtype)
