"""``bench attention``: causal attention over a sequence that R ranks share, over loopback or links of a chosen rate.

The ideal is what the whole sequence takes on one rank, divided by the ranks: PyTorch's SDPA, on all ranks at once, each
for itself. With a window or documents, for which SDPA computes a full
matrix, it is the faster of SDPA and ours without a group.
On CUDA the ranks are virtual (:mod:`bench.attention_loopback`); ``--virtual-ranks`` makes them so on a CPU.
Bytes are those that the kernel counted on each rank's connections in one call; a row has those of the busiest rank.
Memory is that of a rank: what autograd keeps beyond q, k and v, and the most of PyTorch's allocator at one time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import positive

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse
    from collections.abc import Sequence

    from .attention_providers import AttentionCase
    from .links import Link, Network
    from .schema import Row
    from .session import Session

TEXT = "causal attention over a sequence that several ranks share, by engine, beside unsharded SDPA and the peers"
PEERS = ("by-hand", "torch-ring", "deepspeed", "yunchang", "ring-flash-attn")
LAYOUTS = ("zigzag", "contiguous")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=positive, default=2, help="processes, one thread each (default: 2)")
    parser.add_argument(
        "--seq", type=positive, nargs="+", help="length of the whole sequence (default: 4096; cuda: 8192)"
    )
    text = "virtual ranks of one process on one device, links paced (default on cuda: 2 4 8; cpu: processes)"
    parser.add_argument("--virtual-ranks", type=positive, nargs="+", help=text)
    parser.add_argument("--heads", type=positive, help="of queries (default: 8; cuda: 32)")
    parser.add_argument("--kv-heads", type=positive, help="of keys and values (default: as many as of queries)")
    parser.add_argument("--head-dim", type=positive, help="features of a head (default: 64; cuda: 128)")
    parser.add_argument("--window", type=positive, help="keys that a row sees, itself among them (default: all before)")
    text = "packed documents, the i-th i parts long, whose rows see their own keys (default: 1)"
    parser.add_argument("--documents", type=positive, default=1, help=text)
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of ours and of torch's ring")
    text = "links of 1gbit, or ratio:R: the wire R times as long as the ideal, for the bytes that ours sends"
    parser.add_argument("--wire", nargs="+", metavar="RATE", help=text)


def run_command(args: argparse.Namespace, session: Session) -> None:
    from .links import parse_link
    from .sharded import measure_all

    planned = cases(args, session)
    virtual = virtual_ranks(args, session)
    if virtual:
        from . import attention_loopback
        from .report import timing_table

        dtypes = args.dtype or (["bf16"] if session.device == "cuda" else ["fp32"])
        for text in args.wire or ["ratio:1"]:
            found = attention_loopback.run(session, planned, dtypes, virtual, parse_link(text))
            timing_table(found, f"attention over virtual ranks on {found[-1].machine}, wire {text}")
        return
    links = [parse_link(text) for text in args.wire] if args.wire else [None]
    for link in links:
        show(measure_all(session, planned, args.dtype or ["bf16", "fp32"], args.ranks, link, measure), args.ranks)


def cases(args: argparse.Namespace, session: Session) -> list[AttentionCase]:
    """
    Raises:
        BenchError: sizes that do not fit together.
    """
    from .attention_providers import AttentionCase
    from .errors import BenchError

    virtual, cuda = virtual_ranks(args, session), session.device == "cuda"
    if args.ranks < 2:
        raise BenchError(f"--ranks {args.ranks}: attention needs at least 2 ranks; one rank is plain SDPA")
    heads, head_dim = args.heads or (32 if cuda else 8), args.head_dim or (128 if cuda else 64)
    kv_heads = args.kv_heads or heads
    if args.documents > min(args.seq or [32]):
        raise BenchError(f"--documents {args.documents}: expected no more than rows")
    if heads % kv_heads:
        raise BenchError(f"--kv-heads {kv_heads}: expected a divisor of --heads {heads}")
    if any(count < 2 or count > heads for count in virtual):
        raise BenchError(f"--virtual-ranks: expected 2 or more, no more than --heads {heads}, got {virtual}")
    default = 256 if args.quick else 1024 if session.command == "all" else 4096
    default = 2048 if cuda and args.quick else 8192 if cuda else default
    found = []
    for seq in args.seq or [default]:
        for option, count in [("--virtual-ranks", n) for n in virtual] or [("--ranks", args.ranks)]:
            if seq % (2 * count):
                raise BenchError(f"--seq {seq}: expected a multiple of {2 * count}, twice {option} (the peers need it)")
        found.append(AttentionCase(seq, heads, kv_heads, head_dim, args.window, args.layout, args.documents))
    return found


def virtual_ranks(args: argparse.Namespace, session: Session) -> list[int]:
    """Numbers of virtual ranks, none where ranks are processes."""
    return args.virtual_ranks or ([2, 4, 8] if session.device == "cuda" else [])


def measure(
    session: Session, case: AttentionCase, dtype: str, ranks: int, link: Link | None, network: Network | None
) -> None:
    from .attention_rank import ENGINES
    from .sharded import Question, ask

    peers = [name for name in PEERS if session.wanted(name)]
    title = f"attention S={case.seq} {dtype} {ranks} ranks"
    question = Question(".attention_rank:run", case, dtype, peers, title, 6 + len(ENGINES) + len(peers))
    answers, rate, link_bytes = ask(session, question, ranks, link, network)
    report(session, case, dtype, answers, link.text if link else "loopback", rate, link_bytes)


def flops(case: AttentionCase, direction: str) -> int:
    """What the mask needs on all ranks together: two matmuls over the pairs forward, five backward."""
    return 2 * case.pairs() * case.heads * case.head_dim * (2 if direction == "fwd" else 7)


def report(
    session: Session,
    case: AttentionCase,
    dtype: str,
    answers: list[dict[str, Any]],
    link: str,
    rate: float | None,
    link_bytes: int,
) -> None:
    """Rows of one case: the link, unsharded, then everybody beside the ideal and the bytes they sent."""
    from .attention_rank import OURS_UNSHARDED, UNSHARDED
    from .linear import stats_of
    from .links import BURST, MTU
    from .schema import Row
    from .sharded import cpu_of, ideal_of

    ranks = len(answers)
    base: dict[str, Any] = {"ranks": ranks, "dtype": dtype, "threads": 1}
    link_stats = stats_of(answers, "link")
    measured = 8 * link_bytes / (link_stats.p20 / 1e3)  # bits a second
    shaped: dict[str, Any] = {} if rate is None else {"rate_mbit": round(rate / 1e6, 2), "burst": BURST, "mtu": MTU}
    row = Row(op="ceiling.link", provider="torch", shape=[link_bytes], params={"link": link, "op": "attention"}, **base)
    row.bytes, row.metrics = link_bytes, {"mbit": round(measured / 1e6, 2), **shaped}
    session.add_timed(row, link_stats)
    params: dict[str, Any] = {"link": link, "layout": case.layout}
    if case.window is not None:
        params["window"] = case.window
    if case.documents > 1:
        params["documents"] = case.documents
    for direction in ("fwd", "fwd+bwd"):
        ideal, ideal_cpu = ideal_of(answers, direction)

        def new_row(provider: str) -> Row:
            return Row(
                op="attention.causal",
                provider=provider,
                direction=direction,  # noqa: B023 (called in this turn of the loop)
                shape=[case.seq, case.heads, case.kv_heads, case.head_dim],
                params=dict(params),
                **base,
            )

        for name in [n.removesuffix(f" {direction}") for n in answers[0]["times"] if n.endswith(f" {direction}")]:
            key, row = f"{name} {direction}", new_row(name)
            stats = stats_of(answers, key)
            sent = [answer["sent"][key] for answer in answers]
            counted = None not in sent
            row.flops = flops(case, direction) // (1 if name in (UNSHARDED, OURS_UNSHARDED) else ranks)
            row.bytes = max(sent) if counted else None
            cpu = cpu_of(answers, key)
            row.metrics = {"cpu_ms": round(cpu, 3), "x_ideal_cpu": round(cpu / ideal_cpu, 3)}
            row.metrics |= {"ideal_ms": round(ideal, 3), "x_ideal": round(stats.p50 / ideal, 3)}
            if name in answers[0]["errors"]:
                row.metrics["error"] = round(max(answer["errors"][name] for answer in answers), 3)
            if direction == "fwd+bwd" and name in answers[0]["memory"]:
                kept, peak = (max(answer["memory"][name][i] for answer in answers) for i in (0, 1))
                row.metrics |= {"kept_bytes": kept, "peak_bytes": peak}
            if name not in (UNSHARDED, OURS_UNSHARDED):
                wire = 8e3 * (row.bytes or 0) / (rate or measured)
                row.percent, row.ceiling = 100 * max(ideal, wire) / stats.p50, "the slower of the ideal and its wire"
                row.metrics["wire_ms"] = round(wire, 3)
                if counted:
                    row.metrics["bytes_all_ranks"] = sum(sent)
            if name in answers[0]["planned"]:
                planned = answers[0]["planned"][name]
                row.metrics |= {"engine": planned["engine"], "grid": planned["grid"]}
                row.metrics["planned_bytes"] = planned[direction]
            session.add_timed(row, stats)
        for name, note in answers[0]["notes"].items():
            row = session.add(new_row(name))
            row.status, _, row.reason = note.partition(": ")


def show(rows: Sequence[Row], ranks: int) -> None:
    """The table of one run: the fastest first in each question."""
    from .report import number, remark_on_percents, table

    lines: list[list[str]] = []
    present = [row for row in rows if row.status != "absent" and row.op == "attention.causal"]
    for question in dict.fromkeys(row.question() for row in present):
        asked = sorted((row for row in present if row.question() == question), key=lambda r: r.p50_ms or float("inf"))
        for i, row in enumerate(asked):
            lines.append([row.label().removeprefix("attention.") if i == 0 else "", row.who(), *_figures(row)])
    header = ["what", "who", "ms", "p20..p80", "x ideal", "CPU x ideal", "KiB sent", "wire ms", "GFLOP/s", "% ceiling"]
    header += ["kept MiB", "peak MiB", "remark"]
    table(f"attention on {rows[0].machine}, {ranks} ranks, one thread each", header, lines, left=2)
    remark_on_percents(rows)
    links = {row.params["link"]: row.metrics["mbit"] for row in rows if row.op == "ceiling.link"}
    print("; ".join(f"link {text}: {number(mbit, 4)} Mbit/s measured each way" for text, mbit in links.items()))
    for provider, reason in sorted({(row.provider, row.reason) for row in rows if row.status == "absent"}):
        print(f"absent: {provider} in attention: {reason}")


def _figures(row: Row) -> list[str]:
    from .report import number, percent

    if row.p50_ms is None:
        return [""] * 10 + [f"{row.status}: {row.reason}"]
    m = row.metrics
    remark = [f"error {number(m['error'])}"] if "error" in m else []
    remark += [f"{m['engine']} {m['grid']}"] if "engine" in m else []
    return [
        number(row.p50_ms, 4),
        f"{number(row.p20_ms)}..{number(row.p80_ms)}",
        f"{m['x_ideal']:.2f}",
        f"{m['x_ideal_cpu']:.2f}",
        "" if row.bytes is None else f"{row.bytes / 1024:.1f}",
        number(m.get("wire_ms")),
        number((row.flops or 0) / row.p50_ms / 1e6),
        "" if row.percent is None else percent(row.percent),
        *(f"{m[name] / 2**20:.2f}" if name in m else "" for name in ("kept_bytes", "peak_bytes")),
        ", ".join(remark),
    ]
