"""Documents of a batch on the ranks of a group: which rank holds which rows of which document. No communication.

A document of degree d is shared by d consecutive ranks, in zigzag layout, so that under a causal mask they have about
the same work; d divides the number of ranks, and the first of the d ranks is a multiple of d. So the groups for all
calls are known before the first batch: for each rank, one group of each degree.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .caches import MOST
from .layout import SequenceShard
from .sequence_layout import Intervals, count, rows_of


class Share(NamedTuple):
    """The part of one document that one rank has."""

    tokens: int
    pairs: int  # pairs of a query of this rank and a key that it sees, under a causal mask


def pairs_before(position: int) -> int:
    """Pairs of a query before ``position`` and a key that it sees."""
    return position * (position + 1) // 2


@functools.lru_cache(16 * MOST)
def shares(length: int, degree: int) -> tuple[Share, ...]:
    """The number of rows and pairs that each of ``degree`` ranks has of a document in zigzag layout."""
    found, front, back = [], 0, length
    for rank in range(degree):
        size = SequenceShard(length, degree, rank).size
        head, tail = (size + 1) // 2, size // 2
        pairs = pairs_before(front + head) - pairs_before(front) + pairs_before(back) - pairs_before(back - tail)
        found.append(Share(size, pairs))
        front, back = front + head, back - tail
    return tuple(found)


class Costs(NamedTuple):
    """The cost of a pair of a query and a key, and of a token."""

    pair: float
    token: float

    def of(self, share: Share) -> float:
        return self.pair * share.pairs + self.token * share.tokens


class Place(NamedTuple):
    """Ranks ``first .. first + degree`` share a document."""

    degree: int
    first: int


class Segment(NamedTuple):
    """Documents that ranks ``first .. first + degree`` attend over in one call.

    Either one document that several ranks share, or all the whole documents of one rank.
    """

    degree: int
    first: int
    documents: tuple[int, ...]

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.degree)


class Rows(NamedTuple):
    """Rows of one document that lie ``start..stop`` in the tensors of a rank."""

    document: int
    positions: Intervals
    start: int
    stop: int


def ratio(values: Sequence[float]) -> float:
    """The largest number divided by the mean; 1 where all are 0."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


@dataclass(frozen=True, repr=False)
class PackingPlan:
    """Which rank holds which rows of which document, the same on all ranks; made by :func:`pack_documents`.

    Attributes:
        lengths: tokens of each document.
        places: (degree, first rank) of each document: ranks ``first .. first + degree`` share it in zigzag layout.
        ranks: the number of ranks.
        costs: (cost of a pair of a query and a key, cost of a token), the units of ``work``.

    Examples:
        >>> import seqpar_kernels as sp
        >>> plan = sp.pack_documents([900, 100, 100], 2, token_work=0)
        >>> plan
        PackingPlan(3 documents on 2 ranks: 2 whole, 1 by 2; slowest / mean: work 1.000, tokens 1.000)
        >>> plan.tokens, [segment.documents for segment in plan.segments]
        ((550, 550), [(0,), (1,), (2,)])
    """

    lengths: tuple[int, ...]
    places: tuple[Place, ...]
    ranks: int
    costs: Costs

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The calls of attention, in the order in which every rank makes its calls."""
        whole: dict[int, list[int]] = {}
        found = []
        for document, place in enumerate(self.places):
            if self.lengths[document] == 0:
                continue
            if place.degree == 1:
                whole.setdefault(place.first, []).append(document)
            else:
                found.append(Segment(*place, (document,)))
        found += [Segment(1, rank, tuple(documents)) for rank, documents in whole.items()]
        return tuple(sorted(found, key=lambda s: (-s.degree, s.first, s.documents)))

    @functools.cached_property
    def _shares(self) -> tuple[tuple[Share, ...], ...]:
        """For each rank, its part of each of its documents."""
        found: list[list[Share]] = [[] for _ in range(self.ranks)]
        for length, place in zip(self.lengths, self.places, strict=True):
            for i, share in enumerate(shares(length, place.degree)):
                found[place.first + i].append(share)
        return tuple(map(tuple, found))

    @functools.cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(sum(share.tokens for share in own) for own in self._shares)

    @functools.cached_property
    def work(self) -> tuple[float, ...]:
        """Work of each rank, in units of ``costs``."""
        return tuple(sum(map(self.costs.of, own)) for own in self._shares)

    @property
    def work_imbalance(self) -> float:
        """The work of the slowest rank divided by the mean."""
        return ratio(self.work)

    @property
    def token_imbalance(self) -> float:
        """The tokens of the fullest rank divided by the mean."""
        return ratio(self.tokens)

    @functools.cached_property
    def signature(self) -> str:
        """A short text that ranks compare."""
        return f"{self!r} {zlib.crc32(repr((self.lengths, self.places)).encode()):08x}"

    def on_rank(self, rank: int) -> RankPacking:
        """The rows of one rank.

        Raises:
            ValueError: ``rank`` is no rank of this plan.
        """
        if type(rank) is not int or not 0 <= rank < self.ranks:
            raise ValueError(f"rank: expected one of the {self.ranks} ranks of the plan, got {rank!r}")
        return (RankPacking if torch.compiler.is_compiling() else _on_rank)(self, rank)

    def __repr__(self) -> str:
        degrees = sorted(Counter(place.degree for place in self.places).items())
        shown = ", ".join(f"{n} whole" if degree == 1 else f"{n} by {degree}" for degree, n in degrees) or "none"
        return (
            f"PackingPlan({len(self.lengths)} documents on {self.ranks} ranks: {shown}; slowest / mean: "
            f"work {self.work_imbalance:.3f}, tokens {self.token_imbalance:.3f})"
        )


@functools.lru_cache(64)
def _on_rank(plan: PackingPlan, rank: int) -> RankPacking:
    return RankPacking(plan, rank)


class RankPacking:
    """The rows of one rank of a plan: documents that all ranks share come first, whole documents last.

    A flat batch is [sum of lengths, ...], documents behind one another in their order; a padded batch is
    [documents, S, ...], each at the front of its line.
    """

    def __init__(self, plan: PackingPlan, rank: int):
        self.plan, self.rank = plan, rank
        self.segments = tuple(s for s in plan.segments if rank in s.ranks)
        rows, at = [], 0
        sizes = []  # of each segment
        for segment in self.segments:
            before = at
            for document in segment.documents:
                layout = rows_of("zigzag", plan.lengths[document], segment.degree, rank - segment.first)
                rows.append(Rows(document, layout, at, at + count(layout)))
                at += count(layout)
            sizes.append(at - before)
        self.rows, self.tokens, self.sizes = tuple(rows), at, tuple(sizes)

    def document_ids(self, device: torch.device | str | None = None) -> Tensor:
        """The document of each row. int64 [tokens]"""
        ids = torch.tensor([r.document for r in self.rows], dtype=torch.int64, device=device)
        return ids.repeat_interleave(torch.tensor([r.stop - r.start for r in self.rows], device=ids.device).long())

    def position_ids(self, device: torch.device | str | None = None) -> Tensor:
        """The position of each row in its document, for rotary embeddings. int64 [tokens]"""
        parts = [torch.arange(i.start, i.stop, device=device) for r in self.rows for i in r.positions]
        return torch.cat([torch.arange(0, device=device), *parts])

    def index(self, padded_length: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The index of each row in a flat batch, or in a padded one viewed as [documents * padded_length, ...].

        int64 [tokens]
        """
        starts, start = [], 0
        for length in self.plan.lengths:
            starts.append(start)
            start += length if padded_length is None else padded_length
        at = torch.tensor(starts, dtype=torch.int64, device=device)
        return at.index_select(0, self.document_ids(device)) + self.position_ids(device)

    def take(self, batch: Tensor, *, padded: bool = False) -> Tensor:
        """This rank's rows of a batch of any dtype; the backward writes gradients to the places of the rows.

        Args:
            batch: [sum of lengths, ...], or with ``padded`` [documents, S, ...].
            padded: whether each document is one entry of dimension 0.

        Returns:
            Tensor: [tokens, ...]

        Raises:
            ValueError: a batch of another size.
        """
        flat, length = self._flat("batch", batch, padded)
        return flat.index_select(0, self.index(length, batch.device))

    def next_token_labels(self, labels: Tensor, *, padded: bool = False, ignore_index: int = -100) -> Tensor:
        """The label of the next position of the same document, whichever rank holds that position.

        Args:
            labels: integers of the whole batch as in :meth:`take`; not shifted.
            padded: as in :meth:`take`.
            ignore_index: the label of the last row of a document.

        Returns:
            Tensor: like ``labels``, [tokens, ...]

        Raises:
            ValueError: labels of another size, or that are no integers.
        """
        flat, length = self._flat("labels", labels, padded)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels: expected integers, got {labels.dtype}")
        lengths = torch.tensor(self.plan.lengths, dtype=torch.int64, device=labels.device)
        is_last = self.position_ids(labels.device) + 1 == lengths[self.document_ids(labels.device)]
        found = flat.index_select(0, self.index(length, labels.device) + (~is_last).long())
        return found.masked_fill(is_last.view(-1, *[1] * (found.dim() - 1)), ignore_index)

    def cu_seqlens(self, segment: Segment) -> Tensor:
        """Ends of the documents of a segment, the ``cu_seqlens`` of its call. int32 [documents + 1]"""
        lengths = [0, *(self.plan.lengths[document] for document in segment.documents)]
        return torch.tensor(lengths).cumsum(0).to(torch.int32)

    def _flat(self, name: str, batch: Tensor, padded: bool) -> tuple[Tensor, int | None]:
        lengths = self.plan.lengths
        shape = tuple(batch.shape)
        if padded:
            if batch.dim() < 2 or shape[0] != len(lengths) or shape[1] < max(lengths, default=0):
                raise ValueError(
                    f"{name}: expected [{len(lengths)}, {max(lengths, default=0)} or more, ...], a line for each "
                    f"document of the plan, got {shape}"
                )
            return batch.flatten(0, 1), shape[1]
        if batch.dim() < 1 or shape[0] != sum(lengths):
            raise ValueError(f"{name}: expected [{sum(lengths)}, ...], all tokens of the plan, got {shape}")
        return batch, None
