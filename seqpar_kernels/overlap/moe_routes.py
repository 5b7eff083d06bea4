"""Which tokens go to which rank, and which of its experts they meet there.

A token goes to a rank once, however many of its experts are there, and comes back once, as the weighted sum of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.spec import accumulation_dtype
from ..layout import split_point

#: How experts may be divided among ranks.
WAYS = ("ep", "tp")

#: Pairs of a token and an expert for which a round of messages pays: the rows of a matmul, for each expert.
_ROWS_PER_EXPERT = 64
_MOST_ROUNDS = 4


class ExpertPlacement(NamedTuple):
    """Where experts are. ``"ep"``: whole ones, cut by number as ``tensor_split``. ``"tp"``: all, each cut inside."""

    experts: int  # of all ranks
    ranks: int
    way: str  # "ep" or "tp"

    def of(self, rank: int) -> range:
        """The experts of ``rank``."""
        if self.way == "tp":
            return range(self.experts)
        return range(*(split_point(self.experts, self.ranks, r) for r in (rank, rank + 1)))

    def local(self, ids: Tensor, rank: int) -> Tensor:
        """Numbers of experts among those of ``rank``, -1 for the others and for no expert. int32, like ``ids``"""
        here = self.of(rank)
        return torch.where((ids >= here.start) & (ids < here.stop), ids - here.start, -1).to(torch.int32)

    def tokens(self, ids: Tensor, rank: int) -> Tensor:
        """The tokens with an expert on ``rank``, ascending. ids [T, K] -> [n] int64"""
        here = self.of(rank)
        return ((ids >= here.start) & (ids < here.stop)).any(1).nonzero().view(-1)

    def loads(self, ids: Tensor) -> list[int]:
        """How many pairs of a token and an expert each rank gets of ``ids`` [T, K]."""
        known = ids[(ids >= 0) & (ids < self.experts)]
        of_expert: list[int] = torch.bincount(known, minlength=self.experts).tolist()
        return [sum(of_expert[here.start : here.stop]) for here in map(self.of, range(self.ranks))]

    def rounds(self, tokens: int, pairs: int, rank: int, chunks: int | None) -> int:
        """In how many pieces each peer's tokens go to ``rank``; all ranks ask with the same numbers.

        Args:
            tokens: how many go there from all peers.
            pairs: of these tokens and experts there.
            rank: whose experts they meet.
            chunks: how many the caller wants; None: as many as leave the experts' matmuls full.
        """
        pieces = min(_MOST_ROUNDS, pairs // max(1, len(self.of(rank))) // _ROWS_PER_EXPERT)
        return max(1, min(pieces if chunks is None else chunks, tokens))


def best_way(experts: int, inner: int, ranks: int) -> str:
    """The member of :data:`WAYS` that sends fewer rows: each of the ranks of K experts gets a token, or all ranks.

    ``"tp"`` where some ranks would have no expert and ``inner`` divides, else ``"ep"``.
    """
    return "tp" if experts < ranks and inner % ranks == 0 else "ep"


class Strip(NamedTuple):
    """Consecutive pairs that are worked on together. On a CPU those of one expert: they may fit its cache."""

    pairs: slice
    experts: slice
    counts: list[int]  # of these experts


class Pairs(NamedTuple):
    """Pairs of a row and one of its experts, sorted by expert, for one piece of rows."""

    rows: Tensor  # [P] int64, row of each pair
    slots: Tensor  # [P] int64, which of its row's K experts
    counts: list[int]  # pairs of each expert
    where: Tensor  # [n, K] int64, number of each pair in this order, -1 where there is no expert

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def strips(self, by_run: bool) -> list[Strip]:
        """The pairs of one expert after another, or all at once."""
        if not by_run:
            return [Strip(slice(0, self.size), slice(0, len(self.counts)), self.counts)]
        ends = itertools.accumulate(self.counts)
        some = ((e, end, n) for e, (end, n) in enumerate(zip(ends, self.counts, strict=True)) if n)
        return [Strip(slice(end - n, end), slice(e, e + 1), [n]) for e, end, n in some]


class PairsByExpert:
    """The pairs of several batches in one order, those of one expert together, and in it those of one batch."""

    def __init__(self, batches: Sequence[Pairs]):
        self.counts = [sum(of_expert) for of_expert in zip(*(pairs.counts for pairs in batches), strict=True)]
        self._batches, self._starts = batches, []  # where the pairs of each expert begin, of each batch
        starts = [0, *itertools.accumulate(self.counts)][:-1]
        for pairs in batches:
            self._starts.append(starts)
            starts = [start + count for start, count in zip(starts, pairs.counts, strict=True)]

    @property
    def size(self) -> int:
        return sum(self.counts)

    def place(self, batch: int, strip: Strip) -> slice | Tensor:
        """Where the pairs of ``strip`` are: numbers [P] int64 where they do not lie together."""
        starts, size = self._starts[batch][strip.experts], strip.pairs.stop - strip.pairs.start
        if len(strip.counts) == 1 or len(self._batches) == 1:
            first = starts[0] if starts else 0
            return slice(first, first + size)
        before = itertools.accumulate(strip.counts, initial=0)
        shifts = torch.tensor([start - at for start, at in zip(starts, before, strict=False)])
        numbers = torch.arange(size) + shifts.repeat_interleave(torch.tensor(strip.counts))
        return numbers.to(self._batches[batch].rows.device)


def pairs_of(local: Tensor, experts: int) -> Pairs:
    """``local`` [n, K]: numbers of experts, -1 for none."""
    flat = local.reshape(-1)
    some = (flat >= 0).nonzero().view(-1)
    order = some[torch.argsort(flat[some], stable=True)]
    top_k = local.shape[1]
    where = torch.full_like(flat, -1, dtype=torch.int64)
    where[order] = torch.arange(order.shape[0], device=order.device)
    counts: list[int] = torch.bincount(flat[order], minlength=experts).tolist()
    rows = torch.div(order, top_k, rounding_mode="floor")
    return Pairs(rows, order - rows * top_k, counts, where.view(local.shape))


def sum_of_experts(y: Tensor, weights: Tensor | None, pairs: Pairs) -> Tensor:
    """The sum over each row's experts, weighted; in the order of its K slots, so that no bit depends on timing.

    Args:
        y: [P, H], in the order of ``pairs``.
        weights: [n, K], in the accumulation dtype; None for 1.

    Returns:
        [n, H] in the accumulation dtype.
    """
    rows, top_k = pairs.where.shape
    if y.dtype == accumulation_dtype(y.dtype):  # one pass over y, in the same order
        there = pairs.where >= 0
        ends = there.sum(1).cumsum(0)
        bags = torch.cat([ends.new_zeros(1), ends])
        of_pairs = None if weights is None else weights[there]
        return torch.embedding_bag(y, pairs.where[there], bags, False, 0, False, of_pairs, True)[0]
    total = torch.zeros(rows, y.shape[1], dtype=accumulation_dtype(y.dtype), device=y.device)
    for k in range(top_k):
        some = (pairs.where[:, k] >= 0).nonzero().view(-1)
        if some.shape[0] == 0:
            continue
        values = y.index_select(0, pairs.where[some, k]).to(total.dtype)
        if weights is not None:
            values *= weights[some, k, None]
        if some.shape[0] == rows:
            total += values
        else:
            total.index_add_(0, some, values)
    return total
