"""What ``bench loopback`` times: the schedules alone, of virtual ranks on one device, over links of a stated pace.

Two questions. What does cutting cost: the matmuls of one rank's chunks one after the other, beside one matmul of the
same rows. And what does it hide: R virtual ranks share the device, each one's incoming link paced so that the wire
takes ``--ratio`` times as long as the matmuls of all of them; the matmuls alone, the messages alone, one after the
other (engine "single") and pipelined. The pace stands for a network; what a network costs its host is not in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from . import facts
from .check import error_ratio
from .linear import OPS, LinearJob, jobs
from .schema import Row
from .session import Session
from .timing import Runner, Stats, interleave

#: On one rank: its result, then the gradients of its x and weight.
Call = Callable[[ProcessGroup], list[Tensor]]


@dataclass(frozen=True)
class LoopbackCase:
    """A question as to real ranks (:mod:`bench.linear`), which counts its FLOPs and bytes, to virtual ones."""

    job: LinearJob
    ratio: float

    def row(self, op: str, provider: str, direction: str, device: str, **params: Any) -> Row:
        job = self.job
        return Row(
            op=f"{op}.{job.op}",
            provider=provider,
            direction=direction,
            shape=[job.s, job.k, job.f],
            dtype=job.dtype,
            ranks=job.ranks,
            params=params,
            clock="cuda" if device == "cuda" else "wall",
            flops=job.flops(direction),
        )


class Operands:
    """What the ranks multiply: ``x[rank]`` [S/t, K] or [S, F/t], ``weight[rank]`` [F/t, K] or [K, F/t]."""

    def __init__(self, job: LinearJob, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = facts.DTYPES[job.dtype]
        self.gathers = job.op == OPS[0]
        inner = job.f // job.ranks
        x = (job.s // job.ranks, job.k) if self.gathers else (job.s, inner)
        weight = (inner, job.k) if self.gathers else (job.k, inner)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        self.x = [random(*x) for _ in range(job.ranks)]
        self.weight = [random(*weight) for _ in range(job.ranks)]
        # What a rank multiplies once everything is there, [S, K] or [S, F/t], and a result of it.
        self.whole = torch.cat(self.x) if self.gathers else self.x[0]
        self.out = random(job.s, self.weight[0].shape[0])

    def expected(self, dtype: torch.dtype, direction: str) -> list[list[Tensor]]:
        """What :class:`Call` returns, of every rank; a sum over ranks is rounded to ``dtype`` once."""
        x, weight = [t.to(dtype) for t in self.x], [t.to(dtype) for t in self.weight]

        def summed(parts: list[Tensor]) -> Tensor:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            return torch.stack(parts).sum(0, dtype=wide).to(dtype)

        if self.gathers:
            whole = torch.cat(x)
            ys = [F.linear(whole, w) for w in weight]
            dxs = list(summed([y @ w for y, w in zip(ys, weight, strict=True)]).chunk(len(x)))
            dws = [y.t() @ whole for y in ys]
        else:
            y = summed([F.linear(a, w) for a, w in zip(x, weight, strict=True)])
            ys = list(y.chunk(len(x)))
            dxs, dws = [y @ w for w in weight], [y.t() @ a for a in x]
        return [list(rank) for rank in (zip(ys, dxs, dws, strict=True) if direction != "fwd" else zip(ys, strict=True))]


def in_pieces(operands: Operands, pieces: int) -> Runner:
    """One rank's matmul, its rows in ``pieces``."""
    rows, out = operands.whole.chunk(pieces), operands.out.chunk(pieces)
    weight_t = operands.weight[0].t()

    def run(_: int) -> None:
        for a, b in zip(rows, out, strict=True):
            torch.mm(a, weight_t, out=b)

    return run


def differentiated(fn: Callable[..., Tensor], direction: str, *leaves: Tensor) -> list[Tensor]:
    """The result, and with "fwd+bwd" the gradients of ``leaves`` for a dy that equals it."""
    if direction == "fwd":
        with torch.no_grad():
            return [fn(*leaves)]
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def on_ranks(operands: Operands, direction: str, engine: str, chunks: int | None) -> Call:
    """Our op on one virtual rank."""
    import seqpar_kernels as sp

    op = sp.all_gather_linear if operands.gathers else sp.linear_reduce_scatter

    def call(group: ProcessGroup) -> list[Tensor]:
        fn = functools.partial(op, group=group, seq_dim=0, engine=engine, chunks=chunks)
        return differentiated(fn, direction, operands.x[group.rank()], operands.weight[group.rank()])

    return call


def matmul(operands: Operands, direction: str) -> Call:
    """The matmuls alone."""

    def call(group: ProcessGroup) -> list[Tensor]:
        x = operands.whole if operands.gathers else operands.x[group.rank()]
        return differentiated(F.linear, direction, x, operands.weight[group.rank()])

    return call


def messages(operands: Operands, direction: str) -> Call:
    """The collectives alone: x is gathered, or a result scattered; in the backward, x again and dx scattered, or dy."""
    import seqpar_kernels as sp

    gather, scatter, x, out = sp.gather_sequence, sp.reduce_scatter_sequence, operands.whole, operands.out

    def call(group: ProcessGroup) -> list[Tensor]:
        part = operands.x[group.rank()] if operands.gathers else out.chunk(group.size())[group.rank()]
        found = [gather(part, group, 0) if operands.gathers else scatter(out, group, 0)]
        if direction == "fwd+bwd":
            found.append(gather(part, group, 0))
            if operands.gathers:
                found.append(scatter(x, group, 0))
        return found

    return call


def check(found: list[list[Tensor]], operands: Operands, direction: str) -> float:
    """The largest error of any rank, in units of the error of the unsharded computation in the same dtype."""
    reference = operands.expected(operands.out.dtype, direction)
    oracle = operands.expected(torch.float64, direction)
    ranks = zip(found, reference, oracle, strict=True)
    return max(error_ratio(a, b, c) for rank in ranks for a, b, c in zip(*rank, strict=True))


def measure_pieces(session: Session, case: LoopbackCase, operands: Operands, chunks: Sequence[int]) -> None:
    """One rank's matmul as the schedules cut it: into ``ranks * chunks`` pieces."""
    runners = {1: in_pieces(operands, 1)} | {
        case.job.ranks * count: in_pieces(operands, case.job.ranks * count) for count in chunks
    }
    names = {pieces: "one matmul" if pieces == 1 else "ours" for pieces in runners}
    timed = interleave({str(pieces): run for pieces, run in runners.items()}, session.device, session.effort)
    for pieces, name in names.items():
        params = {} if pieces == 1 else {"chunks": pieces // case.job.ranks}
        row = case.row("pieces", name, "fwd", session.device, **params)
        stats = timed[str(pieces)]
        row.metrics = {"x one matmul": round(stats.p50 / timed["1"].p50, 3)}
        session.add_timed(row, stats)


def measure_overlap(
    session: Session, case: LoopbackCase, operands: Operands, direction: str, chunks: Sequence[int]
) -> None:
    """Matmuls, messages, one after the other, pipelined: on virtual ranks, interleaved."""
    from seqpar_kernels.comm.loopback import Loopback

    threads = torch.get_num_threads()

    def on_all(world: Loopback, call: Call) -> Callable[[], list[list[Tensor]]]:
        def on_one(group: ProcessGroup) -> list[Tensor]:
            if session.device == "cpu":  # of this thread: the ranks share the cores
                torch.set_num_threads(max(1, threads // case.job.ranks))
            return call(group)

        return lambda: world.run(on_one)

    with Loopback(case.job.ranks, session.device) as free:
        alone = on_all(free, matmul(operands, "fwd"))
        seconds = interleave({"": lambda _: alone()}, session.device, session.effort)[""].p50 / 1e3
    rate = case.job.wire_bytes("fwd") / (case.ratio * seconds)
    calls = {
        "matmul": matmul(operands, direction),
        "messages": messages(operands, direction),
        "one after the other": on_ranks(operands, direction, "single", None),
        "ours": on_ranks(operands, direction, "p2p", None),
        **{f"ours/{count}": on_ranks(operands, direction, "p2p", count) for count in chunks},
    }
    with Loopback(case.job.ranks, session.device, bytes_per_second=rate) as world:
        errors: dict[str, float] = {}
        runners: dict[str, Runner] = {}
        for name, call in calls.items():
            run = on_all(world, call)
            if name not in ("matmul", "messages"):
                errors[name] = check(run(), operands, direction)
            if errors.get(name, 0.0) <= 2:
                runners[name] = lambda _, run=run: run()
        timed = interleave(runners, session.device, session.effort)
    for name in calls:
        cut = {"chunks": int(name.removeprefix("ours/"))} if "/" in name else {}
        row = case.row("loopback", name.partition("/")[0], direction, session.device, ratio=case.ratio, **cut)
        row.bytes = case.job.wire_bytes(direction)
        row.metrics = {"paced_mbit": round(8e-6 * rate, 1)}
        if name in errors:
            row.metrics["error"] = round(errors[name], 3)
        if name not in timed:
            row.status, row.reason = "wrong", f"errs {errors[name]:.1f} times as much as PyTorch in the same dtype"
            session.add(row)
            continue
        if name.startswith("ours"):
            describe(row, timed, name)
        session.add_timed(row, timed[name])


def describe(row: Row, timed: dict[str, Stats], name: str) -> None:
    """Beside the floor, and how much of the shorter of matmul and messages is hidden behind the longer."""
    mine, mm, wire = (timed[other].p50 for other in (name, "matmul", "messages"))
    row.percent, row.ceiling = 100 * max(mm, wire) / mine, "the slower of matmul and messages"
    row.metrics |= {"matmul_ms": round(mm, 3), "wire_ms": round(wire, 3), "x_floor": round(mine / max(mm, wire), 3)}
    if "one after the other" in timed:
        row.metrics["hidden"] = round((timed["one after the other"].p50 - mine) / min(mm, wire), 3)


def cases(
    ops: Sequence[str], sizes: tuple[int, int, int], dtypes: Sequence[str], ranks: Sequence[int], ratio: float
) -> list[LoopbackCase]:
    """
    Raises:
        BenchError: sizes that do not divide by the ranks; one rank.
    """
    return [LoopbackCase(job, ratio) for count in ranks for job in jobs(ops, sizes, dtypes, count, None)]


def run(session: Session, planned: Sequence[LoopbackCase], chunks: Sequence[int]) -> list[Row]:
    """Measure every case; returns the rows added."""
    first = len(session.rows)
    session.progress.plan(3 * len(planned))
    for case in planned:
        job = case.job
        title = f"{job.op} {job.s}x{job.k}x{job.f} {job.dtype} {job.ranks} virtual ranks"
        operands = Operands(job, session.device)
        session.progress.step(f"{title}: in pieces")
        measure_pieces(session, case, operands, chunks)
        for direction in ("fwd", "fwd+bwd"):
            session.progress.step(f"{title}: {direction} over a paced link")
            measure_overlap(session, case, operands, direction, chunks)
    return session.rows[first:]
