"""What ``bench soak`` runs on every rank, and the processes that it runs in."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm import coordination, watchdog

_CALLS = 8  # steps of a round
_KINDS = ("forward", "backward", "hook", "refused", "other", "skipped", "stopped")
_SLOWEST = 5.0  # seconds of a call, beside the watch's patience


def resident_mb() -> float:
    """Of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def lengths(group: dist.ProcessGroup, steps: int) -> list[tuple[int, float]]:
    """(step, MB) of this rank, ten times a run."""
    ranks, rank = group.size(), group.rank()
    order = list(range(ranks, steps + ranks))
    random.Random(0).shuffle(order)  # so that what a step needs does not grow
    up, down = (torch.randn(12, 8, requires_grad=True), torch.randn(8, 12, requires_grad=True))
    gain = torch.ones(8, requires_grad=True)
    seen = []
    for step, length in enumerate(order):
        x = torch.randn(1, length, 8).tensor_split(ranks, 1)[rank].requires_grad_()
        hidden = sp.all_gather_linear(x, up, group=group, seq_len=length)
        y = sp.linear_reduce_scatter(hidden.relu(), down, group=group)
        sp.dropout_add_rms_norm(y, x, gain, p=0.1, group=group, seq_len=length).sum().backward()
        if (step + 1) % (max(steps // 10, 1)) == 0:
            seen.append((step + 1, resident_mb()))
    return seen


class _Fault(Exception):
    pass


class _Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        raise _Fault("in backward")


def _stop(seconds: float) -> None:
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.01)


def _faulty(group: dist.ProcessGroup, kind: str, guilty: bool) -> None:
    """A training step of two layers, in which ``guilty`` does ``kind``."""
    from seqpar_kernels.ops import gather_linear

    chunks, kind = 2 if kind == "forward" else None, kind if guilty else ""
    ranks = group.size()
    x, up, down = torch.ones(1, 2, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True), torch.ones(4, 6)
    if kind == "hook":
        raise _Fault("in a hook")
    if kind == "refused":
        up = torch.ones(6, 5)
    if kind == "other":
        sp.reduce_scatter_sequence(torch.ones(1, 2 * ranks, 4), group)
    if kind == "stopped":
        _stop(random.uniform(0.1, 1.5))

    def explode(*args: object, **options: object) -> None:
        raise _Fault("inside an op")

    healthy = gather_linear.matmul_into
    if kind == "forward":
        gather_linear.matmul_into = explode  # type: ignore[assignment]
    try:
        hidden = sp.all_gather_linear(x, up, group=group, chunks=chunks)
    finally:
        gather_linear.matmul_into = healthy
    hidden = _Explodes.apply(hidden) if kind == "backward" else hidden
    y = sp.linear_reduce_scatter(hidden, down, group=group) if kind != "skipped" else hidden[:, :2, :4]
    y.sum().backward()


def _right(group: dist.ProcessGroup, step: int) -> bool:
    """Whether what is gathered in ``step`` is what everybody brought in that step."""
    ranks, rank = group.size(), group.rank()
    parts = [torch.full((1, 2, 4), float(step % 4096 * ranks + r)) for r in range(ranks)]
    got = sp.all_gather_linear(parts[rank], torch.ones(3, 4), group=group)
    return torch.equal(got, 4 * torch.cat(parts, 1)[..., :3])


def faults(group: dist.ProcessGroup, rounds: int, patience: float) -> dict[str, Any]:
    """What happened on this rank: calls that raised, wrong results, the slowest call of each kind of round, ..."""
    usual = coordination.PATIENCE_SECONDS
    watchdog.PATIENCE_SECONDS = coordination.PATIENCE_SECONDS = patience
    try:
        return _rounds(group, rounds, patience)
    finally:
        watchdog.PATIENCE_SECONDS = coordination.PATIENCE_SECONDS = usual


def _rounds(group: dist.ProcessGroup, rounds: int, patience: float) -> dict[str, Any]:
    mine, choose = coordination.coordination_of(group), random.Random(1)
    random.seed(group.rank())
    slowest: Counter[str] = Counter()
    raised = wrong = unusable = 0
    for number in range(1, rounds + 1):
        kind, guilty = choose.choice(_KINDS), choose.randrange(group.size())
        time.sleep(random.uniform(0, patience))  # the watches' phases drift apart
        start = time.monotonic()
        with contextlib.suppress(_Fault, RuntimeError, ValueError):
            _faulty(group, kind, guilty == group.rank())
        slowest[kind] = max(slowest[kind], time.monotonic() - start)
        last = False
        while mine.steps < number * _CALLS:
            start = time.monotonic()
            step = mine.steps + 1
            try:
                last = _right(group, step)
                wrong += not last
            except RuntimeError:
                raised, last = raised + 1, False
            slowest[kind] = max(slowest[kind], time.monotonic() - start)
        unusable += not last
        if unusable > 3:
            break
    return {
        "rounds": number,
        "raised": raised,
        "wrong": wrong,
        "unusable": unusable,
        "slowest": {kind: round(seconds, 2) for kind, seconds in slowest.items()},
        "MB": round(resident_mb(), 1),
    }


def killed(group: dist.ProcessGroup, known: bool) -> dict[str, float]:
    """Seconds until the others raise, when one rank is killed; ``known``: inside a transfer, else in a meeting."""
    _right(group, 1)
    if group.rank() == group.size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    seconds = []
    for attempt in range(2):
        start = time.monotonic()
        try:
            if known:
                _right(group, 2)
            else:
                sp.gather_sequence(torch.ones(1, 2, 5 + attempt), group)
            return {"went on": attempt}
        except RuntimeError:
            seconds.append(time.monotonic() - start)
    return {"first": seconds[0], "second": seconds[1]}


def _serve(fn: Callable[..., Any], rank: int, ranks: int, folder: str, args: tuple[Any, ...], pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.TCPStore("127.0.0.1", int(Path(folder, "port").read_text()), is_master=False)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    assert dist.group.WORLD is not None
    try:
        pipe.send(fn(dist.group.WORLD, *args))
    except BaseException as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def on_ranks(ranks: int, fn: Callable[..., Any], *args: Any, limit: float = 3600.0) -> list[Any]:
    """What ``fn(group, *args)`` returns on each rank; None where it died or was silent for ``limit`` seconds."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "port").write_text(str(store.port))
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(fn, rank, ranks, folder, args, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found: list[Any] = []
        end = time.monotonic() + limit
        for pipe in pipes:
            try:
                found.append(pipe.recv() if pipe.poll(max(0.0, end - time.monotonic())) else None)
            except EOFError:
                found.append(None)
        for process in processes:
            process.kill()
            process.join()
    return found


def growth(seen: list[tuple[int, float]], warm: float = 0.4) -> float:
    """MB per 1,000 steps, after the first ``warm`` of them."""
    later = [point for point in seen if point[0] >= warm * seen[-1][0]]
    return (later[-1][1] - later[0][1]) / (later[-1][0] - later[0][0]) * 1000


def run(what: str, ranks: int, steps: int, rounds: int, patience: float) -> bool:
    """Prints what happened on every rank; whether that was good."""
    if what == "lengths":
        seen = on_ranks(ranks, lengths, steps)
        print(json.dumps(seen))
        print("MB per 1,000 steps:", [round(growth(s), 2) if isinstance(s, list) else s for s in seen])
        return all(isinstance(s, list) and growth(s) < 5.0 for s in seen)
    if what == "faults":
        found = on_ranks(ranks, faults, rounds, patience)
        for rank, one in enumerate(found):
            print(f"rank {rank}: {json.dumps(one)}", flush=True)
        bound = _SLOWEST + patience
        return all(
            one and one.get("rounds") == rounds and not one["wrong"] and not one["unusable"]
            and max(one["slowest"].values()) <= bound
            for one in found
        )  # fmt: skip
    good = True
    for number in range(rounds):
        *others, dead = on_ranks(ranks, killed, number % 2 == 0, limit=150.0)
        print(others, dead, flush=True)
        good &= dead is None and all(
            one and "first" in one and max(one.values()) <= _SLOWEST + patience for one in others
        )
    return good
