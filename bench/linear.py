"""``bench linear``: all_gather_linear and linear_reduce_scatter on R ranks, over loopback or links of a chosen rate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import BenchError
from .links import BURST, MTU, Link, Network, parse_link
from .options import positive
from .ranks import run_ranks
from .schema import Row

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .session import Session
    from .timing import Stats

TEXT = "all-gather -> matmul and matmul -> reduce-scatter on several ranks"
OPS = ("all_gather_linear", "linear_reduce_scatter")
PEERS = ("by-hand", "by-hand-parts", "dtensor", "megatron", "symm-mem", "deepspeed")
#: Who keeps all of x for the backward: one exchange the fewer, paid in memory.
KEEPS_GATHERED = ("ours-kept", "dtensor")
#: S, K, F that no planner cuts: ours must then be what one matmul and one collective are.
SMALL = (64, 128, 512)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, nargs="+")
    parser.add_argument("--ranks", type=positive, default=2, help="processes, one thread each (default: 2)")
    parser.add_argument("--rows", type=positive, help="sequence length of all ranks together (default: 2048)")
    parser.add_argument("--hidden", type=positive, help="features outside (default: 1024)")
    parser.add_argument("--inner", type=positive, help="features inside, of all ranks (default: 4 x hidden)")
    parser.add_argument("--chunks", type=positive, nargs="*", default=[1, 2, 4, 8], help="beside the planner's choice")
    text = "1gbit, or ratio:R: the wire R times as long as the matmul"
    parser.add_argument("--link", nargs="+", metavar="RATE", help=text)


def in_all(args: argparse.Namespace) -> list[str]:
    return ["--ranks", str(args.ranks)]


def plan(args: argparse.Namespace) -> list[tuple[list[LinearJob], list[int]]]:
    """Jobs that share a link, and the chunk counts to try in them.

    Raises:
        BenchError: no such link; sizes that do not divide by the ranks.
    """
    hidden = args.hidden or (256 if args.quick else 1024)
    sizes = (args.rows or (512 if args.quick else 2048), hidden, args.inner or 4 * hidden)
    links = [parse_link(text) for text in args.link] if args.link else [None]
    ops, dtypes = args.op or OPS, args.dtype or ["fp32"]
    plans = [(jobs(ops, sizes, dtypes, args.ranks, link), args.chunks) for link in links]
    if args.rows is None:
        plans.append((jobs(ops, SMALL, dtypes, args.ranks, None, small=True), []))
    return plans


def run_command(args: argparse.Namespace, session: Session) -> None:
    from .report import timing_table

    for planned, chunks in plan(args):
        found = run(session, planned, chunks)
        timing_table(found, f"linear on {found[-1].machine}, {args.ranks} ranks, one thread each")


@dataclass(frozen=True)
class LinearJob:
    """One question: S rows in all, K features outside, F inside, t ranks, a link."""

    op: str
    s: int
    k: int
    f: int
    dtype: str
    ranks: int
    link: Link | None
    small: bool = False  # asked for the sake of the size floor

    def flops(self, direction: str) -> int:
        """Of one rank: one matmul forward, two backward."""
        return 2 * self.s * self.k * self.f // self.ranks * (1 if direction == "fwd" else 3)

    def wire_bytes(self, direction: str, provider: str = "ours") -> int:
        """What one rank must send, and as much receive.

        One exchange of the activation is (t - 1) / t of it. AG -> matmul: one forward; backward a scatter of dx, and a
        gather of x by those who did not keep it. Matmul -> RS: one forward; backward a gather of dy.
        """
        from . import facts

        one = self.s * self.k * facts.DTYPES[self.dtype].itemsize * (self.ranks - 1) // self.ranks
        again = self.op == OPS[0] and provider not in KEEPS_GATHERED
        return one * (1 if direction == "fwd" else 3 if again else 2)


def jobs(
    ops: Sequence[str],
    sizes: tuple[int, int, int],
    dtypes: Sequence[str],
    ranks: int,
    link: Link | None,
    small: bool = False,
) -> list[LinearJob]:
    """
    Raises:
        BenchError: sizes that do not divide by the ranks, too few ranks.
    """
    s, k, f = sizes
    if ranks < 2:
        raise BenchError(f"--ranks {ranks}: linear needs at least 2 ranks; one rank is a plain matmul")
    for name, size in (("--rows", s), ("--inner", f)):
        if size % ranks:
            raise BenchError(f"{name} {size}: expected a multiple of --ranks {ranks} (the peers cannot split it)")
    return [LinearJob(op, s, k, f, dtype, ranks, link, small) for dtype in dtypes for op in ops]


def run(session: Session, planned: Sequence[LinearJob], chunks: Sequence[int]) -> list[Row]:
    """Measure every job; returns the rows added."""
    first = len(session.rows)
    if not planned:
        return []
    ranks, link = planned[0].ranks, planned[0].link
    if session.device == "cuda" and link is not None:
        raise BenchError("--link shapes the links of CPU ranks (gloo); leave it out with --device cuda")
    with Network(ranks) if link else contextlib.nullcontext() as network:
        for job in planned:
            measure(session, job, chunks, network)
    return session.rows[first:]


def measure(session: Session, job: LinearJob, chunks: Sequence[int], network: Network | None) -> None:
    peers = [name for name in PEERS if session.wanted(name)]
    effort = dataclasses.replace(session.effort, least=min(session.effort.least, 7))
    order: dict[str, Any] = {
        "op": job.op,
        "sizes": [job.s, job.k, job.f],
        "dtype": job.dtype,
        "chunks": list(chunks),
        "peers": peers,
        "effort": dataclasses.asdict(effort),
        "calibrate": False,
        "tune": job.link is not None,
        "link_bytes": min(job.wire_bytes("fwd"), 2**22),
    }
    title = f"linear {job.op} {job.s}x{job.k}x{job.f} {job.dtype} {job.ranks} ranks"
    rate = settle_rate(session, job, order, network, title) if network is not None else None
    session.progress.plan(len(chunks) + 1 + (job.op == OPS[0]) + len(peers) + 3 + (job.link is not None))
    answers = run_ranks(
        ".linear_rank:run",
        order,
        job.ranks,
        device=session.device,
        network=network,
        on_step=lambda text: session.progress.step(f"{title}: {text}"),
    )
    report(session, job, answers, rate)


def settle_rate(session: Session, job: LinearJob, order: dict[str, Any], network: Network, title: str) -> float:
    """Bits a second; for a ratio the matmul is timed first. The links are shaped to it."""
    assert job.link is not None
    rate = job.link.rate
    if rate is None:
        from .timing import Effort

        assert job.link.ratio is not None
        session.progress.plan(1)
        session.progress.step(f"{title}: matmul alone")
        effort = dataclasses.asdict(Effort(seconds=1.0, least=7))
        calibrating = {**order, "calibrate": True, "tune": False, "effort": effort}
        answers = run_ranks(".linear_rank:run", calibrating, job.ranks, network=network)
        seconds = stats_of(answers, "matmul fwd").p50 / 1e3
        rate = 8 * job.wire_bytes("fwd") / (job.link.ratio * seconds)
    network.shape(rate)
    return rate


def stats_of(answers: list[dict[str, Any]], name: str) -> Stats:
    """From the first rank's start to the last rank's end, milliseconds."""
    from .timing import Stats

    samples = zip(*(answer["times"][name] for answer in answers), strict=True)
    return Stats.of([(max(end for _, end in s) - min(start for start, _ in s)) / 1e6 for s in samples])


def own_params(name: str) -> dict[str, Any]:
    """``ours/4`` is ours in 4 chunks, ``ours/peer`` ours on that engine."""
    text = name.removeprefix("ours/")
    return {"chunks": int(text)} if text.isdigit() else {"engine": text}


def report(session: Session, job: LinearJob, answers: list[dict[str, Any]], rate: float | None) -> None:
    """Rows of one job: link, matmul, then everybody beside max(wire, matmul)."""
    link_stats = stats_of(answers, "link fwd")
    link_bytes = min(job.wire_bytes("fwd"), 2**22)
    measured = 8 * link_bytes / (link_stats.p20 / 1e3)  # bits a second
    link_text = job.link.text if job.link else "loopback"
    if session.device == "cuda":
        import torch

        link_text = "nvlink or pcie" if torch.cuda.device_count() >= job.ranks else "several ranks a device"
    if job.small:
        link_text += ", small"
    base: dict[str, Any] = {"ranks": job.ranks, "dtype": job.dtype, "threads": 1}
    shaped: dict[str, Any] = {} if rate is None else {"rate_mbit": round(rate / 1e6, 2), "burst": BURST, "mtu": MTU}
    row = Row(op="ceiling.link", provider="torch", shape=[link_bytes], params={"link": link_text, "op": job.op}, **base)
    row.bytes, row.metrics = link_bytes, {"mbit": round(measured / 1e6, 2), **shaped}
    session.add_timed(row, link_stats)
    for direction in ("fwd", "fwd+bwd"):
        matmul = stats_of(answers, f"matmul {direction}").p50

        def new_row(provider: str, **params: Any) -> Row:
            return Row(
                op=f"linear.{job.op}",
                provider=provider,
                direction=direction,  # noqa: B023 (called in this turn of the loop)
                shape=[job.s, job.k, job.f],
                params={"link": link_text, **params},
                bytes=job.wire_bytes(direction, provider),  # noqa: B023
                flops=job.flops(direction),  # noqa: B023
                **base,
            )

        session.add_timed(new_row("matmul"), stats_of(answers, f"matmul {direction}"))
        names = [n.removesuffix(f" {direction}") for n in answers[0]["times"] if n.endswith(f" {direction}")]
        for name in names:
            if name in ("matmul", "link"):
                continue
            stats = stats_of(answers, f"{name} {direction}")
            row = new_row("ours", **own_params(name)) if name.startswith("ours/") else new_row(name)
            assert row.bytes is not None
            wire = row.bytes * 8 / (rate or measured) * 1e3
            row.percent, row.ceiling = 100 * max(matmul, wire) / stats.p50, "the slower of matmul and its wire"
            row.metrics = {"matmul_ms": round(matmul, 3), "wire_ms": round(wire, 3)}
            row.metrics |= {"x_floor": round(stats.p50 / max(matmul, wire), 3)}
            row.metrics["error"] = round(max(answer["errors"][name] for answer in answers), 3)
            if name == "ours":
                row.metrics.update(answers[0]["planned"])
                by_hand = [stats_of(answers, f"{who} {direction}").p50 for who in names if who.startswith("by-hand")]
                if by_hand:
                    row.metrics["x_by_hand"] = round(stats.p50 / min(by_hand), 3)
            session.add_timed(row, stats)
        for name, note in answers[0]["notes"].items():
            row = session.add(new_row("ours", **own_params(name)) if name.startswith("ours/") else new_row(name))
            row.status, _, row.reason = note.partition(": ")
