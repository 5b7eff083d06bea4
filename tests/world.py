"""Real gloo processes that stay up for a whole test session and run the cases they are sent."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
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


def _serve(rank: int, ranks: int, folder: str, timeout: float, path: list[str], pipe: Connection) -> None:
    """One rank: joins the group, then runs (module, function, args) until told to stop."""
    sys.path[:] = path
    torch.set_num_threads(1)
    stacks = open(os.path.join(folder, f"stacks{rank}"), "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    pipe.send("ready")
    while True:
        order = pipe.recv()
        if order is None:
            break
        module, function, args = order
        try:
            torch.manual_seed(0)
            if (compiler := sys.modules.get("torch._dynamo")) is not None:
                compiler.reset()  # what earlier tests compiled counts against the limit of recompilations
            pipe.send((True, getattr(importlib.import_module(module), function)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # a group with a dead member would wait in its destructor


class World:
    """``ranks`` processes in one gloo group. ``run(fn, *args)`` calls a module-level ``fn`` on each of them."""

    def __init__(self, ranks: int, timeout: float = 60.0):
        self.ranks = ranks
        self.lost = ""
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.mkdtemp(prefix="seqpar-world-")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            args = (rank, ranks, self.folder, timeout, sys.path, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.recv() == "ready"

    def outcomes(self, fn: Callable[..., Any], *args: Any, limit: float = 200.0) -> list[tuple[bool, Any]]:
        """(succeeded, result or traceback) of every rank; one that died, or is silent past ``limit`` s, reports so.

        ``limit`` lies below pytest's own, which would end the run without a word of what the ranks were doing.
        """
        if self.lost:
            return [(False, f"an earlier case left this world unusable: {self.lost}")] * self.ranks
        for pipe in self.pipes:
            pipe.send((fn.__module__, fn.__name__, args))
        end = time.monotonic() + limit
        out = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answered = pipe.poll(max(0.0, end - time.monotonic()))
                out.append(pipe.recv() if answered else (False, self._silent(rank, limit)))
            except EOFError:
                out.append((False, "the process died"))
        return out

    def _silent(self, rank: int, limit: float) -> str:
        """What a rank that gives no answer is doing: the Python stacks of all its threads."""
        pid = self.processes[rank].pid
        assert pid is not None
        self.lost = f"rank {rank} did not answer"  # were it to answer yet, the next case would take that for its own
        os.kill(pid, signal.SIGUSR1)
        time.sleep(1.0)
        with open(os.path.join(self.folder, f"stacks{rank}")) as stacks:
            return f"no answer within {limit:.0f} s; it was here:\n{stacks.read()}"

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
