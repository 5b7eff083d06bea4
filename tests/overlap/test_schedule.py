"""Schedules run on a simulated network: every send meets its receive, everything needed is there when it is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar_kernels.layout import SequenceShard
from seqpar_kernels.overlap.schedule import (
    Compute,
    Post,
    Step,
    Transfer,
    Wait,
    chunks_of,
    column_backward,
    gather_matmul,
    gather_only,
    matmul_scatter,
    row_backward,
    scatter_only,
)

Program = Callable[[SequenceShard], list[Step]]

PROGRAMS: dict[str, Callable[[int], Program]] = {
    "gather_only": lambda c: gather_only,
    "scatter_only": lambda c: scatter_only,
    "gather_matmul": lambda c: lambda s: gather_matmul(s, c),
    "gather_matmul_single": lambda c: lambda s: gather_matmul(s, c, pipelined=False),
    "matmul_scatter": lambda c: lambda s: matmul_scatter(s, c),
    "matmul_scatter_single": lambda c: lambda s: matmul_scatter(s, c, pipelined=False),
    "column_backward": lambda c: lambda s: column_backward(s, c, dgrad=True, wgrad=True),
    "column_backward_dgrad": lambda c: lambda s: column_backward(s, c, dgrad=True, wgrad=False),
    "column_backward_wgrad": lambda c: lambda s: column_backward(s, c, dgrad=False, wgrad=True),
    "row_backward": lambda c: lambda s: row_backward(s, c, dgrad=True, wgrad=True),
    "row_backward_wgrad": lambda c: lambda s: row_backward(s, c, dgrad=False, wgrad=True),
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
        ("matmul_scatter_single", "matmul"),
        ("column_backward", "dgrad"),
        ("column_backward", "wgrad"),
        ("row_backward", "dgrad"),
        ("row_backward", "wgrad"),
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
        for steps in (gather_matmul(shard, chunks), row_backward(shard, chunks, dgrad=True, wgrad=True)):
            here = set(range(shard.start, shard.stop))
            for step in steps:
                if isinstance(step, Wait):
                    here |= set(range(step.transfer.rows.start, step.transfer.rows.stop))
                elif isinstance(step, Compute):
                    assert here >= set(range(step.start, step.stop))


@sizes
def test_scattered_rows_are_computed_before_they_leave_and_summed_after_all_came(
    length: int, ranks: int, chunks: int
) -> None:
    for rank in range(ranks):
        shard = SequenceShard(length, ranks, rank)
        computed: set[int] = set()
        arrived: list[Transfer] = []
        for step in matmul_scatter(shard, chunks):
            if isinstance(step, Post):
                for t in step.sends:
                    assert computed >= set(range(t.rows.start, t.rows.stop))
            elif isinstance(step, Wait):
                arrived.append(step.transfer)
            elif step.stage == "matmul":
                computed |= set(range(step.start, step.stop))
            else:
                rows = sorted((t.source, r) for t in arrived for r in range(t.rows.start, t.rows.stop))
                others = [source for source in range(ranks) if source != rank]
                assert rows == [(source, r) for source in others for r in range(shard.start, shard.stop)]


def test_own_shard_comes_first_in_a_gather_and_last_in_a_scatter() -> None:
    shard = SequenceShard(16, 4, 1)
    gather = [s for s in gather_matmul(shard, 2) if isinstance(s, Compute)]
    scatter = [s for s in matmul_scatter(shard, 2) if isinstance(s, Compute) and s.stage == "matmul"]
    assert (gather[0].start, gather[0].stop) == (4, 8)
    assert [s.start for s in gather[1:]] == [8, 10, 12, 14, 0, 2]  # rotated: rank 2, 3, 0
    assert (scatter[-1].start, scatter[-1].stop) == (4, 8)
    assert [s.start for s in scatter[:-1]] == [8, 10, 12, 14, 0, 2]


def test_backward_overlaps_what_it_says() -> None:
    """The gather is under way during dgrad, the scatter during wgrad."""
    steps = column_backward(SequenceShard(8, 2, 0), 2, dgrad=True, wgrad=True)
    kinds = [s.stage if isinstance(s, Compute) else type(s).__name__ for s in steps]
    first_dgrad, wgrad = kinds.index("dgrad"), kinds.index("wgrad")
    last_scatter = max(i for i, s in enumerate(steps) if isinstance(s, Post) and s.sends[0].kind == "scatter")
    gathers = [i for i, s in enumerate(steps) if isinstance(s, Post) and s.sends[0].kind == "gather"]
    scatter_waits = [i for i, s in enumerate(steps) if isinstance(s, Wait) and s.transfer.kind == "scatter"]
    assert max(gathers) < first_dgrad < last_scatter < wgrad < min(scatter_waits)
    assert kinds[-1] == "reduce"


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 9))
def test_chunks_cover_the_shard_and_none_is_empty(length: int, ranks: int, chunks: int) -> None:
    for rank in range(ranks):
        shard = SequenceShard(length, ranks, rank)
        pieces = chunks_of(shard, chunks)
        assert [r for piece in pieces for r in range(piece.start, piece.stop)] == list(range(shard.start, shard.stop))
        assert all(piece.start < piece.stop for piece in pieces)
