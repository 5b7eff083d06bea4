"""The rows that each rank holds of a sequence that ranks attend over: contiguous or zigzag.

A shard of either layout has as many rows as ``torch.tensor_split`` gives the rank, in ascending order of position.

- ``contiguous``: the rows that ``tensor_split`` gives.
- ``zigzag``: the larger half of a rank's rows is cut from the front of the sequence in rank order, the other half from
  the back in reverse rank order. Under a causal mask every rank then has about the same work. Where 2 t divides the
  length these are chunks r and 2 t - 1 - r of 2 t, as in ring-flash-attn, Megatron and torch's context parallelism.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .layout import SequenceShard

LAYOUTS = ("contiguous", "zigzag")


class Interval(NamedTuple):
    """Positions ``start..stop`` of the unsharded sequence."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


#: Disjoint intervals in ascending order, none of them empty.
Intervals = tuple[Interval, ...]


def check_layout(layout: str) -> None:
    """
    Raises:
        ValueError: not one of :data:`LAYOUTS`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected 'contiguous' or 'zigzag', got {layout!r}")


def rows_of(layout: str, length: int, ranks: int, rank: int) -> Intervals:
    """The positions that ``rank`` holds, in the order in which it holds them."""
    shard = SequenceShard(length, ranks, rank)
    if layout == "contiguous":
        return joined([Interval(shard.start, shard.stop)])
    halves = [(n + 1) // 2 for n in (shard.of(r).size for r in range(ranks))]
    front = sum(halves[:rank])
    back = length - sum(shard.of(r).size - halves[r] for r in range(rank))
    return joined(
        [Interval(front, front + halves[rank]), Interval(back - (shard.size - halves[rank]), back)],
    )


def joined(intervals: Iterable[Sequence[int]]) -> Intervals:
    """The union, in ascending order; intervals that touch or overlap become one."""
    out: list[Interval] = []
    for start, stop in sorted((i[0], i[1]) for i in intervals):
        if stop <= start:
            continue
        if out and start <= out[-1].stop:
            out[-1] = Interval(out[-1].start, max(stop, out[-1].stop))
        else:
            out.append(Interval(start, stop))
    return tuple(out)


def count(intervals: Intervals) -> int:
    """How many positions there are."""
    return sum(i.size for i in intervals)


def common(one: Intervals, other: Intervals) -> Intervals:
    """Positions in both, cut at the borders of ``one``."""
    found = []
    for a in one:
        for b in other:
            start, stop = max(a.start, b.start), min(a.stop, b.stop)
            if start < stop:
                found.append(Interval(start, stop))
    return tuple(found)


def places(rows: Intervals, part: Intervals) -> Intervals:
    """Where the positions of ``part``, a part of ``rows``, are in a tensor that holds ``rows``."""
    found, before = [], 0
    for whole in rows:
        for piece in part:
            if whole.start <= piece.start and piece.stop <= whole.stop:
                found.append(Interval(before + piece.start - whole.start, before + piece.stop - whole.start))
        before += whole.size
    return tuple(found)
