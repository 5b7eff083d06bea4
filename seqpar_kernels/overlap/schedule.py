"""Which chunk is computed and which is sent, when: pure data, no tensors, no transport.

A schedule is the program of one rank: a list of steps that :mod:`.pipeline` runs from first to last. ``Post`` starts
transfers and returns at once; ``Wait`` blocks on one arrival; ``Compute`` works on rows of the unsharded sequence. What
is posted before a ``Compute`` travels while it runs: that is all there is to overlap.

With a ``window`` no more than so many posts are under way at once: a schedule then waits for earlier messages before it
posts, so that their buffers serve again.

Ranks are visited in rotated order, so that at any moment each link carries one chunk each way. All ranks run the same
program shifted by their rank: in step k a rank gathers from ``rank + k`` while it sends to ``rank - k`` (scatters to
``rank + k``, receives from ``rank - k``), hence every send meets its receive in the same step and nothing can deadlock.

Sources: Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2, for where the collectives stand; Wang et al. 2023
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

#: The buffers of a sharded sequence. The rows of a rank's own shard, for somebody who computes with them:
SHARD = "shard"
#: Somebody's partial results for the rows of another rank, which sums them: a slot for each rank in rotated order.
PARTIAL_SUMS = "partial sums"


def sequence_buffers(shard: SequenceShard, *names: str) -> tuple[Buffer, ...]:
    """Those of ``names``, or both; alike on every rank: the largest shard counts."""
    rows = -(-shard.length // shard.ranks)
    both = (Buffer(SHARD, rows), Buffer(PARTIAL_SUMS, rows, shard.ranks - 1))
    return tuple(buffer for buffer in both if not names or buffer.name in names)


def shard_rows(owner: SequenceShard, rows: Rows, target: int) -> Transfer:
    """``rows`` of the shard of ``owner`` on their way from there."""
    return Transfer(SHARD, rows, owner.rank, target, 0, rows.start - owner.start)


def partial_sums(owner: SequenceShard, rows: Rows, source: int) -> Transfer:
    """What ``source`` has for ``rows`` of the shard of ``owner``, on its way there."""
    slot = (owner.rank - source) % owner.ranks - 1
    return Transfer(PARTIAL_SUMS, rows, source, owner.rank, slot, rows.start - owner.start)


class Schedule(list[Step]):
    """The steps of one rank, from first to last, and the buffers that the transfers of all ranks are read from."""

    def __init__(self, steps: Iterable[Step], buffers: tuple[Buffer, ...]):
        super().__init__(steps)
        self.buffers = buffers

    @functools.cached_property
    def outgoing(self) -> dict[int, Transfer]:
        """The partial results that leave, by their first row."""
        sends = [t for step in self if isinstance(step, Post) for t in step.sends]
        return {t.rows.start: t for t in sends if t.buffer == PARTIAL_SUMS}

    @functools.cached_property
    def receives_first(self) -> Schedule:
        """The same steps, but all that is yet to arrive is posted before the first computation.

        For transports where a send that finds its receive there sets off at once. Where what is gathered is worked on
        as it arrives, sends then go out peer by peer, each only when as much has arrived: connections may share the
        link evenly (TCP does), and were all sends posted at once, the last chunks of all peers would arrive together,
        with nothing left to hide their matmuls.

        Where a window makes steps wait for buffers nothing changes.
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
        """Whether all that leaves is there from the start, and each arrival computed on before the next is awaited."""
        order = [type(step) for step in self if isinstance(step, (Post, Compute))]
        after_waits = [then for step, then in itertools.pairwise([*self, None]) if isinstance(step, Wait)]
        return Compute not in order[: order.count(Post)] and all(isinstance(then, Compute) for then in after_waits)

    def _sends_in_turn(self, posts: list[Post], ahead: int) -> Schedule:
        """Sends stay ``ahead`` posts before the arrivals.

        Nothing can deadlock: a send waits only for messages before it in the order of peers and chunks, which all ranks
        share, and arrivals are waited for in that order; so the earliest one that has not arrived has left.
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
    """Building one takes longer than a small matmul, and layers ask for the same few. Nobody changes one."""
    # mypy sees a cache of anything hashable
    return cast(Callable[_Arguments, Schedule], functools.lru_cache(MOST)(build))


Taper = Literal["none", "rising", "falling"]
_TAPER_DEPTH = 3


def chunk_weights(chunks: int, taper: Taper) -> list[int]:
    """How the rows of a shard are shared out among its chunks.

    Nothing hides the matmul of the first chunk that leaves, nor of the last one to arrive, so these are small: 1, 2, 4,
    8, 8, ... rising, or falling the same way. On two ranks with matmul and wire in balance each chunk then takes as
    long to multiply as the next one to travel.
    """
    if taper == "none":
        return [1] * chunks
    rising = [2 ** min(i, _TAPER_DEPTH) for i in range(chunks)]
    return rising if taper == "rising" else rising[::-1]


def chunks_of(shard: SequenceShard, chunks: int, taper: Taper = "none") -> list[Rows]:
    """The shard in ``chunks`` pieces; empty ones are left out."""
    weights = chunk_weights(chunks, taper)
    if taper == "none":
        sizes = [split_point(shard.size, chunks, i) for i in range(chunks + 1)]
    else:
        sizes = [shard.size * total // sum(weights) for total in itertools.accumulate(weights, initial=0)]
    cuts = [shard.start + size for size in sizes]
    return [Rows(shard.rank, i, cuts[i], cuts[i + 1]) for i in range(chunks) if cuts[i] < cuts[i + 1]]


def _gather_from(shard: SequenceShard, k: int, chunks: int, tapered: bool) -> list[Post]:
    """The chunks of ``rank + k`` here, own ones to ``rank - k``."""
    source, target = (shard.rank + k) % shard.ranks, (shard.rank - k) % shard.ranks
    taper: Taper = "falling" if tapered and shard.ranks == 2 else "none"
    theirs = shard.of(source)
    sends = [shard_rows(shard, rows, target) for rows in chunks_of(shard, chunks, taper)]
    receives = [shard_rows(theirs, rows, shard.rank) for rows in chunks_of(theirs, chunks, taper)]
    return _paired(sends, receives, chunks)


def _gather(shard: SequenceShard, chunks: int, tapered: bool = False) -> list[Post]:
    """Own chunks to every peer, every peer's chunks here."""
    return [post for k in range(1, shard.ranks) for post in _gather_from(shard, k, chunks, tapered)]


def _scatter_to(shard: SequenceShard, k: int, chunks: int, tapered: bool = False) -> list[Post]:
    """Partial results for the chunks of ``rank + k``; what ``rank - k`` has for ours."""
    source, target = (shard.rank - k) % shard.ranks, (shard.rank + k) % shard.ranks
    taper: Taper = "rising" if tapered and k == 1 else "none"
    theirs = shard.of(target)
    sends = [partial_sums(theirs, rows, shard.rank) for rows in chunks_of(theirs, chunks, taper)]
    receives = [partial_sums(shard, rows, source) for rows in chunks_of(shard, chunks, taper)]
    return _paired(sends, receives, chunks)


def _paired(sends: list[Transfer], receives: list[Transfer], chunks: int) -> list[Post]:
    """One post per chunk index. Shards differ by a row at most, so one side may have no such chunk."""
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
    """Compute on the own shard while the first chunks travel, then on each peer's chunk as it arrives."""
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
    """Compute for the others and send as each chunk is ready, then for ourselves; and what has yet to arrive then.

    With ``gather`` an all-gather travels beside: posted first, so that it never waits behind partial sums; or, with a
    window, a chunk of it with each chunk that leaves.
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
    """All-gather, nothing to compute."""
    posts = _gather(shard, 1)
    return Schedule([*posts, *(Wait(t) for t in _arrivals(posts))], sequence_buffers(shard, SHARD))


@remembered
def scatter_only(shard: SequenceShard) -> Schedule:
    """Reduce-scatter of something that exists already."""
    posts = [post for k in range(1, shard.ranks) for post in _scatter_to(shard, k, 1)]
    steps: list[Step] = [*posts, *(Wait(t) for t in _arrivals(posts)), Compute("reduce", shard.start, shard.stop)]
    return Schedule(steps, sequence_buffers(shard, PARTIAL_SUMS))


@remembered
def gather_matmul(shard: SequenceShard, chunks: int, *, pipelined: bool = True, window: int | None = None) -> Schedule:
    """All-gather -> matmul: own shard while the first chunks travel, then each peer's chunk as it arrives.

    ``pipelined=False`` waits for everything and runs one matmul: the plan for sizes too small to cut.
    """
    if pipelined:
        steps = _gather_phase(shard, chunks, window, "matmul")
    else:
        posts = _gather(shard, chunks)
        steps = [*posts, *(Wait(t) for t in _arrivals(posts)), Compute("matmul", 0, shard.length)]
    return Schedule(steps, sequence_buffers(shard, SHARD))


@remembered
def matmul_scatter(shard: SequenceShard, chunks: int, *, window: int | None = None) -> Schedule:
    """Matmul -> reduce-scatter: the peers' rows first, each chunk sent as it is ready; own rows last; then the sum."""
    steps, pending = _scatter_phase(shard, chunks, "matmul", window)
    steps += [*(Wait(t) for t in pending), Compute("reduce", shard.start, shard.stop)]
    return Schedule(steps, sequence_buffers(shard, PARTIAL_SUMS))


@remembered
def gather_matmul_scatter(
    shard: SequenceShard, chunks: int, *, scatter: bool = True, window: int | None = None
) -> Schedule:
    """Rows come from their owner, are worked on here, and the partial result goes back to them, chunk by chunk.

    Own rows first, while the peers' travel here; their results travel back under the next chunk's work. With a window
    one chunk is ahead of the one that is worked on, and travels here beside a result.
    ``scatter=False``: nothing goes back.
    """
    if not scatter:
        return Schedule(_gather_phase(shard, chunks, window, "dgrad"), sequence_buffers(shard, SHARD))
    # Counted alike on all ranks, also where a shard has no such chunk, so that messages are posted in one order.
    turns = list(itertools.product(range(1, shard.ranks), range(chunks)))
    gathers = {(k, _index(p)): p for k in range(1, shard.ranks) for p in _gather_from(shard, k, chunks, tapered=False)}
    scatters = {(k, _index(p)): p for k in range(1, shard.ranks) for p in _scatter_to(shard, k, chunks)}
    arriving = {transfer.rows: transfer for transfer in _arrivals(list(gathers.values()))}
    first = _gather(shard, chunks) if window is None else [gathers[turn] for turn in turns[:1] if turn in gathers]
    steps: list[Step] = [*first, Compute("dgrad", shard.start, shard.stop)]
    under_way = [Post(post.sends, ()) for post in first]  # what they bring is waited for where it is needed
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
    """Backward of gather_matmul: x is gathered again under dgrad, dx is scattered under wgrad.

    ``gather=False``: all of x is here already.
    """
    steps: list[Step] = []
    pending: list[Transfer] = []
    if dgrad:
        steps, pending = _scatter_phase(shard, chunks, "dgrad", window, gather=wgrad and gather)
    elif wgrad and gather:
        steps = _gather_phase(shard, chunks, window)
    if wgrad:
        steps += [Wait(t) for t in pending if t.buffer == SHARD]
        steps.append(Compute("wgrad", 0, shard.length))
    steps += [Wait(t) for t in pending if t.buffer == PARTIAL_SUMS]
    if dgrad:
        steps.append(Compute("reduce", shard.start, shard.stop))
    gathers, scatters = [SHARD] * (wgrad and gather), [PARTIAL_SUMS] * dgrad
    return Schedule(steps, sequence_buffers(shard, *gathers, *scatters) if gathers or scatters else ())


@remembered
def row_backward(
    shard: SequenceShard, chunks: int, *, dgrad: bool, wgrad: bool, spread: bool = False, window: int | None = None
) -> Schedule:
    """Backward of matmul_scatter: dy is gathered under dgrad; wgrad runs once, when the last chunk is in.

    ``spread``: where the wire takes longer than dgrad, wgrad too runs chunk by chunk, as they arrive.
    """
    wanted: list[Stage] = ["dgrad"] if dgrad else []
    if wgrad and spread:
        steps = _gather_phase(shard, chunks, window, *wanted, "wgrad")
    else:
        steps = _gather_phase(shard, chunks, window, *wanted)
        if wgrad:
            steps.append(Compute("wgrad", 0, shard.length))
    return Schedule(steps, sequence_buffers(shard, SHARD))
