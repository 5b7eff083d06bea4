"""One rank of ``bench linear``: check every provider, then time them in rounds that all ranks agree on."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp

from .check import WrongResult, error_ratio
from .facts import DTYPES
from .linear import OPS
from .linear_providers import (
    Forward,
    LinearCase,
    by_hand,
    by_hand_in_parts,
    deepspeed,
    dtensor,
    make_case,
    megatron,
    ours,
    ours_keeping,
    symmetric_memory,
)
from .providers import Absent
from .timing import Effort, synchronize

PEERS = {
    "by-hand": by_hand,
    "by-hand-parts": by_hand_in_parts,
    "dtensor": dtensor,
    "megatron": megatron,
    "symm-mem": symmetric_memory,
    "deepspeed": deepspeed,
}


def run(job: dict[str, Any], group: dist.ProcessGroup, step: Callable[[str], None]) -> dict[str, Any]:
    """``job`` as made by :mod:`bench.linear`; returns start and end (ns) of every sample, by provider and direction."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    case = make_case(job["op"], *job["sizes"], DTYPES[job["dtype"]], device, group)
    effort = Effort(**job["effort"])
    # What somebody measured of another link has no place here, and what is measured of this one none elsewhere.
    cache = tempfile.TemporaryDirectory()
    os.environ["XDG_CACHE_HOME"] = cache.name
    if job["tune"]:  # as users of such a link do once
        step("tune")
        sp.tune(group)
    out: dict[str, Any] = {"times": {}, "notes": {}, "errors": {}}
    if job["calibrate"]:
        out["times"] = rounds({"matmul fwd": matmul_runner(case, False)}, effort, group, device)
        return out
    forwards: dict[str, tuple[Forward, Tensor]] = {}
    builders = {f"ours/{c}" if c else "ours": partial(ours, chunks=c) for c in [None, *job["chunks"]]}
    if device == "cuda":
        builders.update({f"ours/{engine}": partial(ours, engine=engine) for engine in ("symm_mem", "fused")})
    if job["op"] == OPS[0]:
        builders["ours-kept"] = ours_keeping
    builders.update({name: PEERS[name] for name in job["peers"]})
    for name, build in builders.items():
        step(f"check {name}")

        def attempt(name: str = name, build: Callable[..., tuple[Forward, Tensor]] = build) -> None:
            forwards[name] = build(case, group)
            out["errors"][name] = check(case, *forwards[name], group)

        note = why_not_timed(attempt, group)
        if note:
            forwards.pop(name, None)
            out["notes"][name] = note
    plans = {"fwd": False, "fwd+bwd": True}
    for direction, both in plans.items():
        step(f"time {direction}")
        runners = {f"matmul {direction}": matmul_runner(case, both)}
        runners.update({f"{name} {direction}": runner(case, *fn, both) for name, fn in forwards.items()})
        out["times"].update(rounds(runners, effort, group, device))
    step("time link")
    out["times"].update(rounds({"link fwd": link_runner(job["link_bytes"], group, device)}, effort, group, device))
    out["planned"] = planned(case, group)
    return out


def why_not_timed(attempt: Callable[[], None], group: dist.ProcessGroup) -> str:
    """What came of building and checking a provider, alike on every rank: wrong on one is wrong. "" for nothing."""
    note = ""
    try:
        attempt()
    except Absent as error:
        note = f"absent: {error}"
    except WrongResult as error:
        note = f"wrong: {error}"
    except Exception as error:
        note = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
    notes: list[str] = [""] * group.size()
    dist.all_gather_object(notes, note, group=group)
    return next(filter(None, notes), "")


def planned(case: LinearCase, group: dist.ProcessGroup) -> dict[str, Any]:
    """What the planner chooses here."""
    from seqpar_kernels import functional

    with torch.no_grad():
        if case.op == OPS[0]:
            settled = functional.checked_all_gather_linear(case.x, case.weight, None, group, -2, None, "auto", None)[
                0
            ].plan
        else:
            settled = functional.checked_linear_reduce_scatter(case.x, case.weight, None, group, -2, None, "auto")[
                0
            ].plan
    return {"engine": settled.engine, "chunks": settled.chunks}


def runner(case: LinearCase, fn: Forward, weight: Tensor, both: bool) -> Callable[[], object]:
    if not both:
        return lambda: fn(case.x)
    return lambda: torch.autograd.grad(fn(case.x), [case.x, weight], case.grad)


def matmul_runner(case: LinearCase, both: bool) -> Callable[[], object]:
    """The floor: this rank's matmuls alone, everything they need at hand; all ranks at once, like the rest."""
    x, weight, grad = case.local_x().detach().requires_grad_(), case.weight, case.local_grad()
    if not both:
        return lambda: F.linear(x, weight)
    return lambda: torch.autograd.grad(F.linear(x, weight), [x, weight], grad)


def link_runner(size: int, group: dist.ProcessGroup, device: str) -> Callable[[], object]:
    """Every rank sends ``size`` bytes to the next and receives as many: what the link gives both ways at once."""
    out, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    right, left = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()

    def run() -> None:
        # Receives first: gloo announces them on the stream that the data will fill.
        ops = [dist.P2POp(dist.irecv, into, left, group), dist.P2POp(dist.isend, out, right, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return run


def check(case: LinearCase, fn: Forward, weight: Tensor, group: dist.ProcessGroup) -> float:
    """y, dx, dweight of this rank against fp64; the reference adds the ranks' parts in the given dtype, like torch."""
    y = fn(case.x)
    dx, dw = torch.autograd.grad(y, [case.x, weight], case.grad)
    if hasattr(dw, "to_local"):
        dw = dw.to_local()
    t, rank = group.size(), group.rank()
    worst = 0.0
    oracle, reference = expected(case, torch.float64, t, rank), expected(case, case.x.dtype, t, rank)
    for name, got, ref, want in zip(("y", "dx", "dweight"), (y.detach(), dx, dw), reference, oracle, strict=True):
        ratio = error_ratio(got, ref, want)
        worst = max(worst, ratio)
        if ratio > 2:
            raise WrongResult(f"{name} errs {ratio:.1f} times as much as PyTorch in the same dtype (2 allowed)")
    return worst


def expected(case: LinearCase, dtype: torch.dtype, t: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dweight) of this rank from the whole tensors."""
    x, weight, grad = (whole.to(dtype)[0] if whole.dim() == 3 else whole.to(dtype) for whole in _whole(case))

    def summed(parts: list[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.chunk(t, 0)[rank][None]

    if case.op == OPS[0]:
        mine = grad.chunk(t, 1)[rank]
        dx = summed([g @ w for g, w in zip(grad.chunk(t, 1), weight.chunk(t, 0), strict=True)])
        return (x @ weight.chunk(t, 0)[rank].t())[None], dx, mine.t() @ x
    y = summed([a @ w.t() for a, w in zip(x.chunk(t, 1), weight.chunk(t, 1), strict=True)])
    return y, (grad @ weight.chunk(t, 1)[rank])[None], grad.t() @ x.chunk(t, 1)[rank]


def _whole(case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    return case.whole_x, case.whole_weight, case.whole_grad


def rounds(
    runners: dict[str, Callable[[], object]], effort: Effort, group: dist.ProcessGroup, device: str
) -> dict[str, list[tuple[int, int]]]:
    """Start and end of each call on the clock that all processes of a machine share.

    Each runner is warmed up for ``effort.warmup`` seconds; how often is up to rank 0, as is the number of rounds.
    """

    def over(since: float, seconds: float) -> bool:
        told = torch.tensor(int(time.perf_counter() - since > seconds), device=device)
        dist.broadcast(told, 0, group=group)
        return bool(told.item())

    for run in runners.values():
        run()  # what this does once, such as compiling, is not warming up
        synchronize(device)
        begin = time.perf_counter()
        while not over(begin, effort.warmup):
            run()
            synchronize(device)
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in runners}
    order, shuffler = list(runners), random.Random(0)
    begin = time.perf_counter()
    for index in range(effort.most):
        if over(begin, effort.seconds * len(runners)) and index >= effort.least:
            break
        shuffler.shuffle(order)
        for name in order:
            synchronize(device)
            dist.barrier(group)
            start = time.perf_counter_ns()
            runners[name]()
            synchronize(device)
            found[name].append((start, time.perf_counter_ns()))
    return found
