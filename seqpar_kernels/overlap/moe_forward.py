"""The forward of a mixture of experts over several ranks; see :mod:`.moe_exchange`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels.expert_activation import ExpertActivation, activate_experts
from ..kernels.grouped_matmul import grouped_matmul
from .messages import Messages
from .moe_exchange import (
    COUNT,
    IDS,
    NAME,
    WEIGHTS,
    Call,
    Experts,
    Received,
    Returns,
    joined,
    selected,
    summed,
)
from .moe_routes import ExpertPlacement, pairs_of, sum_of_experts
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
    bound: int | None,
    details: str,
) -> tuple[Tensor, Received]:
    """The weighted sum of each token's experts.

    Args:
        x: [T, H], this rank's tokens.
        ids: [T, K] integers, the experts of each token; a number outside of 0 .. E - 1 is no expert.
        weights: [T, K], the weights of each token's experts.
        bound: the most bytes of rows before and after their experts at a time; None: any.
        details: what else the ranks must have alike, for messages.

    Returns:
        [T, H], and what the backward wants.
    """
    call = Call(group, x, ids, placement, chunks, bound)
    weights = weights.to(call.wide)
    if group is None:
        own, own_h = _own_forward(call, x, ids, weights, experts, activation)
        nothing = x.new_empty(0, call.features), *call.routing_room(0, x.device)
        return summed(call, x, [own]), Received(call.counts(ids)[None], *nothing, own_h, torch.empty_like(own_h[:0]))
    with call.messages("forward", details) as messages:
        all_counts = _exchange_counts(call, messages, ids)
        call.settle(all_counts)
        rows = x.new_empty(call.arriving, call.features)
        got_ids, got_weights = call.routing_room(call.arriving, x.device)
        meta = _post_routing(call, messages, ids, weights)
        call.post_rows(messages, x, rows)
        returns = Returns(call, messages, [(call.features, call.dtype)], x)
        own, own_h = _own_forward(call, x, ids, weights, experts, activation)
        _wait_routing(call, messages, meta, got_ids, got_weights)
        h, done = x.new_empty(int((got_ids >= 0).sum()), experts.w1.shape[1]), 0
        for number, incoming in enumerate(call.rounds):
            call.wait_rows(messages, number, rows)
            some = slice(incoming.start, incoming.stop)
            with span(NAME, "experts on a round"):
                made, done = _experts(call, rows, got_ids, got_weights, some, experts, activation, h, done)
            returns.answer(number, [made])
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


def _post_routing(call: Call, messages: Messages, ids: Tensor, weights: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Start to send this rank's ids and weights, and to receive the peers': those, by peer."""
    sends, receives, meta = [], [], {}
    for peer in call.peers:
        tokens = call.tokens[peer]
        sends += [
            (peer, IDS, call.placement.local(selected(ids, tokens), peer)),
            (peer, WEIGHTS, selected(weights, tokens)),
        ]
        got = sum(piece.stop - piece.start for r in call.rounds for piece in r.pieces if piece.source == peer)
        meta[peer] = call.routing_room(got, ids.device)
        receives += [(peer, index, t) for index, t in zip((IDS, WEIGHTS), meta[peer], strict=True)]
    messages.post(sends, receives)
    return meta


def _wait_routing(
    call: Call, messages: Messages, meta: dict[int, tuple[Tensor, Tensor]], ids: Tensor, weights: Tensor
) -> None:
    """Lay the peers' ids and weights as their rows lie."""
    for peer in call.peers:
        for index, t in zip((IDS, WEIGHTS), meta[peer], strict=True):
            messages.wait(peer, index, t)
    for incoming in call.rounds:
        for piece in incoming.pieces:
            for into, t in zip((ids, weights), meta[piece.source], strict=True):
                into[piece.place] = t[piece.start : piece.stop]


def _own_forward(
    call: Call, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, activation: ExpertActivation
) -> tuple[Tensor, Tensor]:
    """This rank's experts on its own tokens that have some here: [n, H] and h [P, W]."""
    tokens = call.tokens[call.rank]
    local = call.placement.local(selected(ids, tokens), call.rank)
    h = x.new_empty(int((local >= 0).sum()), experts.w1.shape[1])
    with span(NAME, "experts on own tokens"):
        everything = slice(0, tokens.shape[0])
        out, _ = _experts(call, x, local, selected(weights, tokens), everything, experts, activation, h, 0, tokens)
    return out, h


def _experts(
    call: Call,
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    some: slice,
    experts: Experts,
    activation: ExpertActivation,
    h: Tensor,
    done: int,
    tokens: Tensor | None = None,
) -> tuple[Tensor, int]:
    """The weighted sums of the experts of ``some`` of ``rows``, [n, H]; ``h`` [P, W] is filled from row ``done`` on.

    Args:
        ids: [N, K], numbers of experts.
        weights: [N, K].
        tokens: [N], which of ``rows`` have these; None: all.

    Returns:
        The sums, and how many rows ``h`` has now.
    """
    parts, bias = [], experts.b2 if call.adds_bias() else None
    for part in call.bounded(some.start, some.stop):
        pairs = pairs_of(ids[part], call.local)
        mine = h[done : done + pairs.size]
        done += pairs.size
        source = pairs.rows + part.start if tokens is None else tokens[part][pairs.rows]
        grouped_matmul(rows.index_select(0, source), experts.w1, pairs.counts, experts.b1, out=mine)
        y = grouped_matmul(activate_experts(mine, activation), experts.w2, pairs.counts, bias)
        parts.append(sum_of_experts(y, weights[part], pairs).to(call.dtype))
    return joined(parts), done
