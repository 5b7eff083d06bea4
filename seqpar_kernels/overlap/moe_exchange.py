"""Tokens travel to the ranks of their experts and back, while experts work on those that are there.

Every rank works on its own tokens first. A message to a peer goes in pieces: while one is multiplied the next is on its
way, and what was made of the one before is on its way back. Pieces of one number from all peers are one round: an
expert takes its rows of all of them in one matmul. The weights' gradients come last, behind the last messages. Sums
over ranks run in rank order in fp32 (fp64).

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

from ..kernels.spec import accumulation_dtype
from ..layout import group_rank, group_size, split_point
from .messages import Messages
from .moe_routes import ExpertPlacement

NAME = "moe_mlp"

#: Messages between two ranks, in the order in which they are sent: what each index stands for.
COUNT, IDS, WEIGHTS, FIRST_PIECE = range(4)
_WAY_BACK = 1 << 20  # more than there are pieces


class Experts(NamedTuple):
    """The weights of this rank's experts.

    ``"ep"``: whole ones. ``"tp"``: all, I/t of each; a bias of the second matmul is whole and alike on every rank.
    """

    w1: Tensor  # [E, W, H], W = 2 * I with a gate
    b1: Tensor | None  # [E, W]
    w2: Tensor  # [E, H, I]
    b2: Tensor | None  # [E, H]


class Received(NamedTuple):
    """What a rank keeps of its peers' tokens for the backward. Rounds lie one after the other."""

    counts: Tensor  # [t, t, 2] int64 on the CPU: tokens of rank i that go to j, and pairs of a token and an expert
    rows: Tensor  # [N, H]
    ids: Tensor  # [N, K] int32, numbers among this rank's experts, -1 for none
    weights: Tensor  # [N, K] in the accumulation dtype
    own_h: Tensor  # [P, W], before the activation, of this rank's own tokens
    h: Tensor  # [P, W], of the peers' tokens


class Piece(NamedTuple):
    """Rows of one source that travel together."""

    source: int
    number: int
    start: int  # among the rows that the source sends there
    stop: int
    at: int = 0  # where they begin among the rows of all peers

    @property
    def place(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


class Round(NamedTuple):
    """The pieces of one number from all peers. They lie together, the next rank's first: one matmul takes them all."""

    start: int
    stop: int
    pieces: list[Piece]


class Call:
    """One call on one rank: who gets which tokens, and in which pieces. The pieces are known after :meth:`settle`."""

    def __init__(
        self,
        group: ProcessGroup | None,
        x: Tensor,
        ids: Tensor,
        placement: ExpertPlacement,
        chunks: int | None,
        bound: int | None,
    ):
        self.group, self.placement, self.chunks, self.bound = group, placement, chunks, bound
        self.rank, self.ranks = group_rank(group), group_size(group)
        self.peers = [(self.rank + k) % self.ranks for k in range(1, self.ranks)]
        self.local = len(placement.of(self.rank))
        self.top_k, self.features = ids.shape[1], x.shape[1]
        self.dtype, self.wide = x.dtype, accumulation_dtype(x.dtype)
        self.tokens = [placement.tokens(ids, rank) for rank in range(self.ranks)]
        self._token_bytes = self.top_k * 2 * self.features * x.element_size()  # of a token's pairs: x and y
        #: This rank's rows for each peer, counted among ``tokens[peer]``.
        self.leaving: dict[int, list[Piece]] = {}
        #: As many as there are numbers of pieces in either direction.
        self.rounds: list[Round] = []

    def settle(self, counts: Tensor) -> None:
        """Cut what travels. All that goes to one rank is cut into the same number of pieces, which all ranks know.

        Args:
            counts: ``Received.counts``.
        """
        table: list[list[list[int]]] = counts.tolist()
        numbers: list[int] = []
        for target in range(self.ranks):
            tokens, pairs = (sum(row[target][i] for r, row in enumerate(table) if r != target) for i in (0, 1))
            numbers.append(self.placement.rounds(tokens, pairs, target, self.chunks))
        self.leaving = {peer: list(_cut(table[self.rank][peer][0], numbers[peer], self.rank)) for peer in self.peers}
        mine = {peer: list(_cut(table[peer][self.rank][0], numbers[self.rank], peer)) for peer in self.peers}
        every = itertools.chain(*self.leaving.values(), *mine.values())
        at = 0
        for number in range(max((piece.number + 1 for piece in every), default=0)):
            start, pieces = at, []
            for piece in itertools.chain.from_iterable(mine.values()):
                if piece.number == number:
                    pieces.append(piece._replace(at=at))
                    at += piece.stop - piece.start
            self.rounds.append(Round(start, at, pieces))

    @property
    def arriving(self) -> int:
        """Rows of all peers."""
        return self.rounds[-1].stop if self.rounds else 0

    def counts(self, ids: Tensor) -> Tensor:
        """This rank's row of ``Received.counts``."""
        tokens = [some.shape[0] for some in self.tokens]
        return torch.tensor(list(zip(tokens, self.placement.loads(ids), strict=True)))

    def bounded(self, start: int, stop: int) -> list[slice]:
        """Rows as many at a time as the experts may take within the bound on the workspace; one slice of none."""
        step = stop - start if self.bound is None else self.bound // max(1, self._token_bytes)
        return [slice(at, min(at + max(1, step), stop)) for at in range(start, max(stop, start + 1), max(1, step))]

    def post_rows(self, messages: Messages, t: Tensor, into: Tensor) -> None:
        """Start to send the rows of t [T, H] that each peer's experts want, and to receive the rounds in ``into``."""
        rows = {peer: selected(t, self.tokens[peer]) for peer in self.peers}
        for number, incoming in enumerate(self.rounds):
            out = [(peer, piece) for peer in self.peers for piece in self.leaving[peer] if piece.number == number]
            messages.post(
                [(peer, FIRST_PIECE + number, rows[peer][p.start : p.stop]) for peer, p in out],
                [(p.source, FIRST_PIECE + number, into[p.place]) for p in incoming.pieces],
            )

    def wait_rows(self, messages: Messages, number: int, into: Tensor) -> None:
        """Return when all rows of a round are in ``into``."""
        for piece in self.rounds[number].pieces:
            messages.wait(piece.source, FIRST_PIECE + number, into[piece.place])

    def adds_bias(self) -> bool:
        """Of ranks that each have a part of all experts one adds the second bias."""
        return self.placement.way == "ep" or self.rank == 0

    def routing_room(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For numbers of experts and weights of tokens of peers, [n, K]."""
        ids = torch.empty(tokens, self.top_k, dtype=torch.int32, device=device)
        return ids, torch.empty_like(ids, dtype=self.wide)

    def messages(self, direction: str, details: str) -> Messages:
        assert self.group is not None
        signature = (
            f"{NAME} {direction}(H={self.features}, K={self.top_k}, {self.placement.experts} experts by "
            f"{self.placement.way}, {self.dtype}, chunks={self.chunks}, {details}, max_workspace_bytes={self.bound})"
        )
        return Messages(self.group, signature, "tokens")


class Returns:
    """The results of the peers for this rank's tokens: tensors with a row for each token.

    Where receives may not be posted early (NCCL), sends and receives of one piece number are one post on every rank,
    and all ranks post in the order of the numbers.
    """

    def __init__(self, call: Call, messages: Messages, columns: Sequence[tuple[int, torch.dtype]], like: Tensor):
        self._call, self._messages, self._columns = call, messages, columns
        self._parts = {
            peer: [torch.empty(call.tokens[peer].shape[0], n, dtype=dtype, device=like.device) for n, dtype in columns]
            for peer in call.peers
        }
        self._early = messages.takes_receives_early(like.device.type)
        if self._early:
            messages.post([], self._receives(None))

    def answer(self, number: int, parts: Sequence[Tensor]) -> None:
        """Send what was made of a round, tensors with its rows, to the sources of these."""
        start, answers = self._call.rounds[number].start, []
        for piece in self._call.rounds[number].pieces:
            some = slice(piece.place.start - start, piece.place.stop - start)
            answers += self._named(piece.source, piece, [part[some] for part in parts])
        self._messages.post(answers, [] if self._early else self._receives(number))

    def wait(self, own: Sequence[Tensor]) -> list[list[Tensor]]:
        """The results of every rank in turn; ``own`` are this rank's."""
        for message in self._receives(None):
            self._messages.wait(*message)
        self._parts[self._call.rank] = list(own)
        return [self._parts[rank] for rank in range(self._call.ranks)]

    def _receives(self, number: int | None) -> list[tuple[int, int, Tensor]]:
        """Of the pieces of one number, or of all."""
        found = []
        for peer in self._call.peers:
            for piece in self._call.leaving[peer]:
                if number is None or piece.number == number:
                    parts = [part[piece.start : piece.stop] for part in self._parts[peer]]
                    found += self._named(peer, piece, parts)
        return found

    def _named(self, peer: int, piece: Piece, parts: Sequence[Tensor]) -> list[tuple[int, int, Tensor]]:
        first = _WAY_BACK + piece.number * len(self._columns)
        return [(peer, first + i, part) for i, part in enumerate(parts)]


def _cut(tokens: int, pieces: int, source: int) -> Iterator[Piece]:
    """The pieces of ``tokens`` that have rows."""
    cuts = [split_point(tokens, pieces, i) for i in range(pieces + 1)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        if stop > start:
            yield Piece(source, number, start, stop)


def summed(call: Call, like: Tensor, parts: Sequence[Tensor]) -> Tensor:
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


def part_of(bias: Tensor | None, experts: slice) -> Tensor | None:
    return None if bias is None else bias[experts]


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def selected(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of t, contiguous; ascending ones, so that as many as there are are all."""
    return t.contiguous() if rows.shape[0] == t.shape[0] else t.index_select(0, rows)
