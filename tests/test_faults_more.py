"""Faults on one rank, caught by all: no result is another step's or a dummy, nobody hangs, the group lives on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.comm.coordination import coordination_of
from seqpar_kernels.comm.watchdog import watchdog_of

from .test_faults import Explodes
from .world import World

PHASES = (0.0, 0.05, 0.125, 0.25, 0.375)  # of a watchdog that looks every half second: 0, .1, .25, .5 and .75 of that


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def fresh(phase: float) -> dist.ProcessGroup:
    """A group whose watchdogs start ``phase`` apart."""
    g = dist.new_group(list(range(group().size())))
    dist.barrier(g)
    time.sleep(phase * g.rank())
    watchdog_of(g)
    dist.barrier(g)
    return g


def caught(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, ValueError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"


def skipped_op(phase: float, late: float) -> tuple[list[Any], float]:
    """Rank 0 goes on with another op; what rank 1 receives in its own is never more than zeros that free it."""
    g, weight = fresh(phase), torch.ones(3, 5)
    rank = g.rank()

    def a() -> list[float]:
        x = torch.full((1, 1 if rank == 0 else 0, 5), 7.0)
        return sp.all_gather_linear(x, weight, group=g, seq_len=1).flatten().tolist()

    def b() -> list[float]:
        return sp.all_gather_linear(torch.ones(1, 4, 5), weight, group=g).flatten().tolist()

    a(), b()
    start = time.monotonic()
    if rank == 0:
        time.sleep(late)
    first = caught(b if rank == 0 else a)
    taken = time.monotonic() - start
    return [first, caught(a), caught(b)], taken


@pytest.mark.parametrize(("phase", "late"), [(0.1, 0.6), (0.25, 0.6), (0.0, 0.0), (0.375, 0.3)])
def test_a_dummy_is_never_taken_for_data(world2: World, phase: float, late: float) -> None:
    for (first, second, third), taken in world2.run(skipped_op, phase, late):
        assert isinstance(first, str) and "the ranks disagree" in first, first
        assert second == [35.0] * 3 and third == [5.0] * 24
        assert taken < 30


def pairs(rounds: int) -> list[str]:
    """Rank 0 repeats one known call; the others disagree in two ways, one of them before anything is sent."""
    g = group()
    x, w = torch.ones(2, 4, 8), torch.ones(6, 8)
    found = []

    def right() -> Any:
        return sp.all_gather_linear(x, w, group=g)

    others: list[Callable[[], Any]] = [
        lambda: sp.all_gather_linear(x[:, :3], w, group=g),
        lambda: sp.all_gather_linear(x, w[:, :5], group=g),
        lambda: sp.reduce_scatter_sequence(x.double(), g),
    ]
    for k in range(rounds):
        for n in (k % 3, (k + 1) % 3):
            got = caught(right if g.rank() == 0 else others[n])
            if not isinstance(got, str):
                found.append(f"round {k}: disagreement {n} was accepted")
        got = caught(right)
        if not isinstance(got, torch.Tensor) or not torch.equal(got, torch.full((2, 4 * g.size(), 6), 8.0)):
            found.append(f"round {k}: {got}")
    return found


def test_ranks_never_pair_different_steps(world: World) -> None:
    assert world.run(pairs, 3) == [[]] * world.ranks


def faulty_rounds(kind: str, phase: float, rounds: int) -> list[str]:
    """One rank raises in forward, backward or the optimizer; all go on until they have done as many steps."""
    g = fresh(phase)
    x, w = torch.randn(2, 12, 48, requires_grad=True), torch.nn.Parameter(torch.randn(24, 48))
    optimizer = torch.optim.SGD([w], lr=0.0)
    coordination, wrong = coordination_of(g), []

    def train(guilty: bool) -> None:
        y = sp.all_gather_linear(x, w, group=g)
        if guilty and kind == "forward":
            raise ArithmeticError("boom")
        y = Explodes.apply(y) if guilty and kind == "backward" else y
        y.sum().backward()
        if guilty and kind == "optimizer":
            raise ArithmeticError("boom")
        optimizer.step()

    train(False)
    for number in range(1, rounds + 1):
        start = time.monotonic()
        caught(lambda number=number: train(number % g.size() == g.rank()))  # type: ignore[misc]
        last: Any = None
        while coordination.steps < 10 * number:
            step = coordination.steps + 1
            last = caught(lambda step=step: sp.gather_sequence(torch.full((1, 2, 4), 8.0 * step + g.rank()), g))  # type: ignore[misc]
            if isinstance(last, torch.Tensor):
                expected = torch.cat([torch.full((1, 2, 4), 8.0 * step + r) for r in range(g.size())], 1)
                if not torch.equal(last, expected):
                    wrong.append(f"round {number}, step {step}: {last[0, :, 0].tolist()}")
        if not isinstance(last, torch.Tensor):
            wrong.append(f"round {number}: the group did not recover: {last}")
        if time.monotonic() - start > 30:  # seconds without load; the group's time-out is twice that
            wrong.append(f"round {number} took {time.monotonic() - start:.1f} s")
    return wrong


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_in_one_backward_leaves_the_group_alive(world2: World, phase: float) -> None:
    assert world2.run(faulty_rounds, "backward", phase, 2) == [[], []]


@pytest.mark.parametrize("kind", ["forward", "optimizer"])
def test_an_error_elsewhere_leaves_the_group_alive(world2: World, kind: str) -> None:
    assert world2.run(faulty_rounds, kind, 0.125, 2) == [[], []]


def two_threads() -> tuple[list[str], bool]:
    """A second thread calls while the first is amid an op, on rank 0; then one call after the other."""
    g = dist.new_group(list(range(group().size())))
    x, w = torch.ones(1, 2, 4), torch.ones(3, 4)

    def right() -> Any:
        return sp.all_gather_linear(x, w, group=g)

    right()
    heard: list[str] = []
    if g.rank() == 0:
        first = threading.Thread(target=lambda: heard.append(str(caught(right))))
        first.start()
        time.sleep(0.2)  # its peer has not come yet
        heard.append(str(caught(right)))
        first.join()
    else:
        time.sleep(0.6)
        heard += [str(caught(right)), str(caught(right))]
    again: list[Any] = []
    alone = threading.Thread(target=lambda: again.append(right()))  # another thread, but nobody beside it
    alone.start()
    alone.join()
    return heard, bool(torch.equal(again[0], torch.full((1, 2 * g.size(), 3), 4.0)))


def test_two_threads_at_once_are_refused_and_one_after_the_other_is_not(world2: World) -> None:
    (heard, well), (_, well1) = world2.run(two_threads)
    assert any("two threads use one group at once" in text for text in heard), heard
    assert well and well1


def many_lengths(count: int) -> int:
    """How many keys the store has more after ``count`` new lengths."""
    g = dist.new_group(list(range(group().size())))
    store = g.get_group_store()
    w = torch.ones(3, 4)
    sp.all_gather_linear(torch.ones(1, 2, 4), w, group=g)
    dist.barrier(g)
    before = store.num_keys()
    dist.barrier(g)
    for length in range(3, 3 + count):
        sp.all_gather_linear(torch.ones(1, length, 4), w, group=g)
        sp.dropout_add(torch.ones(1, length, 4), p=0.5, group=g)
    dist.barrier(g)
    return int(store.num_keys() - before)


def test_lengths_leave_nothing_in_the_store(world2: World) -> None:
    grown = world2.run(many_lengths, 40)
    assert max(grown) <= 8, grown  # barriers of torch's own may leave some
