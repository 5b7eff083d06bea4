"""Real gloo processes that stay up for a whole test session and run the cases they are sent."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """A case failed on at least one rank; carries every rank's traceback or result."""

    def __init__(self, outcomes: list[tuple[bool, Any]]):
        self.outcomes = outcomes
        failures = "\n".join(f"--- rank {r} ---\n{text}" for r, (ok, text) in enumerate(outcomes) if not ok)
        super().__init__("\n" + failures)


def _serve(rank: int, ranks: int, store: str, timeout: float, path: list[str], pipe: Connection) -> None:
    """One rank: joins the group, then runs (module, function, args) until told to stop."""
    sys.path[:] = path
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    pipe.send("ready")
    while True:
        order = pipe.recv()
        if order is None:
            break
        module, function, args = order
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(importlib.import_module(module), function)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # a group with a dead member would wait in its destructor


class World:
    """``ranks`` processes in one gloo group. ``run(fn, *args)`` calls a module-level ``fn`` on each of them."""

    def __init__(self, ranks: int, timeout: float = 60.0):
        self.ranks = ranks
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(prefix="seqpar-world-"), "store")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, store, timeout, sys.path, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.recv() == "ready"

    def outcomes(self, fn: Callable[..., Any], *args: Any, limit: float = 300.0) -> list[tuple[bool, Any]]:
        """(succeeded, result or traceback) of every rank; a rank that died reports so."""
        for pipe in self.pipes:
            pipe.send((fn.__module__, fn.__name__, args))
        out = []
        for pipe in self.pipes:
            try:
                out.append(pipe.recv() if pipe.poll(limit) else (False, f"no answer within {limit} s"))
            except EOFError:
                out.append((False, "the process died"))
        return out

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """The result of every rank, in rank order.

        Raises:
            RankError: any rank failed.
        """
        outcomes = self.outcomes(fn, *args)
        if not all(ok for ok, _ in outcomes):
            raise RankError(outcomes)
        return [result for _, result in outcomes]

    def close(self) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
