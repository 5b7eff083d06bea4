"""Tokens travel to the ranks of their experts and back, while experts work on those that are there.

Every rank works on its own tokens first. A message to a peer goes in pieces: while one is multiplied the next is on its
way, and what was made of the one before is on its way back. The weights' gradients come last, behind the last messages.
Sums over ranks run in rank order in fp32 (fp64).

| step | forward | backward |
|---|---|---|
| to the experts | number of tokens; their experts and weights [n, K]; rows [n, H] | gradients of the output [n, H] |
| there | h = x W1, a = act(h), y = a W2, weighted sum over a token's experts | da, dh, dx; dW1, dW2 at the end |
| back | rows [n, H], summed over ranks | dx [n, H] and gradients of the weights [n, K], summed over ranks |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels.expert_activation import ExpertActivation, activate_experts, activate_experts_backward
from ..kernels.grouped_matmul import grouped_matmul, grouped_row_sums, grouped_weight_gradient
from ..kernels.spec import accumulation_dtype
from ..layout import group_rank, group_size, split_point
from . import planner
from .messages import Messages
from .moe_routes import ExpertPlacement, Pairs, pairs_of, sum_of_experts
from .profiling import span

_NAME = "moe_mlp"


class Experts(NamedTuple):
    """The weights of this rank's experts.

    ``"ep"``: whole ones. ``"tp"``: all, I/t of each; a bias of the second matmul is whole and alike on every rank.
    """

    w1: Tensor  # [E, W, H], W = 2 * I with a gate
    b1: Tensor | None  # [E, W]
    w2: Tensor  # [E, H, I]
    b2: Tensor | None  # [E, H]


class Received(NamedTuple):
    """What a rank keeps of its peers' tokens for the backward. Sources lie one after the other, the next rank first."""

    counts: Tensor  # [t] int64 on the CPU, tokens of each source; 0 for this rank
    rows: Tensor  # [N, H]
    ids: Tensor  # [N, K] int32, numbers among this rank's experts, -1 for none
    weights: Tensor  # [N, K] in the accumulation dtype
    own_h: Tensor  # [P, W], before the activation, of this rank's own tokens
    h: Tensor  # [P, W], of the peers' tokens


class _Piece(NamedTuple):
    """Rows of one source that travel together."""

    source: int
    number: int
    start: int  # among the rows of all peers, or of this rank
    stop: int


class _Call:
    """One call on one rank: who gets which tokens, and in which pieces."""

    def __init__(
        self,
        group: ProcessGroup | None,
        x: Tensor,
        ids: Tensor,
        placement: ExpertPlacement,
        chunks: int | None,
    ):
        self.group, self.placement, self.chunks = group, placement, chunks
        self.rank, self.ranks = group_rank(group), group_size(group)
        self.peers = [(self.rank + k) % self.ranks for k in range(1, self.ranks)]
        self.local = len(placement.of(self.rank))
        self.top_k, self.features = ids.shape[1], x.shape[1]
        self.dtype, self.wide = x.dtype, accumulation_dtype(x.dtype)
        self.tokens = [placement.tokens(ids, rank) for rank in range(self.ranks)]
        # Rows of a token's pairs, before and after the experts. Both ends of a message must come to the same number.
        self._token_bytes = self.top_k * 2 * self.features * x.element_size()

    def pieces(self, tokens: int, source: int, at: int) -> list[_Piece]:
        """The rows that ``source`` sends here, from row ``at`` on."""
        return list(self._cut(tokens, source, self.rank, at))

    def leaving(self, peer: int) -> list[_Piece]:
        """This rank's rows for ``peer``, counted among ``tokens[peer]``."""
        return list(self._cut(self.tokens[peer].shape[0], self.rank, peer, 0))

    def _cut(self, tokens: int, source: int, target: int, at: int) -> Iterator[_Piece]:
        bound = planner.max_workspace_bytes()
        pieces = self.placement.pieces(tokens, self.top_k, target, self.chunks, self._token_bytes, bound)
        cuts = [split_point(tokens, pieces, i) for i in range(pieces + 1)]
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if stop > start:
                yield _Piece(source, i, at + start, at + stop)

    def incoming(self, counts: Sequence[int]) -> list[_Piece]:
        """All pieces of all peers, first ones first."""
        found, at = [], 0
        for peer in self.peers:
            found += self.pieces(counts[peer], peer, at)
            at += counts[peer]
        return sorted(found, key=lambda piece: (piece.number, self.peers.index(piece.source)))

    def own(self) -> list[_Piece]:
        return self.pieces(self.tokens[self.rank].shape[0], self.rank, 0)

    def adds_bias(self) -> bool:
        """Of ranks that each have a part of all experts one adds the second bias."""
        return self.placement.way == "ep" or self.rank == 0

    def room(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For tokens of peers: rows [n, H], numbers of experts and weights [n, K]."""
        ids = torch.empty(tokens, self.top_k, dtype=torch.int32, device=like.device)
        return like.new_empty(tokens, self.features), ids, torch.empty_like(ids, dtype=self.wide)

    def messages(self, direction: str, details: str) -> Messages:
        assert self.group is not None
        bound = planner.max_workspace_bytes()
        signature = (
            f"{_NAME} {direction}(H={self.features}, K={self.top_k}, {self.placement.experts} experts by "
            f"{self.placement.way}, {self.dtype}, chunks={self.chunks}, {details}, max_workspace_bytes={bound})"
        )
        return Messages(self.group, signature, "tokens")


#: Messages between two ranks, in the order in which they are sent: what each index stands for.
_COUNT, _IDS, _WEIGHTS, _FIRST_PIECE = range(4)
_WAY_BACK = 1 << 20  # more than there are pieces


class _Returns:
    """What comes back from the peers for this rank's tokens: some tensors of a row for each token."""

    def __init__(self, call: _Call, messages: Messages, columns: Sequence[tuple[int, torch.dtype]], like: Tensor):
        self._call, self._messages, self._columns = call, messages, columns
        self._parts: dict[int, list[Tensor]] = {}
        receives = []
        for peer in call.peers:
            rows = call.tokens[peer].shape[0]
            self._parts[peer] = [torch.empty(rows, n, dtype=dtype, device=like.device) for n, dtype in columns]
            for piece in call.leaving(peer):
                receives += self._named(peer, piece, [part[piece.start : piece.stop] for part in self._parts[peer]])
        messages.post([], receives)

    def answer(self, piece: _Piece, parts: Sequence[Tensor]) -> None:
        """Send ``parts`` to the source of ``piece``."""
        self._messages.post(self._named(piece.source, piece, parts), [])

    def wait(self, own: Sequence[Tensor]) -> list[list[Tensor]]:
        """All that is there for this rank's tokens, of every rank in turn; ``own`` is this rank's."""
        for peer in self._call.peers:
            for piece in self._call.leaving(peer):
                parts = [part[piece.start : piece.stop] for part in self._parts[peer]]
                for message in self._named(peer, piece, parts):
                    self._messages.wait(*message)
        self._parts[self._call.rank] = list(own)
        return [self._parts[rank] for rank in range(self._call.ranks)]

    def _named(self, peer: int, piece: _Piece, parts: Sequence[Tensor]) -> list[tuple[int, int, Tensor]]:
        first = _WAY_BACK + piece.number * len(self._columns)
        return [(peer, first + i, part) for i, part in enumerate(parts)]


# --- forward ---------------------------------------------------------------------------------------------------------


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
    call = _Call(group, x, ids, placement, chunks)
    weights = weights.to(call.wide)
    if group is None:
        own, own_h = _own_forward(call, x, ids, weights, experts, activation)
        nothing = torch.zeros(1, dtype=torch.int64)
        return _summed(call, x, [own]), Received(nothing, *call.room(0, x), own_h, torch.empty_like(own_h[:0]))
    with call.messages("forward", details) as messages:
        counts = _exchange_counts(call, messages, x, ids, weights)
        rows, got_ids, got_weights = call.room(sum(counts), x)
        incoming = call.incoming(counts)
        receives, at = [], 0
        for peer in call.peers:
            some = slice(at, at + counts[peer])
            receives += [(peer, _IDS, got_ids[some]), (peer, _WEIGHTS, got_weights[some])]
            pieces = call.pieces(counts[peer], peer, at)
            receives += [(peer, _FIRST_PIECE + p.number, rows[p.start : p.stop]) for p in pieces]
            at += counts[peer]
        messages.post([], receives)
        returns = _Returns(call, messages, [(call.features, call.dtype)], x)
        own, own_h = _own_forward(call, x, ids, weights, experts, activation)
        for peer, index, buffer in receives:
            if index < _FIRST_PIECE:
                messages.wait(peer, index, buffer)
        h, done = x.new_empty(int((got_ids >= 0).sum()), experts.w1.shape[1]), 0
        for piece in incoming:
            some = slice(piece.start, piece.stop)
            messages.wait(piece.source, _FIRST_PIECE + piece.number, rows[some])
            with span(_NAME, "experts on a piece"):
                pairs = pairs_of(got_ids[some], call.local)
                mine = slice(done, done + pairs.size)
                made = _experts(call, rows[some], got_weights[some], pairs, experts, activation, h[mine])
            done += pairs.size
            returns.answer(piece, [made])
        parts = [part for (part,) in returns.wait([own])]
        return _summed(call, x, parts), Received(torch.tensor(counts), rows, got_ids, got_weights, own_h, h)


def _exchange_counts(call: _Call, messages: Messages, x: Tensor, ids: Tensor, weights: Tensor) -> list[int]:
    """Start this rank's tokens on their way. How many each rank sends here."""
    sends: list[tuple[int, int, Tensor]] = []
    for peer in call.peers:
        tokens = call.tokens[peer]
        rows = _selected(x, tokens)
        sends += [
            (peer, _COUNT, torch.tensor([tokens.shape[0]], device=x.device)),
            (peer, _IDS, call.placement.local(_selected(ids, tokens), peer)),
            (peer, _WEIGHTS, _selected(weights, tokens)),
            *((peer, _FIRST_PIECE + piece.number, rows[piece.start : piece.stop]) for piece in call.leaving(peer)),
        ]
    counted = {peer: torch.empty(1, dtype=torch.int64, device=x.device) for peer in call.peers}
    messages.post(sends, [(peer, _COUNT, buffer) for peer, buffer in counted.items()])
    counts = [0] * call.ranks
    for peer, buffer in counted.items():
        messages.wait(peer, _COUNT, buffer)
        counts[peer] = int(buffer)
    return counts


def _own_forward(
    call: _Call, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, activation: ExpertActivation
) -> tuple[Tensor, Tensor]:
    """This rank's experts on its own tokens that have some here: [n, H] and h [P, W]."""
    tokens = call.tokens[call.rank]
    local = call.placement.local(_selected(ids, tokens), call.rank)
    own_weights = _selected(weights, tokens)
    h, done = x.new_empty(int((local >= 0).sum()), experts.w1.shape[1]), 0
    out = x.new_empty(tokens.shape[0], call.features)
    with span(_NAME, "experts on own tokens"):
        for piece in call.own():
            some = slice(piece.start, piece.stop)
            pairs = pairs_of(local[some], call.local)
            mine = slice(done, done + pairs.size)
            rows = x.index_select(0, tokens[some])
            out[some] = _experts(call, rows, own_weights[some], pairs, experts, activation, h[mine])
            done += pairs.size
    return out, h


def _experts(
    call: _Call,
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


def _summed(call: _Call, like: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The sum of what the ranks have made of this rank's tokens, in rank order. Like ``like``, [T, columns]"""
    whole = [tokens.shape[0] == like.shape[0] for tokens in call.tokens]
    if len(parts) == 1 and whole[0]:
        return parts[0].to(like.dtype)
    wide = accumulation_dtype(like.dtype)
    total = torch.zeros(like.shape, dtype=wide, device=like.device)
    for rank, part in enumerate(parts):
        if whole[rank]:
            total += part
        else:
            total.index_add_(0, call.tokens[rank], part.to(wide))
    return total.to(like.dtype)


def _selected(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of t, contiguous; ascending ones, so that as many as there are are all."""
    return t.contiguous() if rows.shape[0] == t.shape[0] else t.index_select(0, rows)


# --- backward --------------------------------------------------------------------------------------------------------


class Wants(NamedTuple):
    """Which gradients are wanted. ``x`` and ``weights`` must be alike on all ranks: they travel."""

    x: bool
    weights: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool


class Gradients(NamedTuple):
    """None where not wanted. ``x`` [T, H], ``weights`` [T, K] in the accumulation dtype; the others as in Experts."""

    x: Tensor | None
    weights: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None


class _Backward:
    """The experts' backward, piece by piece; gradients of what the experts are made of come at the end."""

    def __init__(self, call: _Call, experts: Experts, activation: ExpertActivation, wants: Wants):
        self._call, self._experts, self._activation, self._wants = call, experts, activation, wants
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
        experts, pieces = self._experts, self._pieces
        counts = [sum(piece[0].counts[e] for piece in pieces) for e in range(self._call.local)]
        all_pairs = [piece[0] for piece in pieces]
        dw1 = torch.zeros_like(experts.w1) if self._wants.w1 and not pieces else None
        dw2 = torch.zeros_like(experts.w2) if self._wants.w2 and not pieces else None
        with span(_NAME, "wgrad"):
            if self._wants.w2 and pieces:
                dys = _by_expert(all_pairs, [piece[2] for piece in pieces], self._call.local)
                scaled = _by_expert(all_pairs, [piece[3] for piece in pieces], self._call.local)
                dw2 = grouped_weight_gradient(dys, scaled, counts, experts.w2)
                del dys, scaled
            if self._wants.w1 and pieces:
                rows = [piece[1].index_select(0, piece[0].rows) for piece in pieces]
                xs = _by_expert(all_pairs, rows, self._call.local)
                dhs = _by_expert(all_pairs, [piece[4] for piece in pieces], self._call.local)
                dw1 = grouped_weight_gradient(dhs, xs, counts, experts.w1)
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
) -> Gradients:
    """The gradients of :func:`forward`; ``dout`` [T, H], the other tensors as there."""
    call = _Call(group, x, ids, placement, chunks)
    weights = weights.to(call.wide)
    work = _Backward(call, experts, activation, wants)
    if group is None:
        own = _own_backward(call, work, dout, x, ids, weights, received.own_h)
        return _gradients(call, x, weights, [own], wants, work.finish())
    with call.messages("backward", f"{details}, gradients of x {wants.x}, of weights {wants.weights}") as messages:
        counts: list[int] = received.counts.tolist()
        incoming = call.incoming(counts)
        douts = dout.new_empty(received.rows.shape)
        sends = []
        for peer in call.peers:
            leaving = _selected(dout, call.tokens[peer])
            sends += [(peer, _FIRST_PIECE + p.number, leaving[p.start : p.stop]) for p in call.leaving(peer)]
        in_order = sorted(incoming, key=lambda piece: piece.start)  # as they are sent
        messages.post(sends, [(p.source, _FIRST_PIECE + p.number, douts[p.start : p.stop]) for p in in_order])
        returns = _Returns(call, messages, work.columns(), x)
        own, done = _own_backward(call, work, dout, x, ids, weights, received.own_h), 0
        for piece in incoming:
            some = slice(piece.start, piece.stop)
            messages.wait(piece.source, _FIRST_PIECE + piece.number, douts[some])
            pairs = pairs_of(received.ids[some], call.local)
            h = received.h[done : done + pairs.size]
            done += pairs.size
            with span(_NAME, "dgrad of a piece"):
                answer = work.piece(received.rows[some], douts[some], received.weights[some], pairs, h)
            returns.answer(piece, answer)
        of_experts = work.finish()
        return _gradients(call, x, weights, returns.wait(own), wants, of_experts)


def _own_backward(
    call: _Call, work: _Backward, dout: Tensor, x: Tensor, ids: Tensor, weights: Tensor, own_h: Tensor
) -> list[Tensor]:
    """What :meth:`_Backward.piece` returns, for this rank's own tokens."""
    tokens = call.tokens[call.rank]
    local = call.placement.local(_selected(ids, tokens), call.rank)
    own_weights, done = _selected(weights, tokens), 0
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
    call: _Call,
    x: Tensor,
    weights: Tensor,
    parts: list[list[Tensor]],
    wants: Wants,
    of_experts: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> Gradients:
    """Sums over what each rank has sent back."""
    dx = _summed(call, x, [part[0] for part in parts]) if wants.x else None
    dweights = _summed(call, weights, [part[-1] for part in parts]) if wants.weights else None
    return Gradients(dx, dweights, *of_experts)


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
