"""Ranks as threads that take turns, on a clock, a store and a network that are made up: one order of events a run.

The real coordination, watch and transport run on it. A thread goes on until it sleeps, waits or has used up its turn;
``delays`` say at which turn whoever runs is held up, and for how long. So each run can be had again, and all runs with
one delay can be tried one after the other.
"""

from __future__ import annotations

import threading
import types
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch

TIMEOUT = 60.0


class Stop(BaseException):
    """The run is over."""


class _Task:
    def __init__(self, name: str, body: Callable[[], None]):
        self.name, self.body = name, body
        self.go = threading.Semaphore(0)
        self.wake: float | None = 0.0  # when it goes on; None: once ``ready`` says so
        self.ready: Callable[[], bool] | None = None
        self.done = False


class Turns:
    """``delays``: turn -> seconds."""

    def __init__(self, delays: Mapping[int, float]):
        self.now, self.turns, self.delays = 0.0, 0, delays
        self.tasks: list[_Task] = []
        self.current: _Task | None = None
        self.over = threading.Event()
        self.stopping = False
        self.threads: list[threading.Thread] = []

    def spawn(self, name: str, body: Callable[[], None]) -> None:
        task = _Task(name, body)
        self.tasks.append(task)

        def run() -> None:
            task.go.acquire()
            try:
                if not self.stopping:
                    body()
            except Stop:
                pass
            task.done = True
            self._next(task)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def run(self, until: Callable[[], bool]) -> None:
        self.until = until
        self._next(None)
        assert self.over.wait(60), "the run does not end"
        self.stopping = True
        for task in self.tasks:
            task.go.release()
        for thread in self.threads:
            thread.join(10)

    def _next(self, of: _Task | None) -> None:
        """Give the turn away: to the same task where it can go on, else to the one that is due first."""
        if self.stopping:
            return
        if self.until():
            self.over.set()
            return
        waiting = [t for t in self.tasks if not t.done]
        due = [(self.now if t.ready is not None and t.ready() else t.wake, i) for i, t in enumerate(waiting)]
        known = [(max(when, self.now), i) for when, i in due if when is not None]
        if not known:
            self.over.set()
            return
        when, i = min(known)
        self.now = when
        self.current = waiting[i]
        if self.current is not of:
            self.current.go.release()

    def _pause(self, wake: float | None, ready: Callable[[], bool] | None = None) -> None:
        task = self.current
        assert task is not None
        task.wake, task.ready = wake, ready
        self._next(task)
        if self.current is not task or self.over.is_set():
            task.go.acquire()
        if self.stopping:
            raise Stop
        task.ready = None

    def turn(self) -> None:
        """Something that others can see is about to happen."""
        if self.current is None or threading.current_thread() is threading.main_thread():
            return
        self.turns += 1
        delay = self.delays.get(self.turns)
        if delay is not None:
            self._pause(self.now + delay)

    # --- what stands in for modules

    def time(self) -> Any:
        return types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self._pause(self.now + seconds)

    def pause(self, seconds: float) -> bool:
        self.sleep(seconds)
        return True

    def start_watching(self, look: Callable[..., None], *args: Any, name: str) -> None:
        self.threading().Thread(target=look, args=args, daemon=True, name=name).start()

    def wait_for(self, ready: Callable[[], bool], seconds: float) -> bool:
        if not ready():
            self._pause(self.now + seconds, ready)
        return ready()

    def threading(self) -> Any:
        turns = self

        class Lock:
            def __init__(self) -> None:
                self.owner: _Task | None = None
                self.count = 0

            def acquire(self, blocking: bool = True) -> bool:
                if self.owner is not None and not self._mine():
                    if not blocking:
                        return False
                    turns.wait_for(lambda: self.owner is None, 1e9)
                self.owner, self.count = turns.current, self.count + 1
                return True

            def _mine(self) -> bool:
                return False

            def locked(self) -> bool:
                return self.owner is not None

            def release(self) -> None:
                self.count -= 1
                if not self.count:
                    self.owner = None

            def __enter__(self) -> None:
                self.acquire()

            def __exit__(self, *_: object) -> None:
                self.release()

        class RLock(Lock):
            def _mine(self) -> bool:
                return self.owner is turns.current

        class Thread:
            def __init__(self, target: Callable[..., None], args: tuple[Any, ...], name: str, daemon: bool):
                self.body = lambda: target(*args)
                self.name = name

            def start(self) -> None:
                turns.spawn(self.name, self.body)

        return types.SimpleNamespace(Lock=Lock, RLock=RLock, Thread=Thread, get_ident=lambda: id(turns.current))


class Server:
    """A store. What a rank sets is there once the rank has read something, or another has, by ``late``, read twice."""

    def __init__(self, turns: Turns, late: Callable[[], bool]):
        self.turns, self.late = turns, late
        self.values: dict[str, bytes] = {}
        self.coming: dict[object, deque[tuple[str, bytes]]] = {}

    def settle(self, reader: object) -> None:
        for client, queue in self.coming.items():
            while queue and (client is reader or not self.late()):
                key, value = queue.popleft()
                self.values[key] = value


class Client:
    def __init__(self, server: Server):
        self.server = server
        server.coming[self] = deque()

    def set(self, key: str, value: str) -> None:
        self.server.turns.turn()
        self.server.coming[self].append((key, value.encode()))

    def get(self, key: str) -> bytes:
        self._read()
        return self.server.values[key]

    def check(self, keys: list[str]) -> bool:
        self._read()
        return all(key in self.server.values for key in keys)

    def add(self, key: str, amount: int) -> int:
        self._read()
        total = int(self.server.values.get(key, b"0")) + amount
        self.server.values[key] = str(total).encode()
        return total

    def _read(self) -> None:
        self.server.turns.turn()
        self.server.settle(self)


class Prefix:
    """torch.distributed.PrefixStore"""

    def __init__(self, prefix: str, store: Any):
        self.prefix, self.store = prefix, store

    def set(self, key: str, value: str) -> None:
        self.store.set(f"{self.prefix}/{key}", value)

    def get(self, key: str) -> bytes:
        found: bytes = self.store.get(f"{self.prefix}/{key}")
        return found

    def check(self, keys: list[str]) -> bool:
        return bool(self.store.check([f"{self.prefix}/{key}" for key in keys]))

    def add(self, key: str, amount: int) -> int:
        return int(self.store.add(f"{self.prefix}/{key}", amount))


class Work:
    def __init__(self, wire: Wire, buffer: torch.Tensor):
        self.wire, self.buffer, self.moved = wire, buffer, False

    def wait(self) -> None:
        self.wire.turns.turn()
        if not self.wire.turns.wait_for(lambda: self.moved, TIMEOUT):
            raise RuntimeError("Timed out waiting")


class Wire:
    """gloo: messages meet by source, target and tag, in order; sends end when they are received."""

    def __init__(self, turns: Turns):
        self.turns = turns
        self.ends: dict[tuple[str, int, int, int], deque[Work]] = {}
        self.aborted = ""

    def bring(self, kind: str, source: int, target: int, tag: int, buffer: torch.Tensor) -> Work:
        self.turns.turn()
        work, other = Work(self, buffer), "recv" if kind == "send" else "send"
        waiting = self.ends.setdefault((other, source, target, tag), deque())
        if not waiting:
            self.ends.setdefault((kind, source, target, tag), deque()).append(work)
            return work
        found = waiting.popleft()
        sent, received = (work, found) if kind == "send" else (found, work)
        if sent.buffer.nbytes != received.buffer.nbytes:
            self.aborted = f"{sent.buffer.nbytes} bytes met {received.buffer.nbytes}"
        else:
            received.buffer.view(torch.uint8).copy_(sent.buffer.view(torch.uint8))
        sent.moved = received.moved = True
        return work


class Group:
    """As much of a ProcessGroup as the coordination, the watch and the transport use."""

    group_name = "made up"
    timeout = timedelta(seconds=TIMEOUT)

    def __init__(self, rank: int, ranks: int, client: Client, wire: Wire):
        self._rank, self._ranks, self._client, self._wire = rank, ranks, client, wire

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks

    def get_group_store(self) -> Client:
        return self._client

    def send(self, buffers: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._wire.bring("send", self._rank, peer, tag, buffers[0])

    def recv(self, buffers: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._wire.bring("recv", peer, self._rank, tag, buffers[0])
