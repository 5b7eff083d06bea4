"""Schedules: the order in which chunks are computed and sent. Pure data, no tensors, no transport.

A schedule is the program of one rank: a list of steps that :mod:`.pipeline` runs from first to last. ``Post`` starts
transfers and returns at once; ``Wait`` blocks on one arrival; ``Compute`` works on rows of the unsharded sequence.
Transfers that are posted before a ``Compute`` run beside it: this is the overlap.

With a ``window`` at most that many posts are in flight: a schedule then waits for earlier messages before it posts, so
that it can use their buffers again.

Ranks are visited in rotated order, so that at any moment each link carries one chunk each way. All ranks run the same
program shifted by their rank: in step k a rank gathers from ``rank + k`` and sends to ``rank - k`` (it scatters to
``rank + k`` and receives from ``rank - k``). So a send and its receive are in the same step, and nothing can deadlock.

Sources: Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2, for the places of the collectives; Wang et al. 2023
(ASPLOS, "Overlap communication with dependent computation via decomposition") for the decomposition.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Literal, ParamSpec, cast

from ..caches import MOST
from ..comm.steps import Buffer, Compute, Drain, Post, Rows, Step, Transfer, Wait
from ..layout import SequenceShard, split_point

Stage = Literal["matmul", "dgrad", "wgrad", "reduce"]

#: The buffers of a sharded sequence. SHARD has the rows of a rank's own shard, which the peers compute with.
SHARD = "shard"
#: A rank's partial results for the rows of its peers, which sum them: one slot for each peer, in rotated order.
PARTIAL_SUMS = "partial sums"


def sequence_buffers(shard: SequenceShard, *names: str) -> tuple[Buffer, ...]:
    """The buffers ``names``, or both, with the size of the largest shard, so that they are the same on every rank."""
    rows = -(-shard.length // shard.ranks)
    both = (Buffer(SHARD, rows), Buffer(PARTIAL_SUMS, rows, shard.ranks - 1))
    return tuple(buffer for buffer in both if not names or buffer.name in names)


def shard_rows(owner: SequenceShard, rows: Rows, target: int) -> Transfer:
    """The transfer of ``rows`` of the shard of ``owner`` to a peer."""
    return Transfer(SHARD, rows, owner.rank, target, 0, rows.start - owner.start)


def partial_sums(owner: SequenceShard, rows: Rows, source: int) -> Transfer:
    """The transfer of the partial results of ``source`` for ``rows`` of the shard of ``owner``, to that rank."""
    slot = (owner.rank - source) % owner.ranks - 1
    return Transfer(PARTIAL_SUMS, rows, source, owner.rank, slot, rows.start - owner.start)


class Schedule(list[Step]):
    """The steps of one rank in order, and the buffers from which all ranks send."""

    def __init__(self, steps: Iterable[Step], buffers: tuple[Buffer, ...]):
        super().__init__(steps)
        self.buffers = buffers

    @functools.cached_property
    def outgoing(self) -> dict[int, Transfer]:
        """The transfers of partial results that this rank sends, by their first row."""
        sends = [t for step in self if isinstance(step, Post) for t in step.sends]
        return {t.rows.start: t for t in sends if t.buffer == PARTIAL_SUMS}

    @functools.cached_property
    def receives_first(self) -> Schedule:
        """The same steps, with all receives posted before the first computation.

        This is for transports where a send whose receive is posted starts at once. Where a schedule computes on chunks
        as they arrive, its sends are then posted peer by peer, each after as many arrivals. If all sends were posted at
        once, connections would share the link evenly (TCP does), and the last chunks of all peers would arrive
        together, with nothing left to hide their matmuls.

        A schedule with a window is unchanged.
        """
        if any(isinstance(step, Drain) for step in self):
            return self
        posts = [step for step in self if isinstance(step, Post)]
        chunks = max(map(_index, posts), default=0) + 1
        if len(posts) > chunks and self._works_on_arrivals:
            return self._sends_in_turn(posts, chunks)
        first = next((i for i, step in enumerate(self) if isinstance(step, Compute)), len(self))
        early = tuple(t for step in self[first:] if isinstance(step, Post) for t in step.receives)
        return Schedule(_nonempty([*self[:first], Post((), early), *map(_sends_only, self[first:])]), self.buffers)

    @property
    def _works_on_arrivals(self) -> bool:
        """Whether all sends are ready from the start, and each arrival is computed on before the next wait."""
        order = [type(step) for step in self if isinstance(step, (Post, Compute))]
        after_waits = [then for step, then in itertools.pairwise([*self, None]) if isinstance(step, Wait)]
        return Compute not in order[: order.count(Post)] and all(isinstance(then, Compute) for then in after_waits)

    def _sends_in_turn(self, posts: list[Post], ahead: int) -> Schedule:
        """Each send is posted ``ahead`` posts before the arrival of the same index.

        Nothing can deadlock. A send waits only for messages before it in the order of peers and chunks, which is the
        same on all ranks, and ranks wait for arrivals in that order. So the first missing message has been sent.
        """
        leaving: dict[Transfer | None, list[Step]] = {None: []}
        arrival: Transfer | None = None
        for i, post in enumerate(posts):
            if i >= ahead and posts[i - ahead].receives:
                *_, arrival = posts[i - ahead].receives
            leaving.setdefault(arrival, []).append(_sends_only(post))
        steps: list[Step] = [Post((), tuple(t for post in posts for t in post.receives)), *leaving[None]]
        for step in self:
            if not isinstance(step, Post):
                steps.append(step)
            if isinstance(step, Wait):
                steps += leaving.get(step.transfer, [])
        return Schedule(_nonempty(steps), self.buffers)


def _sends_only(step: Step) -> Step:
    return Post(step.sends, ()) if isinstance(step, Post) else step


def _nonempty(steps: Iterable[Step]) -> list[Step]:
    return [step for step in steps if step != _NOTHING]


_Arguments = ParamSpec("_Arguments")


def remembered(build: Callable[_Arguments, Schedule]) -> Callable[_Arguments, Schedule]:
    """Cache schedules: building one takes longer than a small matmul. Callers must not change a schedule."""
    # mypy sees a cache of anything hashable
    return cast(Callable[_Arguments, Schedule], functools.lru_cache(MOST)(build))


Taper = Literal["none", "rising", "falling"]
_TAPER_DEPTH = 3


def chunk_weights(chunks: int, taper: Taper) -> list[int]:
    """The relative sizes of the chunks of a shard.

    Nothing hides the matmul of the first chunk that is sent, nor of the last that arrives. So these are small: sizes
    rise as 1, 2, 4, 8, 8, ... or fall in the same way. On two ranks with matmul and wire in balance, the matmul of each
    chunk then takes as long as the transfer of the next.
    """
    if taper == "none":
        return [1] * chunks
    rising = [2 ** min(i, _TAPER_DEPTH) for i in range(chunks)]
    return rising if taper == "rising" else rising[::-1]


def chunks_of(shard: SequenceShard, chunks: int, taper: Taper = "none") -> list[Rows]:
    """The chunks of a shard, without empty ones."""
    weights = chunk_weights(chunks, taper)
    if taper == "none":
        sizes = [split_point(shard.size, chunks, i) for i in range(chunks + 1)]
    else:
        sizes = [shard.size * total // sum(weights) for total in itertools.accumulate(weights, initial=0)]
    cuts = [shard.start + size for size in sizes]
    return [Rows(shard.rank, i, cuts[i], cuts[i + 1]) for i in range(chunks) if cuts[i] < cuts[i + 1]]


def _gather_from(shard: SequenceShard, k: int, chunks: int, tapered: bool) -> list[Post]:
    """Receive the chunks of ``rank + k``, send own chunks to ``rank - k``."""
    source, target = (shard.rank + k) % shard.ranks, (shard.rank - k) % shard.ranks
    taper: Taper = "falling" if tapered and shard.ranks == 2 else "none"
    theirs = shard.of(source)
    sends = [shard_rows(shard, rows, target) for rows in chunks_of(shard, chunks, taper)]
    receives = [shard_rows(theirs, rows, shard.rank) for rows in chunks_of(theirs, chunks, taper)]
    return _paired(sends, receives, chunks)


def _gather(shard: SequenceShard, chunks: int, tapered: bool = False) -> list[Post]:
    """Send own chunks to every peer, receive every peer's chunks."""
    return [post for k in range(1, shard.ranks) for post in _gather_from(shard, k, chunks, tapered)]


def _scatter_to(shard: SequenceShard, k: int, chunks: int, tapered: bool = False) -> list[Post]:
    """Send partial results for the chunks of ``rank + k``, receive those of ``rank - k`` for own chunks."""
    source, target = (shard.rank - k) % shard.ranks, (shard.rank + k) % shard.ranks
    taper: Taper = "rising" if tapered and k == 1 else "none"
    theirs = shard.of(target)
    sends = [partial_sums(theirs, rows, shard.rank) for rows in chunks_of(theirs, chunks, taper)]
    receives = [partial_sums(shard, rows, source) for rows in chunks_of(shard, chunks, taper)]
    return _paired(sends, receives, chunks)


def _paired(sends: list[Transfer], receives: list[Transfer], chunks: int) -> list[Post]:
    """One post per chunk index. Shards may differ by a row, so that one side may lack the last chunk."""
    posts = []
    for i in range(chunks):
        pair = tuple(tuple(t for t in side if t.rows.index == i) for side in (sends, receives))
        if any(pair):
            posts.append(Post(*pair))
    return posts


def _index(post: Post) -> int:
    return (post.sends or post.receives)[0].rows.index


_NOTHING = Post((), ())


def _together(first: list[Post], second: list[Post]) -> list[Post]:
    """One post per chunk index of two exchanges."""
    pairs = itertools.zip_longest(first, second, fillvalue=_NOTHING)
    return [Post(a.sends + b.sends, a.receives + b.receives) for a, b in pairs]


def _arrivals(posts: list[Post]) -> list[Transfer]:
    return [transfer for post in posts for transfer in post.receives]


def _gather_phase(shard: SequenceShard, chunks: int, window: int | None, *stages: Stage) -> list[Step]:
    """Compute on the own shard during the first transfers, then on each peer's chunk as it arrives."""
    posts = _gather(shard, chunks, tapered=window is None)
    ahead = len(posts) if window is None else window
    steps: list[Step] = [*posts[:ahead]]
    steps += [Compute(stage, shard.start, shard.stop) for stage in stages]
    for i, post in enumerate(posts):
        for transfer in post.receives:
            steps.append(Wait(transfer))
            steps += [Compute(stage, transfer.rows.start, transfer.rows.stop) for stage in stages]
        if i + ahead < len(posts):
            steps += [Drain(), posts[i + ahead]]
    return steps


def _scatter_phase(
    shard: SequenceShard, chunks: int, stage: Stage, window: int | None, *, gather: bool = False
) -> tuple[list[Step], list[Transfer]]:
    """Compute the peers' rows and send each chunk when it is ready, then compute own rows; also the missing arrivals.

    With ``gather`` an all-gather runs beside. It is posted first, so that it never waits behind partial sums; with a
    window one of its chunks is posted with each chunk of partial sums.
    """
    steps: list[Step] = list(_gather(shard, chunks)) if gather and window is None else []
    under_way = [step for step in steps if isinstance(step, Post)]
    for k in range(1, shard.ranks):
        posts = _scatter_to(shard, k, chunks, tapered=window is None)
        if gather and window is not None:
            posts = _together(_gather_from(shard, k, chunks, tapered=False), posts)
        for post in posts:
            leaving = [t.rows for t in post.sends if t.buffer == PARTIAL_SUMS]
            steps += [Compute(stage, rows.start, rows.stop) for rows in leaving]
            if window is not None and len(under_way) == window:
                steps += [*(Wait(t) for t in _arrivals(under_way)), Drain()]
                under_way = []
            steps.append(post)
            under_way.append(post)
    steps.append(Compute(stage, shard.start, shard.stop))
    return steps, _arrivals(under_way)


@remembered
def gather_only(shard: SequenceShard) -> Schedule:
    """All-gather without computation."""
    posts = _gather(shard, 1)
    return Schedule([*posts, *(Wait(t) for t in _arrivals(posts))], sequence_buffers(shard, SHARD))


@remembered
def scatter_only(shard: SequenceShard) -> Schedule:
    """Reduce-scatter of a tensor that is computed already."""
    posts = [post for k in range(1, shard.ranks) for post in _scatter_to(shard, k, 1)]
    steps: list[Step] = [*posts, *(Wait(t) for t in _arrivals(posts)), Compute("reduce", shard.start, shard.stop)]
    return Schedule(steps, sequence_buffers(shard, PARTIAL_SUMS))


@remembered
def gather_matmul(shard: SequenceShard, chunks: int, *, pipelined: bool = True, window: int | None = None) -> Schedule:
    """All-gather -> matmul: the own shard during the first transfers, then each peer's chunk as it arrives.

    ``pipelined=False`` waits for all chunks and runs one matmul: the plan for sizes that are too small to cut.
    """
    if pipelined:
        steps = _gather_phase(shard, chunks, window, "matmul")
    else:
        posts = _gather(shard, chunks)
        steps = [*posts, *(Wait(t) for t in _arrivals(posts)), Compute("matmul", 0, shard.length)]
    return Schedule(steps, sequence_buffers(shard, SHARD))


@remembered
def matmul_scatter(shard: SequenceShard, chunks: int, *, window: int | None = None) -> Schedule:
    """Matmul -> reduce-scatter: the peers' rows first, each chunk sent when ready; own rows last; then the sum."""
    steps, missing = _scatter_phase(shard, chunks, "matmul", window)
    steps += [*(Wait(t) for t in missing), Compute("reduce", shard.start, shard.stop)]
    return Schedule(steps, sequence_buffers(shard, PARTIAL_SUMS))


@remembered
def gather_matmul_scatter(
    shard: SequenceShard, chunks: int, *, scatter: bool = True, window: int | None = None
) -> Schedule:
    """Receive rows from their owner, compute on them, and send the partial result back, chunk by chunk.

    Own rows are computed during the first transfers. Results are sent back during the next chunk's computation. With a
    window the next chunk is received while one is computed, beside a result that is sent.
    ``scatter=False``: no result is sent back.
    """
    if not scatter:
        return Schedule(_gather_phase(shard, chunks, window, "dgrad"), sequence_buffers(shard, SHARD))
    # All ranks count all chunks, even those that a shard does not have, so that all post messages in one order.
    turns = list(itertools.product(range(1, shard.ranks), range(chunks)))
    gathers = {(k, _index(p)): p for k in range(1, shard.ranks) for p in _gather_from(shard, k, chunks, tapered=False)}
    scatters = {(k, _index(p)): p for k in range(1, shard.ranks) for p in _scatter_to(shard, k, chunks)}
    arriving = {transfer.rows: transfer for transfer in _arrivals(list(gathers.values()))}
    first = _gather(shard, chunks) if window is None else [gathers[turn] for turn in turns[:1] if turn in gathers]
    steps: list[Step] = [*first, Compute("dgrad", shard.start, shard.stop)]
    under_way = [Post(post.sends, ()) for post in first]  # the steps below wait for the arrivals of these posts
    for turn, next_turn in itertools.zip_longest(turns, turns[1:]):
        post = scatters.get(turn, _NOTHING)
        ahead = _NOTHING if window is None else gathers.get(next_turn, _NOTHING)
        if post is _NOTHING and ahead is _NOTHING:
            continue
        for transfer in post.sends:
            rows = transfer.rows
            steps += [Wait(arriving[rows]), Compute("dgrad", rows.start, rows.stop)]
        if window is not None and len(under_way) >= window:
            steps += [*(Wait(t) for t in _arrivals(under_way)), Drain()]
            under_way = []
        steps += _together([ahead], [post])
        under_way.append(Post(ahead.sends + post.sends, post.receives))
    steps += [*(Wait(t) for t in _arrivals(under_way)), Compute("reduce", shard.start, shard.stop)]
    return Schedule(steps, sequence_buffers(shard))


@remembered
def column_backward(
    shard: SequenceShard, chunks: int, *, dgrad: bool, wgrad: bool, gather: bool = True, window: int | None = None
) -> Schedule:
    """Backward of gather_matmul: x is gathered again during dgrad, dx is scattered during wgrad.

    ``gather=False``: this rank has all rows of x already.
    """
    steps: list[Step] = []
    missing: list[Transfer] = []
    if dgrad:
        steps, missing = _scatter_phase(shard, chunks, "dgrad", window, gather=wgrad and gather)
    elif wgrad and gather:
        steps = _gather_phase(shard, chunks, window)
    if wgrad:
        steps += [Wait(t) for t in missing if t.buffer == SHARD]
        steps.append(Compute("wgrad", 0, shard.length))
    steps += [Wait(t) for t in missing if t.buffer == PARTIAL_SUMS]
    if dgrad:
        steps.append(Compute("reduce", shard.start, shard.stop))
    gathers, scatters = [SHARD] * (wgrad and gather), [PARTIAL_SUMS] * dgrad
    return Schedule(steps, sequence_buffers(shard, *gathers, *scatters) if gathers or scatters else ())


@remembered
def row_backward(
    shard: SequenceShard, chunks: int, *, dgrad: bool, wgrad: bool, spread: bool = False, window: int | None = None
) -> Schedule:
    """Backward of matmul_scatter: dy is gathered during dgrad; wgrad runs once, after the last chunk.

    ``spread``: wgrad runs chunk by chunk too, for a wire that takes longer than dgrad.
    """
    wanted: list[Stage] = ["dgrad"] if dgrad else []
    if wgrad and spread:
        steps = _gather_phase(shard, chunks, window, *wanted, "wgrad")
    else:
        steps = _gather_phase(shard, chunks, window, *wanted)
        if wgrad:
            steps.append(Compute("wgrad", 0, shard.length))
    return Schedule(steps, sequence_buffers(shard, SHARD))
