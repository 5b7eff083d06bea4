"""The stopwatch: warm-up by time, providers interleaved, median with p20 and p80."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from . import facts

Runner = Callable[[int], object]  # called with the number of the call, which picks the rotating buffers
MOST_SETS = 1024  # of buffers: what is smaller than a thousandth of the cache is all overhead anyway


@dataclass(frozen=True)
class Effort:
    """How long to measure one provider at one shape."""

    seconds: float = 1.0
    warmup: float = 0.2
    least: int = 15
    most: int = 400

    @classmethod
    def quick(cls, device: str = "cpu") -> Effort:
        return cls(seconds=0.1 if device == "cuda" else 0.3, warmup=0.05, least=5, most=100)

    @classmethod
    def overview(cls) -> Effort:
        """Everything in one go, in minutes."""
        return cls(seconds=0.4, warmup=0.1, least=7)

    def share(self, parts: int) -> Effort:
        """A part of the time."""
        return dataclasses.replace(self, seconds=self.seconds / parts, warmup=self.warmup / parts)


@dataclass(frozen=True)
class Stats:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, times_ms: list[float]) -> Stats:
        if len(times_ms) < 2:
            return cls(*times_ms * 3, len(times_ms))
        tenths = statistics.quantiles(times_ms, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7], len(times_ms))


def sets_to_rotate(read: int, held: int, device: str) -> int:
    """How many sets of buffers there must be for a call to find none of its inputs in the cache.

    Consecutive calls, whoever makes them, take consecutive sets, so a set comes back when all others were read.

    Args:
        read: bytes of one set that a forward reads.
        held: bytes of one set.
    """
    count = max(2, int(1.5 * facts.cache_bytes(device) / read) + 1)
    return max(1, min(count, MOST_SETS, facts.memory_budget(device) // held))


def interleave(runners: Mapping[str, Runner], device: str, effort: Effort) -> dict[str, Stats]:
    """Time the runners in rounds, each once a round in shuffled order, so that drift of the machine meets all alike."""
    calls = itertools.count()  # of all runners together: what one has just read is not what the next one reads
    host_s = {name: _warm_up(run, device, effort.warmup, calls) for name, run in runners.items()}
    clock = _cuda_round if device == "cuda" else _cpu_round
    times: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    shuffler = random.Random(0)
    deadline = time.perf_counter() + effort.seconds * len(runners)
    for index in range(effort.most):
        if index >= effort.least and time.perf_counter() > deadline:
            break
        shuffler.shuffle(order)
        for name, took in clock({name: runners[name] for name in order}, calls, host_s).items():
            times[name].append(took)
    return {name: Stats.of(found) for name, found in times.items()}


def _warm_up(run: Runner, device: str, seconds: float, calls: Iterator[int]) -> float:
    """Runs until ``seconds`` have passed, twice at least; returns what one call costs the host, in seconds."""
    run(next(calls))
    synchronize(device)
    start, count = time.perf_counter(), 0
    while count < 1 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        run(next(calls))
        took = time.perf_counter() - begin
        synchronize(device)
        count += 1
    return took


def _cpu_round(runners: Mapping[str, Runner], calls: Iterator[int], host_s: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for name, run in runners.items():
        index = next(calls)
        start = time.perf_counter_ns()
        run(index)
        found[name] = (time.perf_counter_ns() - start) / 1e6
    return found


def _cuda_round(runners: Mapping[str, Runner], calls: Iterator[int], host_s: Mapping[str, float]) -> dict[str, float]:
    """Device time between events; a spin ahead of each call lets the host queue it whole, so launches do not count."""
    events = {}
    for name, run in runners.items():
        torch.cuda._sleep(int(min(2 * host_s[name] + 2e-4, 0.05) * 2e9))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        index = next(calls)
        start.record()
        run(index)
        end.record()
        events[name] = (start, end)
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def cpu_time_per_call(run: Callable[[], object], device: str, effort: Effort, batch: int = 50) -> list[float]:
    """Milliseconds that one call costs the CPU, one figure a batch of calls."""
    # On CUDA autograd runs the backward in a thread of the device's own, which the clock of this thread would leave
    # out; on a CPU it runs in this one, and what other threads of the process do is not the call's.
    clock = time.process_time_ns if device == "cuda" else time.thread_time_ns
    _warm_up(lambda _: run(), device, effort.warmup, itertools.count())
    found: list[float] = []
    deadline = time.perf_counter() + effort.seconds
    while len(found) < effort.least or (time.perf_counter() < deadline and len(found) < effort.most):
        start = clock()
        for _ in range(batch):
            run()
        found.append((clock() - start) / batch / 1e6)
        synchronize(device)
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def with_cpu_time(run: Callable[[], object], found: list[float], clock: Callable[[], int]) -> Callable[[], None]:
    """``run``, and what each call costs in milliseconds by ``clock``.

    ``time.thread_time_ns`` is the calling thread's, ``time.process_time_ns`` that of all threads, gloo's too.
    """

    def timed() -> None:
        start = clock()
        run()
        found.append((clock() - start) / 1e6)

    return timed
