"""Which chunk is computed and which is sent, when: pure data, no tensors, no transport.

A schedule is the program of one rank: a list of steps that :mod:`.pipeline` runs from first to last. ``Post`` starts
transfers and returns at once; ``Wait`` blocks on one arrival; ``Compute`` works on rows of the unsharded sequence. What
is posted before a ``Compute`` travels while it runs: that is all there is to overlap.

Ranks are visited in rotated order, so that at any moment each link carries one chunk each way. All ranks run the same
program shifted by their rank: in step k a rank gathers from ``rank + k`` while it sends to ``rank - k`` (scatters to
``rank + k``, receives from ``rank - k``), hence every send meets its receive in the same step and nothing can deadlock.

Sources: Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2, for where the collectives stand; Wang et al. 2023
(ASPLOS, "Overlap communication with dependent computation via decomposition") for the decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..layout import SequenceShard, split_point

Stage = Literal["matmul", "dgrad", "wgrad", "reduce"]


class Rows(NamedTuple):
    """Rows ``start..stop`` of the unsharded sequence: chunk ``index`` of the shard of ``owner``."""

    owner: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    start: int
    stop: int


class Transfer(NamedTuple):
    """``rows`` on their way from one rank to another.

    "gather": the owner's input rows, to somebody who computes with them.
    "scatter": somebody's partial result for those rows, to their owner, who sums.
    """

    kind: Literal["gather", "scatter"]
    rows: Rows
    source: int
    target: int


@dataclass(frozen=True)
class Post:
    """Start these transfers together."""

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


@dataclass(frozen=True)
class Wait:
    """Block until this transfer has arrived here."""

    transfer: Transfer


@dataclass(frozen=True)
class Compute:
    """Run ``stage`` over rows ``start..stop`` of the unsharded sequence."""

    stage: Stage
    start: int
    stop: int


Step = Post | Wait | Compute


def chunks_of(shard: SequenceShard, chunks: int) -> list[Rows]:
    """The shard in ``chunks`` nearly equal pieces; empty ones are left out."""
    cuts = [shard.start + split_point(shard.size, chunks, i) for i in range(chunks + 1)]
    return [Rows(shard.rank, i, cuts[i], cuts[i + 1]) for i in range(chunks) if cuts[i] < cuts[i + 1]]


def _gather(shard: SequenceShard, chunks: int) -> list[Post]:
    """Own chunks to every peer, every peer's chunks here."""
    posts = []
    for k in range(1, shard.ranks):
        source, target = (shard.rank + k) % shard.ranks, (shard.rank - k) % shard.ranks
        sends = [Transfer("gather", rows, shard.rank, target) for rows in chunks_of(shard, chunks)]
        receives = [Transfer("gather", rows, source, shard.rank) for rows in chunks_of(shard.of(source), chunks)]
        posts += _paired(sends, receives)
    return posts


def _scatter_to(shard: SequenceShard, k: int, chunks: int) -> list[Post]:
    """Partial results for the chunks of ``rank + k``; what ``rank - k`` has for ours."""
    source, target = (shard.rank - k) % shard.ranks, (shard.rank + k) % shard.ranks
    sends = [Transfer("scatter", rows, shard.rank, target) for rows in chunks_of(shard.of(target), chunks)]
    receives = [Transfer("scatter", rows, source, shard.rank) for rows in chunks_of(shard, chunks)]
    return _paired(sends, receives)


def _paired(sends: list[Transfer], receives: list[Transfer]) -> list[Post]:
    """One post per chunk index. Shards differ by a row at most, so one side may have a chunk less."""
    count = max(len(sends), len(receives))
    return [Post(tuple(sends[i : i + 1]), tuple(receives[i : i + 1])) for i in range(count)]


def _arrivals(posts: list[Post]) -> list[Transfer]:
    return [transfer for post in posts for transfer in post.receives]


def _scatter_phase(shard: SequenceShard, chunks: int, stage: Stage) -> tuple[list[Step], list[Transfer]]:
    """Compute for the others and send as each chunk is ready, then for ourselves; and what will arrive meanwhile."""
    steps: list[Step] = []
    arrivals: list[Transfer] = []
    for k in range(1, shard.ranks):
        for post in _scatter_to(shard, k, chunks):
            steps += [Compute(stage, t.rows.start, t.rows.stop) for t in post.sends]
            steps.append(post)
            arrivals += post.receives
    steps.append(Compute(stage, shard.start, shard.stop))
    return steps, arrivals


def gather_only(shard: SequenceShard) -> list[Step]:
    """All-gather, nothing to compute."""
    posts = _gather(shard, 1)
    return [*posts, *(Wait(t) for t in _arrivals(posts))]


def scatter_only(shard: SequenceShard) -> list[Step]:
    """Reduce-scatter of something that exists already."""
    posts = [post for k in range(1, shard.ranks) for post in _scatter_to(shard, k, 1)]
    return [*posts, *(Wait(t) for t in _arrivals(posts)), Compute("reduce", shard.start, shard.stop)]


def gather_matmul(shard: SequenceShard, chunks: int, *, pipelined: bool = True) -> list[Step]:
    """All-gather -> matmul: own shard while the first chunks travel, then each peer's chunk as it arrives.

    ``pipelined=False`` waits for everything and runs one matmul: the plan for sizes too small to cut.
    """
    posts = _gather(shard, chunks)
    arrivals = _arrivals(posts)
    if not pipelined:
        return [*posts, *(Wait(t) for t in arrivals), Compute("matmul", 0, shard.length)]
    steps: list[Step] = [*posts, Compute("matmul", shard.start, shard.stop)]
    for transfer in arrivals:
        steps += [Wait(transfer), Compute("matmul", transfer.rows.start, transfer.rows.stop)]
    return steps


def matmul_scatter(shard: SequenceShard, chunks: int, *, pipelined: bool = True) -> list[Step]:
    """Matmul -> reduce-scatter: the peers' rows first, each chunk sent as it is ready; own rows last; then the sum."""
    if not pipelined:
        return [Compute("matmul", 0, shard.length), *scatter_only(shard)]
    steps, arrivals = _scatter_phase(shard, chunks, "matmul")
    return [*steps, *(Wait(t) for t in arrivals), Compute("reduce", shard.start, shard.stop)]


def column_backward(shard: SequenceShard, chunks: int, *, dgrad: bool, wgrad: bool) -> list[Step]:
    """Backward of gather_matmul: x is gathered again under dgrad, dx is scattered under wgrad.

    The gather is posted first, so that it never waits behind the partial sums of dx.
    """
    gathers = _gather(shard, chunks) if wgrad else []
    steps: list[Step] = [*gathers]
    scattered: list[Transfer] = []
    if dgrad:
        phase, scattered = _scatter_phase(shard, chunks, "dgrad")
        steps += phase
    if wgrad:
        steps += [Wait(t) for t in _arrivals(gathers)]
        steps.append(Compute("wgrad", 0, shard.length))
    steps += [Wait(t) for t in scattered]
    if dgrad:
        steps.append(Compute("reduce", shard.start, shard.stop))
    return steps


def row_backward(shard: SequenceShard, chunks: int, *, dgrad: bool, wgrad: bool) -> list[Step]:
    """Backward of matmul_scatter: dy is gathered under dgrad; wgrad runs once, when the last chunk is in."""
    posts = _gather(shard, chunks)
    steps: list[Step] = [*posts]
    if dgrad:
        steps.append(Compute("dgrad", shard.start, shard.stop))
    for transfer in _arrivals(posts):
        steps.append(Wait(transfer))
        if dgrad:
            steps.append(Compute("dgrad", transfer.rows.start, transfer.rows.stop))
    if wgrad:
        steps.append(Compute("wgrad", 0, shard.length))
    return steps
