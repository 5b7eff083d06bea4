"""The plan of attention over a sharded sequence: which rank computes and sends what. No tensors, no transport.

Ranks form a grid of ``ring`` rows and ``ulysses`` columns, rank = row * ulysses + column, as in USP (Fang and Zhao
2024, arXiv 2405.07719). The ranks of a row exchange heads for rows of the sequence (Jacobs et al. 2023, DeepSpeed
Ulysses). The ranks of a column then hold the same heads, and send each other keys and values: only those that the
other rank's mask needs, in rotated order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ..caches import MOST
from ..layout import split_point
from ..sequence_layout import Interval, Intervals, common, joined, rows_of

#: Messages are cut at multiples of this many keys, or of a multiple of that where kernels take larger tiles, so that
#: the kernels' sums do not depend on the cuts.
KEYS = 8


class Mask(NamedTuple):
    """The mask by positions: a row at P sees keys at P - left .. P + right, of its own document.

    ``documents`` are the values of cu_seqlens.
    """

    left: int | None
    right: int | None
    documents: tuple[int, ...] | None = None

    def hull(self, rows: Interval, k_len: int) -> Interval:
        """An interval that contains all keys that ``rows`` see."""
        low = 0 if self.left is None else max(0, rows.start - self.left)
        high = k_len if self.right is None else min(k_len, rows.stop + self.right)
        if self.documents is not None:
            low = max(low, max(d for d in self.documents if d <= rows.start))
            high = min(high, min(d for d in self.documents if d >= rows.stop))
        return Interval(low, max(low, high))

    def needs(self, q_rows: Intervals, k_rows: Intervals, k_len: int) -> Intervals:
        """The keys of ``k_rows`` that any of ``q_rows`` may see."""
        return joined(common(k_rows, joined(self.hull(rows, k_len) for rows in q_rows)))


class Sizes(NamedTuple):
    """The sizes of a call on all ranks, apart from documents."""

    q_len: int
    k_len: int
    q_heads: int
    kv_heads: int
    layout: str
    ranks: int
    ulysses: int  # columns of the grid
    left: int | None  # as in Mask
    right: int | None
    chunk_rows: int  # the keys of a message, a multiple of Problem.cut

    @property
    def ring(self) -> int:
        return self.ranks // self.ulysses

    def mask(self, documents: tuple[int, ...] | None = None) -> Mask:
        return Mask(self.left, self.right, documents)

    def rank(self, row: int, column: int) -> int:
        return row * self.ulysses + column

    def row_of_ranks(self, row: int) -> range:
        return range(row * self.ulysses, (row + 1) * self.ulysses)

    def held(self, length: int, rank: int) -> Intervals:
        """The positions that ``rank`` holds, before heads are exchanged, of a sequence of ``length``."""
        return rows_of(self.layout, length, self.ranks, rank)

    def rows(self, length: int, row: int) -> Intervals:
        """The positions that each rank of a row of the grid holds after heads have been exchanged."""
        return joined(i for rank in self.row_of_ranks(row) for i in self.held(length, rank))

    def heads(self, column: int) -> tuple[range, range]:
        """The query heads and the key heads of a column.

        With at least as many key heads as columns, a column has whole groups of query heads that share a key head. Else
        the query heads are cut by tensor_split, and several columns have the same key head.
        """
        group = self.q_heads // max(1, self.kv_heads)
        if self.kv_heads >= self.ulysses:
            begin, end = (split_point(self.kv_heads, self.ulysses, c) for c in (column, column + 1))
            return range(begin * group, end * group), range(begin, end)
        begin, end = (split_point(self.q_heads, self.ulysses, c) for c in (column, column + 1))
        if begin == end:
            return range(begin, end), range(0)
        return range(begin, end), range(begin // group, (end - 1) // group + 1)


class Piece(NamedTuple):
    """The keys ``keys`` of a row of the grid that row ``reader`` computes with, in the same column."""

    owner: int
    reader: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    keys: Interval


@functools.lru_cache(MOST)
def pieces(sizes: Sizes, documents: tuple[int, ...] | None, owner: int, reader: int) -> tuple[Piece, ...]:
    """The pieces that ``owner`` sends to ``reader``, in ascending order."""
    q_rows, k_rows = sizes.rows(sizes.q_len, reader), sizes.rows(sizes.k_len, owner)
    needed = sizes.mask(documents).needs(q_rows, k_rows, sizes.k_len)
    cuts = [
        Interval(start, min(start + sizes.chunk_rows, part.stop))
        for part in needed
        for start in range(part.start, part.stop, sizes.chunk_rows)
    ]
    return tuple(Piece(owner, reader, i, keys) for i, keys in enumerate(cuts))


def arriving(sizes: Sizes, documents: tuple[int, ...] | None, reader: int) -> Iterator[Piece]:
    """The pieces that ``reader`` receives, in the order in which it computes with them."""
    for step in range(1, sizes.ring):
        yield from pieces(sizes, documents, (reader - step) % sizes.ring, reader)


def leaving(sizes: Sizes, documents: tuple[int, ...] | None, owner: int) -> Iterator[Piece]:
    """The pieces that ``owner`` sends, in the order in which their readers wait for them."""
    for step in range(1, sizes.ring):
        yield from pieces(sizes, documents, owner, (owner + step) % sizes.ring)


@functools.lru_cache(MOST)
def exchanged(
    sizes: Sizes, documents: tuple[int, ...] | None, row: int
) -> tuple[tuple[Piece | None, Piece | None], ...]:
    """(of :func:`leaving`, of :func:`arriving`) step by step and message by message, as many on all rows.

    Where each of these is one post, or none, all ranks post in one order, and none waits in a circle.
    """
    found: list[tuple[Piece | None, Piece | None]] = []
    ring = sizes.ring
    for step in range(1, ring):
        most = max(len(pieces(sizes, documents, r, (r + step) % ring)) for r in range(ring))
        there = pieces(sizes, documents, row, (row + step) % ring)
        here = pieces(sizes, documents, (row - step) % ring, row)
        found += itertools.islice(itertools.zip_longest((*there, *[None] * most), here), most)
    return tuple(found)


def remote_rows(sizes: Sizes, row: int) -> int:
    """The number of keys of other rows of the grid that ``row`` computes with, without regard to documents."""
    return sum(p.keys.size for p in arriving(sizes, None, row))


def check_documents(ends: tuple[int, ...], q_len: int, k_len: int) -> None:
    """
    Raises:
        ValueError: the values of cu_seqlens do not cut a sequence of these lengths into documents.
    """
    if q_len != k_len:
        raise ValueError(f"cu_seqlens: expected as many keys as queries, got {k_len} and {q_len}")
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != q_len or any(a > b for a, b in itertools.pairwise(ends)):
        shown = ", ".join(map(str, ends[:8])) + (", ..." if len(ends) > 8 else "")
        raise ValueError(
            f"cu_seqlens: expected ascending ends of documents from 0 to the {q_len} rows of the unsharded sequence, "
            f"got [{shown}]; the same values on every rank"
        )
