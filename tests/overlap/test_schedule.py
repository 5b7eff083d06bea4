"""Schedules run on a simulated network: every send meets its receive, everything needed is there when it is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar_kernels.comm.steps import Compute, Drain, Post, Step, Transfer, Wait
from seqpar_kernels.layout import SequenceShard
from seqpar_kernels.overlap.exchange_schedules import all_to_all, chain, ring
from seqpar_kernels.overlap.schedule import (
    PARTIAL_SUMS,
    SHARD,
    Schedule,
    Taper,
    chunks_of,
    column_backward,
    gather_matmul,
    gather_matmul_scatter,
    gather_only,
    matmul_scatter,
    row_backward,
    scatter_only,
)

Program = Callable[[SequenceShard], Schedule]

PROGRAMS: dict[str, Callable[[int], Program]] = {
    "gather_only": lambda c: gather_only,
    "scatter_only": lambda c: scatter_only,
    "gather_matmul": lambda c: lambda s: gather_matmul(s, c),
    "gather_matmul_single": lambda c: lambda s: gather_matmul(s, c, pipelined=False),
    "matmul_scatter": lambda c: lambda s: matmul_scatter(s, c),
    "column_backward": lambda c: lambda s: column_backward(s, c, dgrad=True, wgrad=True),
    "column_backward_dgrad": lambda c: lambda s: column_backward(s, c, dgrad=True, wgrad=False),
    "column_backward_wgrad": lambda c: lambda s: column_backward(s, c, dgrad=False, wgrad=True),
    "column_backward_gathered": lambda c: lambda s: column_backward(s, c, dgrad=True, wgrad=True, gather=False),
    "gather_matmul_scatter": lambda c: lambda s: gather_matmul_scatter(s, c),
    "gather_matmul_scatter_nothing": lambda c: lambda s: gather_matmul_scatter(s, c, scatter=False),
    "row_backward": lambda c: lambda s: row_backward(s, c, dgrad=True, wgrad=True),
    "row_backward_spread": lambda c: lambda s: row_backward(s, c, dgrad=True, wgrad=True, spread=True),
    "row_backward_wgrad": lambda c: lambda s: row_backward(s, c, dgrad=False, wgrad=True),
}
PROGRAMS |= {
    "gather_matmul_window": lambda c: lambda s: gather_matmul(s, c, window=1),
    "matmul_scatter_window": lambda c: lambda s: matmul_scatter(s, c, window=2),
    "column_backward_window": lambda c: lambda s: column_backward(s, c, dgrad=True, wgrad=True, window=1),
    "column_backward_wgrad_window": lambda c: lambda s: column_backward(s, c, dgrad=False, wgrad=True, window=1),
    "gather_matmul_scatter_window": lambda c: lambda s: gather_matmul_scatter(s, c, window=1),
    "gather_matmul_scatter_wider_window": lambda c: lambda s: gather_matmul_scatter(s, c, window=2),
    "row_backward_spread_window": lambda c: lambda s: row_backward(s, c, dgrad=True, wgrad=True, spread=True, window=2),
    "row_backward_window": lambda c: lambda s: row_backward(s, c, dgrad=True, wgrad=True, window=2),
}


def ragged(length: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """How many rows each rank sends to each other: none at times."""
    return tuple(tuple((length * (3 * s + 5 * r + 1)) % 7 for r in range(ranks)) for s in range(ranks))


def sizes_of(s: SequenceShard) -> tuple[int, ...]:
    return tuple(map(sum, ragged(s.length, s.ranks)))


PROGRAMS |= {
    "all_to_all": lambda c: lambda s: all_to_all(ragged(s.length, s.ranks), s.rank, chunks=c),
    "all_to_all_computed": lambda c: lambda s: all_to_all(ragged(s.length, s.ranks), s.rank, chunks=c, stage="matmul"),
    "shift": lambda c: lambda s: ring(sizes_of(s), s.rank, hops=1),
    "ring": lambda c: lambda s: ring(sizes_of(s), s.rank),
    "ring_computed": lambda c: lambda s: ring(sizes_of(s), s.rank, stage="matmul"),
    "chain": lambda c: lambda s: chain(s.length, s.ranks, s.rank, stage="matmul"),
}

PROGRAMS |= {
    f"{name}_receives_first": lambda c, program=program: lambda s: program(c)(s).receives_first
    for name, program in PROGRAMS.items()
}

sizes = given(st.integers(0, 23), st.integers(1, 6), st.integers(1, 5))


def simulate(program: Program, length: int, ranks: int) -> dict[int, list[Step]]:
    """Run all ranks; messages between two ranks are matched first-in first-out, as every transport may do."""
    steps = {rank: deque(program(SequenceShard(length, ranks, rank))) for rank in range(ranks)}
    done: dict[int, list[Step]] = {rank: [] for rank in range(ranks)}
    wires: dict[tuple[int, int], list[Transfer]] = {}
    expected: dict[tuple[int, int], list[Transfer]] = {}
    progress = True
    while progress:
        progress = False
        for rank in range(ranks):
            while steps[rank]:
                step = steps[rank][0]
                if isinstance(step, Post):
                    for t in step.sends:
                        assert t.source == rank != t.target
                        wires.setdefault((rank, t.target), []).append(t)
                    for t in step.receives:
                        assert t.target == rank != t.source
                        expected.setdefault((t.source, rank), []).append(t)
                elif isinstance(step, Wait):
                    wire = (step.transfer.source, rank)
                    position = expected[wire].index(step.transfer)
                    if len(wires.get(wire, [])) <= position:
                        break  # not sent yet: let the others run
                    assert wires[wire][position] == step.transfer, "first-in first-out pairs the wrong messages"
                elif isinstance(step, Drain) and any(
                    len(sent) > len(expected.get(wire, [])) for wire, sent in wires.items() if wire[0] == rank
                ):
                    break  # a message may need its receive before it leaves
                done[rank].append(steps[rank].popleft())
                progress = True
    assert not any(steps.values()), f"deadlock: {steps}"
    assert {k: v for k, v in wires.items() if v} == {k: v for k, v in expected.items() if v}
    return done


@pytest.mark.parametrize("name", PROGRAMS)
@sizes
def test_no_deadlock_and_every_message_is_expected(name: str, length: int, ranks: int, chunks: int) -> None:
    simulate(PROGRAMS[name](chunks), length, ranks)


def covered(steps: list[Step], stage: str) -> list[int]:
    return sorted(r for s in steps if isinstance(s, Compute) and s.stage == stage for r in range(s.start, s.stop))


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("gather_matmul", "matmul"),
        ("gather_matmul_single", "matmul"),
        ("matmul_scatter", "matmul"),
        ("column_backward", "dgrad"),
        ("column_backward", "wgrad"),
        ("column_backward_gathered", "dgrad"),
        ("column_backward_gathered", "wgrad"),
        ("gather_matmul_scatter", "dgrad"),
        ("gather_matmul_scatter_nothing", "dgrad"),
        ("row_backward", "dgrad"),
        ("row_backward", "wgrad"),
        ("row_backward_spread", "dgrad"),
        ("row_backward_spread", "wgrad"),
        ("row_backward_spread_window", "wgrad"),
        ("gather_matmul_window", "matmul"),
        ("matmul_scatter_window", "matmul"),
        ("column_backward_window", "dgrad"),
        ("column_backward_window", "wgrad"),
        ("gather_matmul_scatter_window", "dgrad"),
        ("gather_matmul_scatter_wider_window", "dgrad"),
        ("row_backward_window", "dgrad"),
    ],
)
@sizes
def test_every_row_is_computed_once(name: str, stage: str, length: int, ranks: int, chunks: int) -> None:
    for steps in simulate(PROGRAMS[name](chunks), length, ranks).values():
        assert covered(steps, stage) == list(range(length))


@sizes
def test_gathered_rows_are_waited_for_before_use(length: int, ranks: int, chunks: int) -> None:
    for rank in range(ranks):
        shard = SequenceShard(length, ranks, rank)
        programs = (
            gather_matmul(shard, chunks),
            gather_matmul_scatter(shard, chunks),
            gather_matmul_scatter(shard, chunks, window=1),
            row_backward(shard, chunks, dgrad=True, wgrad=True),
            row_backward(shard, chunks, dgrad=True, wgrad=True, spread=True),
        )
        for steps in (*programs, *(program.receives_first for program in programs)):
            here = set(range(shard.start, shard.stop))
            for step in steps:
                if isinstance(step, Wait) and step.transfer.buffer == SHARD:
                    here |= set(range(step.transfer.rows.start, step.transfer.rows.stop))
                elif isinstance(step, Compute) and step.stage != "reduce":
                    assert here >= set(range(step.start, step.stop))


@pytest.mark.parametrize("suffix", ["", "_receives_first"])
@sizes
def test_exchanges_bring_every_row_once(suffix: str, length: int, ranks: int, chunks: int) -> None:
    counts = ragged(length, ranks)
    got = [sum(row[rank] for row in counts) for rank in range(ranks)]
    for rank, steps in simulate(PROGRAMS[f"all_to_all_computed{suffix}"](chunks), length, ranks).items():
        assert covered(steps, "matmul") == list(range(got[rank]))
    for rank, steps in simulate(PROGRAMS[f"ring_computed{suffix}"](chunks), length, ranks).items():
        assert covered(steps, "matmul") == list(range(sum(map(sum, counts))))
        here = [step for step in steps if isinstance(step, Compute)]
        assert len(here) == sum(map(bool, map(sum, counts)))  # a shard at a time, in the order of the ring
        ordered = [sum(map(sum, counts[: (rank - hop) % ranks])) for hop in range(ranks) if sum(counts[rank - hop])]
        assert [step.start for step in here] == ordered
    for rank, steps in simulate(PROGRAMS[f"chain{suffix}"](chunks), length, ranks).items():
        assert covered(steps, "matmul") == list(range(length))
        kinds = [type(step) for step in steps if not (isinstance(step, Post) and not step.sends)]
        assert kinds == ([Wait] * (rank > 0) + [Compute] + [Post] * (rank < ranks - 1) if length else [])


SCATTERS = ["matmul_scatter", "gather_matmul_scatter", "gather_matmul_scatter_wider_window"]


@pytest.mark.parametrize("name", [*SCATTERS, *(f"{name}_receives_first" for name in SCATTERS[:2])])
@sizes
def test_scattered_rows_are_computed_before_they_leave_and_summed_after_all_came(
    name: str, length: int, ranks: int, chunks: int
) -> None:
    for rank in range(ranks):
        shard = SequenceShard(length, ranks, rank)
        computed: set[int] = set()
        arrived: list[Transfer] = []
        for step in PROGRAMS[name](chunks)(shard):
            if isinstance(step, Post):
                for t in step.sends:
                    if t.buffer == SHARD:
                        continue
                    assert computed >= set(range(t.rows.start, t.rows.stop))
            elif isinstance(step, Wait):
                arrived += [step.transfer] if step.transfer.buffer == PARTIAL_SUMS else []
            elif isinstance(step, Compute) and step.stage != "reduce":
                computed |= set(range(step.start, step.stop))
            elif isinstance(step, Compute):
                rows = sorted((t.source, r) for t in arrived for r in range(t.rows.start, t.rows.stop))
                others = [source for source in range(ranks) if source != rank]
                assert rows == [(source, r) for source in others for r in range(shard.start, shard.stop)]


WINDOWED = ["gather_matmul_window", "matmul_scatter_window", "column_backward_window", "gather_matmul_scatter_window"]


@pytest.mark.parametrize("name", WINDOWED)
@sizes
def test_a_window_bounds_the_messages_under_way(name: str, length: int, ranks: int, chunks: int) -> None:
    """A message counts from its post to its wait where it arrives, to the next drain where it leaves."""
    window = 2 if name == "matmul_scatter_window" else 1
    kinds = 2 if name in ("column_backward_window", "gather_matmul_scatter_window") else 1
    for steps in simulate(PROGRAMS[name](chunks), length, ranks).values():
        leaving, coming = 0, set[Transfer]()
        for step in steps:
            if isinstance(step, Post):
                leaving += len(step.sends)
                coming |= set(step.receives)
                assert leaving <= kinds * window
                assert len(coming) <= kinds * window
            elif isinstance(step, Wait):
                coming.remove(step.transfer)
            elif isinstance(step, Drain):
                leaving = 0
        assert not coming


def test_own_shard_comes_first_in_a_gather_and_last_in_a_scatter() -> None:
    shard = SequenceShard(16, 4, 1)
    gather = [s for s in gather_matmul(shard, 2) if isinstance(s, Compute)]
    scatter = [s for s in matmul_scatter(shard, 2) if isinstance(s, Compute) and s.stage == "matmul"]
    assert (gather[0].start, gather[0].stop) == (4, 8)
    assert [s.start for s in gather[1:]] == [8, 10, 12, 14, 0, 2]  # rotated: rank 2, 3, 0
    assert (scatter[-1].start, scatter[-1].stop) == (4, 8)
    assert [s.start for s in scatter[:-1]] == [8, 9, 12, 14, 0, 2]  # the first chunk that leaves is small


def test_backward_overlaps_what_it_says() -> None:
    """The gather is under way during dgrad, the scatter during wgrad."""
    steps = column_backward(SequenceShard(8, 2, 0), 2, dgrad=True, wgrad=True)
    kinds = [s.stage if isinstance(s, Compute) else type(s).__name__ for s in steps]
    first_dgrad, wgrad = kinds.index("dgrad"), kinds.index("wgrad")
    last_scatter = max(i for i, s in enumerate(steps) if isinstance(s, Post) and s.sends[0].buffer == PARTIAL_SUMS)
    gathers = [i for i, s in enumerate(steps) if isinstance(s, Post) and s.sends[0].buffer == SHARD]
    scatter_waits = [i for i, s in enumerate(steps) if isinstance(s, Wait) and s.transfer.buffer == PARTIAL_SUMS]
    assert max(gathers) < first_dgrad < last_scatter < wgrad < min(scatter_waits)
    assert kinds[-1] == "reduce"


def test_chunks_are_small_where_nothing_hides_them() -> None:
    """On two ranks with matmul and wire alike, every chunk arrives when the one before has been multiplied."""
    shard = SequenceShard(300, 2, 0)
    gather = [s for s in gather_matmul(shard, 4) if isinstance(s, Compute)]
    scatter = [s for s in matmul_scatter(shard, 4) if isinstance(s, Compute) and s.stage == "matmul"]
    assert [s.stop - s.start for s in gather] == [150, 80, 40, 20, 10]
    assert [s.stop - s.start for s in scatter] == [10, 20, 40, 80, 150]
    # the wire takes two units a row of the shard, the matmul one
    arrived = done = 0
    for step in gather[1:]:
        arrived += 2 * (step.stop - step.start)
        done = max(done or 150, arrived) + step.stop - step.start
    assert done == 310  # beside 300 of matmul and 300 of wire
    bounded = [s for s in matmul_scatter(shard, 4, window=1) if isinstance(s, Compute) and s.stage == "matmul"]
    assert max(s.stop - s.start for s in bounded[:-1]) == 38  # within a bound the largest counts


def test_receives_come_first_but_for_what_a_window_bounds() -> None:
    steps = matmul_scatter(SequenceShard(24, 3, 0), 2)
    sooner = steps.receives_first
    received = [t for step in steps if isinstance(step, Post) for t in step.receives]
    assert sooner[0] == Post((), tuple(received)) and len(received) == 4
    assert [step for step in sooner if not isinstance(step, Post)] == [s for s in steps if not isinstance(s, Post)]
    sends = [step.sends for step in steps if isinstance(step, Post)]
    assert [(step.sends, step.receives) for step in sooner[1:] if isinstance(step, Post)] == [(s, ()) for s in sends]
    # What is gathered keeps its place before what is scattered: each connection delivers in order.
    backward = column_backward(SequenceShard(24, 3, 0), 2, dgrad=True, wgrad=True)
    posts = [step for step in backward.receives_first if isinstance(step, Post)]
    assert [t.buffer for post in posts for t in post.receives] == [SHARD] * 4 + [PARTIAL_SUMS] * 4
    unchanged = matmul_scatter(SequenceShard(24, 3, 0), 2, window=1)
    assert unchanged.receives_first is unchanged


def test_sends_take_turns_where_arrivals_are_worked_on() -> None:
    """Never more than one peer's chunks ahead of what has arrived, and all the same every rank runs to its end."""
    for steps in (
        gather_matmul(SequenceShard(48, 4, 1), 3),
        row_backward(SequenceShard(48, 4, 1), 3, dgrad=True, wgrad=True),
    ):
        turns = steps.receives_first
        first, *rest = (step for step in turns if isinstance(step, Post))
        assert len(first.receives) == 9 and not first.sends and not any(post.receives for post in rest)
        assert [t for post in rest for t in post.sends] == [t for s in steps if isinstance(s, Post) for t in s.sends]
        sent = arrived = 0
        for step in turns:
            sent += len(step.sends) if isinstance(step, Post) else 0
            arrived += isinstance(step, Wait)
            assert sent <= arrived + 3
        assert [step for step in turns if not isinstance(step, Post)] == [s for s in steps if not isinstance(s, Post)]
    # Where nothing is computed in between, or partial results travel too, all sends go at once.
    for steps in (gather_only(SequenceShard(48, 4, 1)), gather_matmul_scatter(SequenceShard(48, 4, 1), 3)):
        kinds = [type(step) for step in steps.receives_first]
        gathers = [s for s in steps.receives_first if isinstance(s, Post) and s.sends and s.sends[0].buffer == SHARD]
        assert kinds.index(Wait) > max(steps.receives_first.index(post) for post in gathers)


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["none", "rising", "falling"]))
def test_chunks_cover_the_shard_and_none_is_empty(length: int, ranks: int, chunks: int, taper: Taper) -> None:
    for rank in range(ranks):
        shard = SequenceShard(length, ranks, rank)
        pieces = chunks_of(shard, chunks, taper)
        assert [r for piece in pieces for r in range(piece.start, piece.stop)] == list(range(shard.start, shard.stop))
        assert all(piece.start < piece.stop for piece in pieces)
