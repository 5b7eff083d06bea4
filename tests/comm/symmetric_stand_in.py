"""Symmetric memory on a CPU: ranks are threads, streams are threads too, nothing is ordered but by stream and event.

Faithful in what can go wrong: a stream runs what it is given in order and when it gets to it (often late, at random);
a signal is one bit for each channel and pair of ranks, raising it waits until the last one was taken, taking it waits
until it was raised, and either gives up after a time-out; memory that nobody has written holds NaN.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Fabric:
    """What the ranks share: everybody's workspaces and signals."""

    def __init__(self, ranks: int, timeout: float):
        self.ranks, self.timeout = ranks, timeout
        self.changed = threading.Condition()
        self.workspaces: dict[int, list[Tensor | None]] = {}
        self.raised: set[tuple[int, int, int, int]] = set()  # generation, at, from, channel


class StandInMemory:
    def __init__(self, fabric: Fabric, rank: int, generation: int):
        self.fabric, self.rank, self.generation = fabric, rank, generation

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        workspace = self.fabric.workspaces[self.generation][rank]
        assert workspace is not None
        count = torch.Size(sizes).numel()
        buffer = workspace.view(dtype)[storage_offset : storage_offset + count]
        assert buffer.numel() == count, "beyond the workspace"
        return buffer.view(list(sizes))

    def put_signal(self, peer: int, channel: int) -> None:
        fabric, key = self.fabric, (self.generation, peer, self.rank, channel)
        with fabric.changed:
            if not fabric.changed.wait_for(lambda: key not in fabric.raised, fabric.timeout):
                raise RuntimeError(f"signal to rank {peer} on channel {channel} was never taken")
            fabric.raised.add(key)
            fabric.changed.notify_all()

    def wait_signal(self, peer: int, channel: int) -> None:
        fabric, key = self.fabric, (self.generation, self.rank, peer, channel)
        with fabric.changed:
            if not fabric.changed.wait_for(lambda: key in fabric.raised, fabric.timeout):
                raise RuntimeError(f"no signal of rank {peer} on channel {channel}")
            fabric.raised.discard(key)
            fabric.changed.notify_all()


class StandInStream:
    """Runs what it is given, in order, each after a pause of its own. An error ends up at every later event."""

    def __init__(self, laziness: float):
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._random, self._laziness = random.Random(0), laziness
        self.error: RuntimeError | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, task: Callable[[], None]) -> None:
        self._work.put(task)

    def _run(self) -> None:
        while True:
            task = self._work.get()
            time.sleep(self._random.random() * self._laziness)
            try:
                if self.error is None or getattr(task, "always", False):
                    task()
            except RuntimeError as error:
                self.error = error


class StandInEvent:
    def __init__(self) -> None:
        self.happened = threading.Event()
        self.error: RuntimeError | None = None


def _ignore(result: object) -> None:
    """A task has no result."""


_HERE = object()  # the stream of the caller: it computes at once


class StandInDevice:
    """One rank's device."""

    def __init__(self, fabric: Fabric, rank: int, *, channels: int = 6, laziness: float = 0.0):
        self.fabric, self.rank, self.channels, self._laziness = fabric, rank, channels, laziness
        self._streams: list[StandInStream] = []
        self._generation = 0
        self.captures = False
        self.copied_bytes = 0

    def allocate(self, nbytes: int) -> StandInMemory:
        fabric, self._generation = self.fabric, self._generation + 1
        workspace = torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every float
        with fabric.changed:
            found = fabric.workspaces.setdefault(self._generation, [None] * fabric.ranks)
            found[self.rank] = workspace
            fabric.changed.notify_all()
            assert fabric.changed.wait_for(lambda: all(w is not None for w in found), fabric.timeout)
        for stream in self._streams:
            stream.error = None
        return StandInMemory(fabric, self.rank, self._generation)

    def new_stream(self) -> Any:
        stream = StandInStream(self._laziness)
        self._streams.append(stream)
        return stream

    def current(self) -> Any:
        return _HERE

    def capturing(self) -> bool:
        return self.captures

    def synchronize(self) -> None:
        for stream in self._streams:
            self.record(stream).happened.wait()

    def record(self, stream: Any) -> StandInEvent:
        event = StandInEvent()
        if stream is _HERE:
            event.happened.set()
            return event

        def happen() -> None:
            event.error = stream.error
            event.happened.set()

        happen.always = True  # type: ignore[attr-defined]
        stream.put(happen)
        return event

    def wait(self, stream: Any, event: StandInEvent) -> None:
        if stream is not _HERE:
            stream.put(lambda: _ignore(event.happened.wait()))
            return
        event.happened.wait()
        if event.error is not None:
            raise event.error

    def done(self, event: StandInEvent) -> bool:
        return event.happened.is_set()

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        self.copied_bytes += source.nbytes
        stream.put(lambda: _ignore(target.copy_(source)))

    def signal(self, stream: Any, memory: StandInMemory, peer: int, channel: int) -> None:
        stream.put(lambda: memory.put_signal(peer, channel))

    def await_signal(self, stream: Any, memory: StandInMemory, peer: int, channel: int) -> None:
        stream.put(lambda: memory.wait_signal(peer, channel))
