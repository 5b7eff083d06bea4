"""Ranks that die, stall or disagree late: the others fail within the group's time-out and say where."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

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


def test_a_late_disagreement_times_out_with_both_sides_named(short_world: World) -> None:
    outcomes = short_world.outcomes(diverge)
    assert [ok for ok, _ in outcomes] == [False, False]
    for rank, (_, text) in enumerate(outcomes):
        assert "all_gather_linear(S=" in text and f"between rank {rank} and rank {1 - rank}" in text, text
    assert any(f"rank {1 - r} was in all_gather_linear(S=" in text for r, (_, text) in enumerate(outcomes))


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
