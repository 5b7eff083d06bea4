"""What the stopwatch does around the calls it times: which buffers, how often, whose time. Never how long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench import facts, linear_rank, norm_cases, norm_features, ranks, reduce_cases, timing
from bench.timing import Effort

BRIEF = Effort(seconds=0.0, warmup=0.0, least=5, most=5)


def test_consecutive_calls_take_consecutive_buffers() -> None:
    """Else all but the first of a round read what their predecessor has just read."""
    seen: list[int] = []
    timing.interleave(dict.fromkeys(("a", "b", "c"), seen.append), "cpu", BRIEF)
    assert seen == list(range(len(seen)))
    assert len(seen) == 3 * (2 + 5)


@pytest.mark.parametrize("cache", [2**16, 3 * 2**18])
def test_a_rotation_of_inputs_exceeds_the_cache(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "cache_bytes", lambda device: cache)
    plain = norm_cases.make_buffers(norm_cases.NormCase("rms", 0.1, "bf16", 32, 64), "cpu")
    assert sum(b.inputs[0].nbytes + b.inputs[1].nbytes for b in plain) > 1.5 * cache
    for name in ("x_bias", "residual_fp32", "two_norms"):
        options = norm_features.make_buffers(norm_features.Case(name, "bf16", 32, 64), "cpu")
        assert sum(b.inputs["x"].nbytes + b.inputs["residual"].nbytes for b in options) > 1.5 * cache
    for fused in (False, True):
        parts = reduce_cases.make_buffers(reduce_cases.ReduceCase(fused, 2, 0.0, "bf16", 32, 64), "cpu")
        assert sum(b.parts.nbytes for b in parts) > 1.5 * cache


def test_buffers_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "cache_bytes", lambda device: 2**20)
    monkeypatch.setattr(facts, "memory_budget", lambda device: 10 * 2**12)
    assert timing.sets_to_rotate(2**11, 2**12, "cpu") == 10
    assert timing.sets_to_rotate(2**30, 2**31, "cpu") == 1


@pytest.mark.parametrize(("device", "clock"), [("cpu", "thread_time_ns"), ("cuda", "process_time_ns")])
def test_cpu_time_counts_the_threads_that_work_for_a_call(
    device: str, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the backward runs in autograd's thread of the device."""
    ticks = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    for name in ("thread_time_ns", "process_time_ns"):
        monkeypatch.setattr(timing.time, name, (lambda: next(ticks)) if name == clock else (lambda: 0))
    assert timing.cpu_time_per_call(lambda: None, device, BRIEF, batch=1) == [1.0] * 5


def warmed_up(job: dict[str, Any], group: dist.ProcessGroup, step: Callable[[str], None]) -> dict[str, Any]:
    """How often :func:`bench.linear_rank.rounds` calls runners that wait for each other; ranks begin apart."""
    counts = dict.fromkeys("ab", 0)
    pause = threading.Event()

    def runner(name: str) -> Callable[[], object]:
        def run() -> None:
            counts[name] += 1
            pause.wait(0.01 * (1 + group.rank()))
            dist.all_reduce(torch.zeros(1), group=group)

        return run

    times = linear_rank.rounds({name: runner(name) for name in counts}, Effort(**job), group, "cpu")
    return {"counts": counts, "timed": {name: len(found) for name, found in times.items()}}


def test_ranks_warm_up_by_time_and_together() -> None:
    effort = {"seconds": 0.0, "warmup": 0.2, "least": 2, "most": 2}
    first, second = ranks.run_ranks("tests.bench.test_timing:warmed_up", effort, 2)
    assert first == second
    assert first["timed"] == {"a": 2, "b": 2}
    assert all(count > 3 for count in first["counts"].values())  # once and the two that are timed, it was
