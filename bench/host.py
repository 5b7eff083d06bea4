"""``bench host``: CPU time of one small call, in microseconds.

Tensors are tiny and torch runs on one thread, so what is counted is Python, the op boundary, autograd and allocation;
on a GPU it is the cost of launching, in whatever thread. No collective is involved: ``group=None``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp

from . import facts
from .check import WrongResult, check_norm
from .providers import OURS, PEERS, Absent
from .report import number, table
from .schema import Row
from .session import Session
from .timing import Stats, cpu_time_per_call

ROWS, HIDDEN = 4, 64
Call = Callable[[], object]


def norm_calls(session: Session, kind: str, p: float) -> dict[tuple[str, str], Call]:
    """(provider, direction) -> call; every provider checked first."""
    x, residual, dy, dz = (torch.randn(ROWS, HIDDEN, device=session.device) for _ in range(4))
    weight, bias = (torch.randn(HIDDEN, device=session.device).requires_grad_() for _ in range(2))
    inputs = (x.requires_grad_(), residual.requires_grad_(), weight, bias if kind == "layer" else None)
    wanted = [t for t in inputs if t is not None]
    calls: dict[tuple[str, str], Call] = {}
    builders = {**OURS[session.device], **({"eager": PEERS["eager"]} if session.wanted("eager") else {})}
    for name, build in builders.items():
        try:
            fn = build(kind, p, session.device)
            check_norm(fn, kind, p, inputs, (dy, dz))
        except (Absent, WrongResult) as error:
            row = session.add(Row(op=f"host.norm.{kind}", provider=name, shape=[ROWS, HIDDEN], params={"p": p}))
            row.status, row.reason = ("absent" if isinstance(error, Absent) else "wrong"), str(error)
            continue
        calls[name, "fwd"] = lambda fn=fn: fn(*inputs, p)
        calls[name, "fwd+bwd"] = lambda fn=fn: torch.autograd.grad(fn(*inputs, p), wanted, (dy, dz))
    return calls


def linear_calls(session: Session) -> dict[str, dict[tuple[str, str], Call]]:
    """The two linears without a group, beside ``torch.nn.functional.linear``."""
    x = torch.randn(1, ROWS, HIDDEN, device=session.device).requires_grad_()
    weight = torch.randn(HIDDEN, HIDDEN, device=session.device).requires_grad_()
    bias = torch.randn(HIDDEN, device=session.device).requires_grad_()
    dy = torch.randn(1, ROWS, HIDDEN, device=session.device)

    def both(fn: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(fn(), [x, weight, bias], dy)

    eager = partial(F.linear, x, weight, bias)
    found: dict[str, dict[tuple[str, str], Call]] = {}
    for name, op in {
        "all_gather_linear": sp.all_gather_linear,
        "linear_reduce_scatter": sp.linear_reduce_scatter,
    }.items():
        ours = partial(op, x, weight, bias, group=None)
        torch.testing.assert_close(ours(), eager())
        found[name] = {("ours", "fwd"): ours, ("ours", "fwd+bwd"): both(ours)}
        if session.wanted("eager"):
            found[name].update({("eager", "fwd"): eager, ("eager", "fwd+bwd"): both(eager)})
    return found


def run(session: Session) -> list[Row]:
    """Every op at one tiny shape; returns the rows added."""
    first = len(session.rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plans = {(f"norm.{kind}", p): norm_calls(session, kind, p) for kind in ("layer", "rms") for p in (0.0, 0.1)}
        plans.update({(f"linear.{op}", None): calls for op, calls in linear_calls(session).items()})
        session.progress.plan(len(plans))
        for (op, p), calls in plans.items():
            session.progress.step(f"host {op}" + ("" if p is None else f" p={p}"))
            times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
            for _ in range(3):  # interleaved in three turns
                for key, call in calls.items():
                    times[key] += cpu_time_per_call(call, session.device, session.effort.share(6))
            for (provider, direction), found in times.items():
                row = Row(
                    op=f"host.{op}",
                    provider=provider,
                    direction=direction,
                    shape=[ROWS, HIDDEN],
                    dtype="fp32",
                    params={} if p is None else {"p": p},
                    clock="cpu",
                )
                session.add_timed(row, Stats.of(found))
    finally:
        torch.set_num_threads(threads)
    return session.rows[first:]


def show(rows: list[Row]) -> None:
    """Microseconds, ours beside torch."""
    lines = []
    for question in dict.fromkeys(row.question() for row in rows):
        asked = [row for row in rows if row.question() == question]
        for i, row in enumerate(asked):
            times = [1e3 * t for t in (row.p50_ms, row.p20_ms, row.p80_ms) if t is not None]
            figures = [number(times[0]), f"{number(times[1])}..{number(times[2])}"] if times else ["", ""]
            lines.append(
                [
                    row.label() if i == 0 else "",
                    row.provider,
                    *figures,
                    f"{row.status}: {row.reason}" if row.reason else "",
                ]
            )
    title = f"CPU time of one small call on {facts.cpu_name()}"
    table(title, ["what", "who", "us", "p20..p80", "remark"], lines, left=2)
