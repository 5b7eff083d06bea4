"""Ranks that die, stall or disagree late: the others fail within the group's time-out and say where."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp

from .world import World

TIMEOUT = 4.0


@pytest.fixture
def short_world() -> Iterator[World]:
    """A world of its own: a group does not survive these."""
    world = World(2, timeout=TIMEOUT)
    yield world
    world.close()


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def call(length: int = 4) -> None:
    sp.all_gather_linear(torch.randn(2, length, 6), torch.randn(3, 6), group=group())


def dies(met_before: bool) -> None:
    if met_before:
        call()
    if group().rank() == 1:
        os._exit(1)
    time.sleep(0.5)
    call()


@pytest.mark.parametrize("met_before", [False, True])
def test_a_dead_rank_is_named(short_world: World, met_before: bool) -> None:
    start = time.monotonic()
    (ok, text), (_, other) = short_world.outcomes(dies, met_before)
    assert not ok and other == "the process died"
    assert "all_gather_linear" in text and "rank 1" in text
    assert time.monotonic() - start < 10 * TIMEOUT  # bounded by the time-out, not by luck


def diverge() -> None:
    """Both calls have been seen before, so nothing is agreed on anew: tags keep the messages apart."""
    call(4)
    call(6)
    call(4 + 2 * group().rank())


def test_a_late_disagreement_is_found_fast_and_the_group_lives(world2: World) -> None:
    start = time.monotonic()
    outcomes = world2.outcomes(diverge)
    assert [ok for ok, _ in outcomes] == [False, False]
    for _, text in outcomes:
        assert "the ranks disagree: rank 0: all_gather_linear(S=8" in text, text
        assert "; rank 1: all_gather_linear(S=12" in text, text
    assert time.monotonic() - start < 30  # the time-out of this world is twice that
    world2.run(right_result)


def half_known() -> None:
    """Rank 0 meets nothing new and sends at once; rank 1 comes to something new and asks first."""
    call(4)
    call(4 if group().rank() == 0 else 9)


def test_a_disagreement_that_only_one_rank_can_see_is_found_fast(world2: World) -> None:
    start = time.monotonic()
    outcomes = world2.outcomes(half_known)
    for ok, text in outcomes:
        assert not ok and "the ranks disagree: rank 0: all_gather_linear(S=8" in text, text
    assert time.monotonic() - start < 30
    world2.run(right_result)


def right_result() -> None:
    """What the ops of a sound group give, often enough that a message left over from before would be met."""
    g = group()
    for _ in range(3):
        x, w = torch.arange(40.0).view(2, 4, 5), torch.ones(3, 5)
        whole = torch.cat([x + r for r in range(g.size())], 1)
        assert torch.equal(sp.all_gather_linear(x + g.rank(), w, group=g, chunks=2), whole @ w.t())
        assert torch.equal(
            sp.linear_reduce_scatter(whole, w, group=g), (g.size() * whole @ w.t()).tensor_split(g.size(), 1)[g.rank()]
        )


def fails_between_chunks(kind: str) -> None:
    """One rank fails in its matmul, with its first chunks sent and its peer's on the way."""
    from seqpar_kernels.ops import gather_linear
    from seqpar_kernels.overlap import pipelined

    x, w = torch.randn(2, 4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    y = sp.all_gather_linear(x, w, group=group(), chunks=2)

    def explode(*args: object, **options: object) -> None:
        raise ArithmeticError("boom")

    healthy = pipelined.matmul_into
    if group().rank() == 1:
        gather_linear.matmul_into = pipelined.matmul_into = explode  # type: ignore[assignment]
    try:
        if kind == "forward":
            sp.all_gather_linear(x, w, group=group(), chunks=2)
        else:
            y.sum().backward()
    finally:
        gather_linear.matmul_into = pipelined.matmul_into = healthy


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_an_exception_amid_an_op_reaches_the_others_and_the_group_lives(world2: World, kind: str) -> None:
    (ok0, text0), (ok1, text1) = world2.outcomes(fails_between_chunks, kind)
    assert not ok1 and "ArithmeticError: boom" in text1
    name = "all_gather_linear" + " backward" * (kind == "backward")
    if not ok0:  # all that rank 0 needs may have been sent
        assert f"rank 1 failed in {name}(" in text0 and "boom" in text0, text0
    if ok0:
        heard, _ = world2.run(right_result_at_second_try)
        assert f"rank 1 failed in {name}(" in heard, heard
    world2.run(right_result)


def right_result_at_second_try() -> str:
    """A rank that had got all it needed hears of the failure at its next op."""
    try:
        right_result()
    except RuntimeError as error:
        right_result()
        return str(error)
    return ""


def subgroup_stalls() -> float:
    """A subgroup's own time-out counts, not the world's."""
    from datetime import timedelta

    sub = dist.new_group([0, 1], timeout=timedelta(seconds=1.5))
    start = time.monotonic()
    if group().rank() == 0:
        with pytest.raises(RuntimeError, match=r"rank 1 did not reach this op within the time-out of 0:00:01\.5"):
            sp.all_gather_linear(torch.randn(2, 4, 6), torch.randn(3, 6), group=sub)
    return time.monotonic() - start


def test_a_subgroup_waits_as_long_as_it_says(short_world: World) -> None:
    assert short_world.run(subgroup_stalls)[0] < TIMEOUT


def stalls() -> None:
    call()
    if group().rank() == 1:
        time.sleep(2 * TIMEOUT)
    else:
        sp.linear_reduce_scatter(torch.randn(2, 8, 6), torch.randn(3, 6), group=group())


def test_a_stalled_rank_is_named(short_world: World) -> None:
    (ok, text), _ = short_world.outcomes(stalls)
    assert not ok and "linear_reduce_scatter" in text and "rank 1 did not reach this op" in text


def scatter_with(act: Callable[[], object]) -> None:
    """A reduce-scatter in which rank 1 does ``act`` before each of its matmuls; the others wait for its sums."""
    from seqpar_kernels.overlap import pipelined

    g, healthy = group(), pipelined.matmul_into

    def acting(*args: Any, **options: Any) -> None:
        act()
        healthy(*args, **options)

    x, w = torch.arange(96.0).view(2, 12, 4) + g.rank(), torch.ones(3, 4)
    if g.rank() == 1:
        pipelined.matmul_into = acting
    try:
        y = sp.linear_reduce_scatter(x, w, group=g, chunks=2, engine="p2p")
    finally:
        pipelined.matmul_into = healthy
    whole = sum((torch.arange(96.0).view(2, 12, 4) + r) @ w.t() for r in range(g.size()))
    assert isinstance(whole, torch.Tensor) and torch.equal(y, whole.tensor_split(g.size(), 1)[g.rank()])


def scatter_with_sleep(seconds: float) -> None:
    scatter_with(lambda: time.sleep(seconds))


def scatter_with_death() -> None:
    scatter_with(lambda: os._exit(1))


def scatter_with_error() -> None:
    def explode() -> None:
        raise ArithmeticError("boom")

    scatter_with(explode)


AMID = (
    r"linear_reduce_scatter\(.*receiving chunk \d \(rows \d+\.\.\d+ of rank {0}, partial sums\) "
    r"failed between rank {0} and rank 1"
)


def test_a_straggler_is_waited_for(short_world: World) -> None:
    """Longer than patience, shorter than the time-out: asked after, and no harm done."""
    short_world.run(scatter_with_sleep, 0.0)
    short_world.run(scatter_with_sleep, 0.4 * TIMEOUT)
    short_world.run(scatter_with_sleep, 0.0)


def test_a_rank_that_stalls_amid_an_op_is_named_with_the_chunk(short_world: World) -> None:
    (ok0, text0), (ok1, _) = short_world.outcomes(scatter_with_sleep, 1.5 * TIMEOUT)
    assert not ok0 and re.search(AMID.format(0), text0), text0
    assert not ok1  # its peer has gone: no result on one side only


def test_a_rank_that_dies_amid_an_op_is_named_with_the_chunk(short_world: World) -> None:
    """Found at whichever message comes first after the death, one that is sent or one that is received."""
    (ok, text), (_, other) = short_world.outcomes(scatter_with_death)
    assert other == "the process died"
    either = (
        r"(receiving|sending) chunk \d \(rows \d+\.\.\d+ of rank [01], partial sums\) failed between rank 0 and rank 1"
    )
    assert not ok and re.search(r"linear_reduce_scatter\(.*" + either, text), text


def test_all_others_hear_of_an_exception_amid_an_op() -> None:
    world = World(3)
    try:
        world.run(right_result)
        outcomes = world.outcomes(scatter_with_error)
        assert not outcomes[1][0] and "ArithmeticError: boom" in outcomes[1][1]
        for rank in (0, 2):
            ok, text = outcomes[rank]
            assert not ok and "rank 1 failed in linear_reduce_scatter(" in text and "boom" in text, text
        world.run(right_result)
        world.run(scatter_with_sleep, 0.0)
    finally:
        world.close()


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("boom")


def backward_fails_on_one_rank() -> None:
    x, w = torch.randn(2, 4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    y = sp.all_gather_linear(x, w, group=group())
    y = Explodes.apply(y) if group().rank() == 1 else y
    y.sum().backward()


def test_an_exception_in_one_backward_reaches_the_others(short_world: World) -> None:
    (ok0, text0), (ok1, text1) = short_world.outcomes(backward_fails_on_one_rank)
    assert not ok1 and "boom" in text1
    assert not ok0 and "all_gather_linear backward" in text0 and "rank 1" in text0
