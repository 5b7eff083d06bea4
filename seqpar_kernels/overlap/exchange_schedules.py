"""Schedules that send rows from rank to rank: all-to-all, ring, chain. Numbers of rows may differ from rank to rank.

Each schedule uses one buffer, SENT: the rows that a rank sends, laid out as the function says. ``stage``, where given,
is computed on rows as they arrive, and on a rank's own rows while the others are sent. All ranks must call a function
with the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..comm.steps import Buffer, Compute, Post, Rows, Step, Transfer, Wait
from ..layout import split_point
from .schedule import Schedule, remembered

#: The buffer that the transfers of this module are read from.
SENT = "sent rows"


@remembered
def all_to_all(
    counts: tuple[tuple[int, ...], ...], rank: int, *, chunks: int = 1, stage: str | None = None
) -> Schedule:
    """``counts[s][r]`` rows from rank s to rank r.

    SENT of rank s holds the rows for rank 0, rank 1, ... in turn. ``rows`` of a transfer count among all rows that its
    target gets, in the order of their sources. A message is sent in ``chunks`` pieces. Own rows are no transfer.

    Args:
        counts: [t][t], the same on every rank.
        rank: this one.
        chunks: pieces of a message; empty ones are left out.
        stage: for each piece that arrives, and first for the own rows.
    """
    ranks = len(counts)
    sent = [list(itertools.accumulate(row, initial=0)) for row in counts]
    got = [list(itertools.accumulate((row[r] for row in counts), initial=0)) for r in range(ranks)]

    def pieces(source: int, target: int) -> list[Transfer]:
        size, first, offset = counts[source][target], got[target][source], sent[source][target]
        cuts = [split_point(size, chunks, i) for i in range(chunks + 1)]
        return [
            Transfer(SENT, Rows(source, i, first + a, first + b), source, target, 0, offset + a)
            for i, (a, b) in enumerate(itertools.pairwise(cuts))
            if a < b
        ]

    posts = []
    for k in range(1, ranks):
        leaving, coming = pieces(rank, (rank + k) % ranks), pieces((rank - k) % ranks, rank)
        for i in range(chunks):
            sends, receives = (tuple(t for t in side if t.rows.index == i) for side in (leaving, coming))
            if sends or receives:
                posts.append(Post(sends, receives))
    own = got[rank][rank], got[rank][rank] + counts[rank][rank]
    steps: list[Step] = [*posts, *_computed(stage, *own)]
    for transfer in (t for post in posts for t in post.receives):
        steps += [Wait(transfer), *_computed(stage, transfer.rows.start, transfer.rows.stop)]
    return Schedule(steps, (Buffer(SENT, max(row[-1] for row in sent)),))


@remembered
def ring(sizes: tuple[int, ...], rank: int, *, hops: int | None = None, stage: str | None = None) -> Schedule:
    """Pass the rows of every rank to the right neighbour, ``hops`` times; one hop is a shift.

    Slot h of SENT holds the rows sent in hop h: own rows in hop 0, then those received in hop h - 1. ``rows`` are
    counted over all ranks.

    Args:
        sizes: rows of each rank.
        rank: this one.
        hops: None: until every rank has received the rows of all.
        stage: for what has arrived, while it is passed on.
    """
    ranks = len(sizes)
    hops = ranks - 1 if hops is None else hops
    starts = list(itertools.accumulate(sizes, initial=0))
    right, left = (rank + 1) % ranks, (rank - 1) % ranks

    def hop(source: int, target: int, number: int) -> tuple[Transfer, ...]:
        owner = (source - number) % ranks
        rows = Rows(owner, 0, starts[owner], starts[owner + 1])
        return (Transfer(SENT, rows, source, target, number),) if sizes[owner] and ranks > 1 else ()

    steps: list[Step] = []
    for number in range(hops):
        sends, receives = hop(rank, right, number), hop(left, rank, number)
        if sends or receives:
            steps.append(Post(sends, receives))
        here = (rank - number) % ranks
        steps += _computed(stage, starts[here], starts[here + 1])
        steps += [Wait(transfer) for transfer in receives]
    last = (rank - hops) % ranks
    steps += _computed(stage, starts[last], starts[last + 1])
    return Schedule(steps, (Buffer(SENT, max(sizes), max(1, hops)),))


@remembered
def chain(size: int, ranks: int, rank: int, *, stage: str) -> Schedule:
    """Pass a state of ``size`` rows from rank 0 to the last: each rank receives it, computes, and sends it.

    SENT holds the state that is sent. The first rank receives nothing, the last sends nothing.
    """

    def passed(source: int) -> tuple[Transfer, ...]:
        rows = Rows(source, 0, 0, size)
        return (Transfer(SENT, rows, source, source + 1),) if size and 0 <= source < ranks - 1 else ()

    coming, leaving = passed(rank - 1), passed(rank)
    steps: list[Step] = [Post((), coming)] if coming else []
    steps += [*(Wait(transfer) for transfer in coming), *_computed(stage, 0, size)]
    steps += [Post(leaving, ())] if leaving else []
    return Schedule(steps, (Buffer(SENT, size),))


def _computed(stage: str | None, start: int, stop: int) -> Sequence[Step]:
    return [] if stage is None or start == stop else [Compute(stage, start, stop)]
