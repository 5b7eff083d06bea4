"""One rank of ``bench attention``: check every provider against fp64, count its bytes, time all in common rounds."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.functional.sequence_attention import attention_choice

from . import attention_providers
from .attention_memory import kept_and_peak
from .attention_providers import WHOLE, AttentionCase, Provider, ours_unsharded, unsharded
from .check import WrongResult, error_ratio
from .facts import DTYPES
from .linear_rank import link_runner, rounds, why_not_timed
from .timing import Effort, with_cpu_time

ENGINES = ("ring", "ulysses", "all_gather")
REFETCH = "ours/refetch"  # a ring that sends keys and values again for the backward, and keeps none
UNSHARDED, OURS_UNSHARDED = "unsharded", "ours/unsharded"
_RESULTS = ("out", "dq", "dk", "dv")
_BLOCK = 512  # rows of the oracle at one time: its scores then take megabytes, whatever S is
_SENT, _SENT_AGAIN = 200, 208  # tcpi_bytes_sent and tcpi_bytes_retrans in Linux's struct tcp_info


class Inputs:
    """q, k, v and the gradient of the result, whole and alike on all ranks, and the shards of them."""

    def __init__(self, case: AttentionCase, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(heads: int) -> Tensor:
            return torch.randn(1, case.seq, heads, case.head_dim, generator=generator).to(dtype)

        self.case, self.group = case, group
        self.whole = tuple(random(heads) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads))

    def rows(self, layout: str) -> Tensor:
        """Positions of this rank's rows."""
        group, layout = (None, "contiguous") if layout == WHOLE else (self.group, layout)
        return sp.sequence_positions(self.case.seq, group, layout)

    def shards(self, layout: str) -> list[Tensor]:
        """This rank's rows of all four; the first three want gradients."""
        rows = self.rows(layout)
        found = [whole[:, rows] for whole in self.whole]
        return [t.requires_grad_(number < 3) for number, t in enumerate(found)]


def run(job: dict[str, Any], group: dist.ProcessGroup, step: Callable[[str], None]) -> dict[str, Any]:
    """``job`` as made by :mod:`bench.attention`; returns start and end (ns) of every sample, by provider and direction,
    beside the CPU's milliseconds, bytes sent, errors, and why who is missing is missing."""
    case = AttentionCase(**job["case"])
    inputs, effort = Inputs(case, DTYPES[job["dtype"]], group), Effort(**job["effort"])
    out: dict[str, Any] = {"times": {}, "cpu": {}, "sent": {}, "errors": {}, "notes": {}, "planned": {}, "memory": {}}
    runners = {UNSHARDED: runner(unsharded(case), inputs)}
    if job["calibrate"]:
        if case.is_masked:
            runners[OURS_UNSHARDED] = runner(ours_unsharded(case, group), inputs)
        out["times"] = rounds({name: partial(call, True) for name, call in runners.items()}, effort, group, "cpu")
        out["planned"] = planned(inputs, "auto")
        return out
    step("fp64")
    truth, reference = oracle(case, *inputs.whole), results(unsharded(case), inputs)
    providers: dict[str, Provider] = {}
    for name, build in builders(job["peers"], case.is_masked).items():
        step(f"check {name}")

        def attempt(name: str = name, build: attention_providers.Build = build) -> None:
            provider = build(case, group)
            out["errors"][name] = check(provider, inputs, truth, reference)
            runners[name], providers[name] = runner(provider, inputs), provider

        note = why_not_timed(attempt, group)
        if note:
            runners.pop(name, None)
            out["notes"][name] = note
            continue
        *leaves, grad = inputs.shards(providers[name].layout)  # all ranks: each has found it right
        out["memory"][name] = kept_and_peak(providers[name].attend, leaves, grad)
        if name.startswith("ours") and name != OURS_UNSHARDED:
            engine, save_kv = ("ring", False) if name == REFETCH else (name.partition("/")[2] or "auto", None)
            out["planned"][name] = planned(inputs, engine, save_kv)
    time_and_count(out, runners, group, effort, job["link_bytes"], step)
    return out


def time_and_count(
    out: dict[str, Any],
    runners: dict[str, Callable[[bool], object]],
    group: dist.ProcessGroup,
    effort: Effort,
    link_bytes: int,
    step: Callable[[str], None],
) -> None:
    """Add times, CPU times and bytes sent of all ``runners`` to ``out``, in both directions, and times of the link."""
    for direction, both in (("fwd", False), ("fwd+bwd", True)):
        step(f"time {direction}")
        calls = {f"{name} {direction}": partial(call, both) for name, call in runners.items()}
        out["sent"].update({name: sent_by(call, group) for name, call in calls.items()})
        cpu: dict[str, list[float]] = {name: [] for name in calls}
        clocked = {name: with_cpu_time(call, cpu[name], time.process_time_ns) for name, call in calls.items()}
        times = rounds(clocked, effort, group, "cpu")
        out["times"].update(times)
        out["cpu"].update({name: cpu[name][-len(spans) :] for name, spans in times.items()})  # warm-up left out
    step("time link")
    out["times"].update(rounds({"link": link_runner(link_bytes, group, "cpu")}, effort, group, "cpu"))


def builders(peers: list[str], masked: bool) -> dict[str, attention_providers.Build]:
    """Everybody to check and time; looked up when called, for tests that put a wrong one in somebody's place."""
    ours = attention_providers.ours
    found: dict[str, attention_providers.Build] = {"ours": ours}
    found.update({f"ours/{engine}": partial(ours, engine=engine) for engine in ENGINES})
    found[REFETCH] = partial(ours, engine="ring", save_kv=False)
    if masked:
        found[OURS_UNSHARDED] = ours_unsharded
    found.update({name: attention_providers.PEERS[name] for name in peers})
    return found


def planned(inputs: Inputs, engine: str, save_kv: bool | None = None) -> dict[str, Any]:
    """What the package chooses here, and the bytes that it expects its busiest rank to send."""
    case = inputs.case
    q, k, v, _ = inputs.shards(case.layout)
    bounds = {"window_size": case.bounds(), "layout": case.layout, "engine": engine, "save_kv": save_kv}
    choice = attention_choice(q, k, v, group=inputs.group, is_causal=True, **bounds)
    grid = f"{choice.sizes.ulysses}x{choice.sizes.ring}"
    return {"engine": choice.engine, "grid": grid, "fwd": choice.wire.forward, "fwd+bwd": choice.wire.total}


def runner(provider: Provider, inputs: Inputs) -> Callable[[bool], object]:
    q, k, v, grad = inputs.shards(provider.layout)

    def call(both: bool) -> object:
        y = provider.attend(q, k, v)
        return torch.autograd.grad(y, [q, k, v], grad) if both else y

    return call


def results(provider: Provider, inputs: Inputs) -> list[Tensor]:
    """This rank's rows of out, dq, dk and dv."""
    q, k, v, grad = inputs.shards(provider.layout)
    y = provider.attend(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, [q, k, v], grad)]


def check(provider: Provider, inputs: Inputs, truth: list[Tensor], reference: list[Tensor]) -> float:
    """The largest error of this rank's rows of out, dq, dk and dv, in units of SDPA's in the same dtype.

    Raises:
        WrongResult: more than two of them.
    """
    rows, worst = inputs.rows(provider.layout), 0.0
    for name, mine, ref, want in zip(_RESULTS, results(provider, inputs), reference, truth, strict=True):
        ratio = error_ratio(mine, ref[:, rows], want[:, rows])
        worst = max(worst, ratio)
        if ratio > 2:
            raise WrongResult(f"{name} errs {ratio:.1f} times as much as PyTorch in the same dtype (2 allowed)")
    return worst


def oracle(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """out, dq, dk, dv in fp64, from the formulas alone, some rows at a time over the keys that they see."""
    found = [torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in (grad, q, k, v)]
    out, dq, dk, dv = found
    shared, scale = case.heads // case.kv_heads, case.head_dim**-0.5
    for head in range(case.heads):
        queries, do = q[0, :, head].double() * scale, grad[0, :, head].double()
        keys, values = (t[0, :, head // shared].double() for t in (k, v))
        for start in range(0, case.seq, _BLOCK):
            stop = min(start + _BLOCK, case.seq)
            first = 0 if case.window is None else max(0, start - case.window + 1)
            rows, seen = slice(start, stop), slice(first, stop)
            positions = torch.arange(first, stop, device=q.device)
            hidden = ~case.mask(positions[start - first :], positions)
            weights = (queries[rows] @ keys[seen].t()).masked_fill_(hidden, float("-inf")).softmax(-1)
            y = weights @ values[seen]
            inner = (do[rows] * y).sum(-1, keepdim=True)
            slopes = weights * (do[rows] @ values[seen].t() - inner)
            out[0, rows, head] = y
            dq[0, rows, head] = slopes @ keys[seen] * scale
            dk[0, seen, head // shared] += slopes.t() @ queries[rows]
            dv[0, seen, head // shared] += weights.t() @ do[rows]
    return found


def tcp_bytes_sent() -> int | None:
    """What all TCP connections of this process have sent, without what was sent again; None: no such counter here."""
    total, counted = 0, False
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError):  # closed meanwhile, or no TCP
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) >= _SENT_AGAIN + 8:
                sent, again = (struct.unpack_from("Q", info, at)[0] for at in (_SENT, _SENT_AGAIN))
                total, counted = total + sent - again, True
    return total if counted else None


def sent_by(call: Callable[[], object], group: dist.ProcessGroup) -> int | None:
    """Bytes that this rank sends in one call, gloo's headers with them and the barriers' own left out."""

    def counted(call: Callable[[], object]) -> int | None:
        dist.barrier(group)
        before = tcp_bytes_sent()
        call()
        dist.barrier(group)  # a rank that is done has sent all, but the others may still wait for it
        after = tcp_bytes_sent()
        return None if before is None or after is None else after - before

    call()  # whoever opens connections opens them now
    barriers, found = counted(lambda: None), counted(call)
    return None if barriers is None or found is None else max(0, found - barriers)
