"""What ``bench project`` prints: the planner's cost model fitted to rows, held against other rows, and carried further.

Fitted are the rate of a rank's matmul, what one more piece of it costs, and the rate of memory; everything about links
and messages is an argument, hence an assumption. The model is :func:`seqpar_kernels.overlap.planner.estimate`, which
knows forwards. What it says of layers on links that nobody has measured is a projection and is called one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from seqpar_kernels.overlap.engines import plan
from seqpar_kernels.overlap.machine_profile import MachineProfile, default_profile
from seqpar_kernels.overlap.planner import Work, estimate

from .errors import BenchError
from .facts import DTYPES
from .layer_loopback import SIZES
from .linear import OPS
from .report import number, table
from .schema import Row, load


class Link(NamedTuple):
    """What is assumed of a link: bytes each way for one rank, in 1e9 a second."""

    name: str
    ranks: int
    gbytes: float


@dataclass(frozen=True)
class Fit:
    """MachineProfile of one machine and dtype, and how many rows each of the fitted ones comes from."""

    machine: str
    dtype: str
    threads: int
    figures: MachineProfile
    sources: dict[str, str]


def fit(rows: Sequence[Row], folder: Path, message_seconds: float | None = None) -> Fit:
    """
    Raises:
        BenchError: rows that it needs are not there, or are of several machines.
    """
    timed = [row for row in rows if row.status == "ok" and row.p50_ms]
    machines = sorted({row.machine for row in timed})
    if len(machines) > 1:
        raise BenchError(
            f"{folder}: rows of {len(machines)} machines ({'; '.join(machines)}): give each its own folder"
        )
    copies = [row for row in timed if row.op == "ceiling.copy"]
    pieces = [row for row in timed if row.op.startswith("pieces.")]
    wholes = [row for row in pieces if row.provider == "one matmul"]
    cuts = [row for row in pieces if "chunks" in row.params]
    needed = {
        "ceiling.copy (bench norm)": copies,
        "pieces.*, one matmul (bench loopback)": wholes,
        "pieces.* in chunks (bench loopback --chunks 1 2 4 8)": cuts,
    }
    missing = [name for name, found in needed.items() if not found]
    if missing:
        raise BenchError(f"{folder}: no rows of {', nor of '.join(missing)}: measure them with --save {folder}")
    dtype = wholes[0].dtype
    wholes, cuts = ([row for row in found if row.dtype == dtype] for found in (wholes, cuts))
    device = wholes[0].device
    # On a CPU a rank of the linears has one thread; virtual ranks share all of them.
    alone = [row for row in timed if row.op.startswith("linear.") and row.provider == "matmul"]
    alone = [row for row in alone if row.direction == "fwd" and row.dtype == dtype and "small" not in str(row.params)]
    rated = alone if device == "cpu" and alone else wholes
    rate = statistics.median((row.flops or 0) / seconds(row) for row in rated)
    memory = statistics.median((row.bytes or 0) / seconds(row) for row in copies) / 2  # a weight is read, not written
    call = piece_seconds(wholes, cuts, memory)
    defaults = default_profile(device)
    message = defaults.message_seconds if message_seconds is None else message_seconds
    width = DTYPES[dtype].itemsize
    figures = defaults._replace(
        **{"flops_16" if width == 2 else "flops_32" if width == 4 else "flops_64": rate},
        memory_bytes=memory,
        call_seconds=call,
        message_seconds=message,
        source=f"fitted to {folder}",
    )
    sources = {
        f"matmul, {dtype}": f"{number(rate / 1e9, 4)} GFLOP/s: median of {len(rated)} rows like {rated[0].op}",
        "memory": f"{number(memory / 1e9, 4)} GB/s read: half of the copies' bytes, median of {len(copies)} rows",
        "one more piece": f"{number(call * 1e6, 3)} us beside reading the weight: least squares of {len(cuts)} rows",
        "one more message": f"{number(message * 1e6, 3)} us: assumed",
        "moving bytes": f"{number(figures.busy_seconds * 1e9, 3)} ns a byte of the matmul's processor: assumed",
    }
    return Fit(machines[0], dtype, rated[0].threads, figures, sources)


def seconds(row: Row) -> float:
    assert row.p50_ms is not None
    return row.p50_ms / 1e3


def piece_seconds(wholes: Sequence[Row], cuts: Sequence[Row], memory: float) -> float:
    """What each piece beyond the first costs, less the reading of its weight; never below zero."""
    whole_of = {(row.op, tuple(row.shape), row.ranks): seconds(row) for row in wholes}
    over = under = 0.0
    for row in cuts:
        whole = whole_of.get((row.op, tuple(row.shape), row.ranks))
        if whole is None:
            continue
        _, k, f = row.shape
        more = row.ranks * int(row.params["chunks"]) - 1
        reading = k * f // row.ranks * DTYPES[row.dtype].itemsize / memory
        over += more * (seconds(row) - whole - more * reading)
        under += more * more
    return max(0.0, over / under) if under else 0.0


def work_of(s: int, k: int, f: int, ranks: int, dtype: str) -> Work:
    """One rank's part of x [s, k] @ weight [f, k].T, k features travelling: either linear, forward."""
    size, rows = DTYPES[dtype].itemsize, -(-s // ranks)
    flops = 2 * s * k * f // ranks
    return Work(ranks, rows, flops, k * f // ranks * size, rows * k * size, DTYPES[dtype], 1)


class Check(NamedTuple):
    """What the model says of a measured row."""

    row: Row
    link: str
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / seconds(self.row) - 1


def checks(found: Fit, rows: Sequence[Row]) -> Iterator[Check]:
    """Forwards of linears over shaped links: each link at the rate that its own run measured."""
    rates: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.op == "ceiling.link" and row.status == "ok":
            rates[str(row.params.get("op")), str(row.params.get("link"))] = row.metrics["mbit"] * 1e6 / 8
    for row in rows:
        op, _, name = row.op.partition(".")
        rate = rates.get((name, str(row.params.get("link"))))
        if op != "linear" or name not in OPS or row.direction != "fwd" or row.status != "ok" or rate is None:
            continue
        if row.dtype != found.dtype or "engine" in row.params or row.provider not in ("ours", "by-hand"):
            continue
        single = row.provider == "by-hand" or row.metrics.get("engine") == "single"
        chunks = None if single else row.params.get("chunks") or row.metrics.get("chunks")
        s, k, f = row.shape
        figures = found.figures._replace(link_bytes=rate)
        total = estimate(chunks, work_of(s, k, f, row.ranks, row.dtype), figures).total
        yield Check(row, str(row.params["link"]), total)

    if found.figures.busy_seconds == 0.0:  # who multiplies does not carry: virtual ranks share one device, no more
        yield from virtual_checks(found, rows)


def virtual_checks(found: Fit, rows: Sequence[Row]) -> Iterator[Check]:
    """Forwards over virtual ranks, whose matmuls take turns on one device and whose links have a stated pace."""
    for row in rows:
        op, _, name = row.op.partition(".")
        uncut = row.provider == "one after the other"
        if (
            op != "loopback"
            or name not in OPS
            or row.direction != "fwd"
            or row.status != "ok"
            or row.dtype != found.dtype
        ):
            continue
        if not uncut and not (row.provider == "ours" and "chunks" in row.params):
            continue
        s, k, f = row.shape
        work = work_of(s, k, f, row.ranks, row.dtype)
        work = work._replace(flops=work.flops * row.ranks, weight_bytes=work.weight_bytes * row.ranks)
        figures = found.figures._replace(
            link_bytes=row.metrics["paced_mbit"] * 1e6 / 8, call_seconds=found.figures.call_seconds * row.ranks
        )
        total = estimate(None if uncut else row.params["chunks"], work, figures).total
        yield Check(row, "paced", total)


def linears_of(size: str) -> Iterator[tuple[str, int, int]]:
    """name, features that travel, features inside: of the four linears of a layer, weights of one gather together."""
    case = SIZES[size]
    parts = case.linears()
    qkv = sum(parts[name][0] for name in ("q_proj", "k_proj", "v_proj"))
    up = sum(parts[name][0] for name in ("gate_proj", "up_proj") if name in parts)
    yield from (("gather, q k v", case.h, qkv), ("out, scatter", case.h, case.h))
    yield from (("gather, up", case.h, up), ("down, scatter", case.h, case.f))


def run(folder: Path, links: Sequence[Link], sizes: Sequence[str], message_us: float | None = None) -> None:
    """Print what was fitted, how well it foretells measured rows, and the projection.

    Raises:
        BenchError: rows that are needed are not there.
    """
    rows = load(folder)
    found = fit(rows, folder, None if message_us is None else message_us / 1e6)
    lines = [[name, text] for name, text in found.sources.items()]
    table(f"fitted to {folder}: {found.machine}, threads a rank {found.threads}", ["figure", "value"], lines, left=1)
    show_checks(list(checks(found, rows)))
    for size in sizes:
        show_projection(found, size, links)


def show_checks(found: Sequence[Check]) -> None:
    if not found:
        print("No row of a linear over a measured link in this folder: the model is not held against anything.")
        return
    lines = []
    for check in found:
        measured = seconds(check.row)
        figures = [number(1e3 * value, 4) for value in (measured, check.predicted)]
        name = f"{check.row.label()} {check.row.who()}"
        lines.append([name, *figures, f"{100 * check.error:+.0f} %", ""])
    table("the model beside measured rows", ["row", "measured ms", "model ms", "model errs", ""], lines, left=1)
    errors = sorted(abs(check.error) for check in found)
    print(f"of {len(errors)} rows: median error {statistics.median(errors):.0%}, largest {errors[-1]:.0%}")


def show_projection(found: Fit, size: str, links: Sequence[Link]) -> None:
    case, dtype = SIZES[size], found.dtype
    lines = []
    for link in links:
        figures = found.figures._replace(link_bytes=link.gbytes * 1e9)
        totals = [0.0] * 4
        for name, k, f in linears_of(size):
            work = work_of(case.s, k, f, link.ranks, dtype)
            settled = plan("auto", None, work, figures)
            assert settled.estimate is not None
            times = [settled.estimate.matmul, settled.estimate.wire, estimate(None, work, figures).total]
            times.append(settled.estimate.total)
            totals = [a + b for a, b in zip(totals, times, strict=True)]
            how = "uncut" if settled.engine == "single" else f"{settled.chunks} chunks a shard"
            lines.append([f"{link.ranks} on {link.name}", name, *(number(1e3 * t, 3) for t in times), how])
        share = f"{totals[0] / totals[3]:.0%} of the time is matmul; uncut {totals[0] / totals[2]:.0%}"
        lines.append([f"{link.ranks} on {link.name}", "all four", *(number(1e3 * t, 3) for t in totals), share])
    assumed = ", ".join(f"{link.name} {link.gbytes:g} GB/s each way" for link in links)
    title = (
        f"PROJECTION, NOT MEASURED: forward of the four linears of a {size} layer, {case.s} rows, {dtype}, by the "
        f"model fitted to {found.machine}. Assumed: {assumed}, "
        f"{number(found.figures.message_seconds * 1e6)} us a message"
    )
    header = ["ranks", "linear", "matmul ms", "wire ms", "uncut ms", "planned ms", "plan"]
    table(title, header, lines, left=2)
