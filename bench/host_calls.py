"""What ``bench host`` times: small calls, in microseconds of CPU time.

Tensors are tiny and torch runs on one thread, so what is counted is Python, the op boundary, autograd and allocation;
on a GPU it is the cost of launching, in whatever thread. No collective is involved: ``group=None``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp

from . import facts
from .check import WrongResult, check_norm, error_ratio
from .providers import OURS, PEERS, Absent
from .report import number, table
from .schema import Row
from .session import Session
from .timing import Stats, cpu_time_per_call

ROWS, HIDDEN = 4, 64
Call = Callable[[], object]
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def check_linear(fn: Linear, inputs: Sequence[Tensor], dy: Tensor) -> float:
    """Result and gradients of ``fn`` against fp64.

    Returns:
        float: the largest error, in units of that of ``torch.nn.functional.linear``.

    Raises:
        WrongResult: it computes something else.
    """

    def everything(fn: Linear, dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias = (t.detach().to(dtype, copy=True).requires_grad_() for t in inputs)
        y = fn(x, weight, bias)
        return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], dy.to(dtype))]

    worst = 0.0
    found = (everything(fn, dy.dtype), everything(F.linear, dy.dtype), everything(F.linear, torch.float64))
    for name, got, reference, oracle in zip(("y", "dx", "dweight", "dbias"), *found, strict=True):
        ratio = error_ratio(got, reference, oracle)
        worst = max(worst, ratio)
        if ratio > 2:
            raise WrongResult(f"{name} errs {ratio:.1f} times as much as PyTorch in the same dtype (2 allowed)")
    return worst


def linear_calls(session: Session) -> dict[str, dict[tuple[str, str], Call]]:
    """The two linears without a group, beside ``torch.nn.functional.linear``; each checked first."""
    x = torch.randn(1, ROWS, HIDDEN, device=session.device).requires_grad_()
    weight = torch.randn(HIDDEN, HIDDEN, device=session.device).requires_grad_()
    bias = torch.randn(HIDDEN, device=session.device).requires_grad_()
    dy = torch.randn(1, ROWS, HIDDEN, device=session.device)

    def calls(provider: str, fn: Linear) -> dict[tuple[str, str], Call]:
        inputs = (x, weight, bias)
        forward = partial(fn, *inputs)
        return {
            (provider, "fwd"): forward,
            (provider, "fwd+bwd"): lambda: torch.autograd.grad(forward(), inputs, dy),
        }

    found: dict[str, dict[tuple[str, str], Call]] = {}
    for name, op in {
        "all_gather_linear": sp.all_gather_linear,
        "linear_reduce_scatter": sp.linear_reduce_scatter,
    }.items():
        found[name] = {}
        for provider, fn in (("ours", partial(op, group=None)), ("eager", F.linear)):
            if provider == "eager" and not session.wanted("eager"):
                continue
            try:
                check_linear(fn, (x, weight, bias), dy)
            except WrongResult as error:
                row = session.add(Row(op=f"host.linear.{name}", provider=provider, shape=[ROWS, HIDDEN]))
                row.status, row.reason = "wrong", str(error)
                continue
            found[name].update(calls(provider, fn))
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
