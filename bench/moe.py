"""``bench moe``: the experts of a mixture on tokens that R ranks share, over loopback or links of a chosen rate.

The ideal is what all tokens take on one rank, divided by the ranks: the faster of PyTorch's grouped matmul and ours
without a group, on all ranks at once, each for itself. Bytes are those that the kernel counted on each rank's
connections in one call; a row has those of the busiest rank. A row also has what autograd keeps for the backward.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .options import positive

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse
    from collections.abc import Sequence

    from .links import Link, Network
    from .moe_providers import MoeCase
    from .schema import Row
    from .session import Session

TEXT = "the experts of a mixture on tokens that several ranks share, by division, beside two by hand and Transformers"
PEERS = ("by-hand", "all-gather", "transformers", "torch-grouped")
_MIXTRAL, _DEEPSEEK = 3.5, 11 / 16  # I / H of experts few and large, many and small


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=positive, nargs="+", help="processes, one thread each (default: 2)")
    parser.add_argument("--tokens", type=positive, nargs="+", help="of all ranks together (default: 4096)")
    text = "experts, and how many of them a token meets (default: 8x2 64x6)"
    parser.add_argument("--experts", nargs="+", metavar="ExK", help=text)
    parser.add_argument("--hidden", type=positive, help="features outside (default: 512)")
    text = "features inside an expert (default: 3.5 x hidden for up to 16 experts, 11/16 x hidden for more)"
    parser.add_argument("--inner", type=positive, help=text)
    text = "links of 1gbit, or ratio:R: the wire R times as long as the ideal, for the bytes that ours sends"
    parser.add_argument("--wire", nargs="+", metavar="RATE", help=text)


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import moe_grouped
    from .links import parse_link
    from .report import timing_table
    from .schema import Row
    from .sharded import measure_all

    planned, dtypes = cases(args, session.command == "all"), args.dtype or ["fp32"]
    links = [parse_link(text) for text in args.wire] if args.wire else [None]
    found = moe_grouped.run(session, next(iter(planned.values())), dtypes)
    timing_table(found, f"grouped matmuls on one rank, {found[-1].machine}")
    if session.device != "cpu":
        reason = "experts on several ranks are measured on CPU ranks (gloo): leave out --device"
        print(f"moe.experts: not run: {reason}")
        session.add(Row(op="moe.experts", provider="ours", status="absent", reason=reason))
        return
    for ranks, of_ranks in planned.items():
        for link in links:
            show(measure_all(session, of_ranks, dtypes, ranks, link, measure), ranks)


def plan(args: argparse.Namespace) -> None:
    """
    Raises:
        BenchError: see :func:`cases`.
    """
    cases(args, True)


def cases(args: argparse.Namespace, small: bool) -> dict[int, list[MoeCase]]:
    """By number of ranks.

    Raises:
        BenchError: sizes that do not fit together.
    """
    from .errors import BenchError
    from .moe_providers import MoeCase

    hidden = args.hidden or (64 if args.quick else 256 if small else 512)
    found: dict[int, list[MoeCase]] = {}
    for ranks in args.ranks or [2]:
        if ranks < 2:
            raise BenchError(f"--ranks {ranks}: moe needs at least 2 ranks")
        for text in args.experts or (["8x2", "16x4"] if args.quick else ["8x2", "64x6"]):
            parsed = re.fullmatch(r"(\d+)x(\d+)", text)
            if parsed is None or not 0 < int(parsed[2]) <= int(parsed[1]):
                raise BenchError(f"--experts {text}: expected experts x experts of a token, such as 8x2")
            experts, top_k = int(parsed[1]), int(parsed[2])
            inner = args.inner or int(hidden * (_MIXTRAL if experts <= 16 else _DEEPSEEK))
            for name, size in (("--experts", experts), ("--inner", inner)):
                if size % ranks:
                    raise BenchError(f"{name} {size}: expected a multiple of --ranks {ranks}")
            if inner % 8 or hidden % 8:
                size = f"--hidden {hidden}, --inner {inner}"
                raise BenchError(f"{size}: expected multiples of 8 (PyTorch's grouped matmul wants rows of 16 bytes)")
            for tokens in args.tokens or [256 if args.quick else 1024 if small else 4096]:
                if tokens % ranks:
                    raise BenchError(f"--tokens {tokens}: expected a multiple of --ranks {ranks} (the peers need it)")
                found.setdefault(ranks, []).append(MoeCase(tokens, experts, top_k, hidden, inner))
    return found


def measure(
    session: Session, case: MoeCase, dtype: str, ranks: int, link: Link | None, network: Network | None
) -> None:
    from . import moe_providers
    from .moe_rank import OWN
    from .sharded import Question, ask

    peers = [name for name in moe_providers.PEERS if session.wanted(name)]
    title = f"moe {case.experts}x{case.top_k} T={case.tokens} {dtype} {ranks} ranks"
    question = Question(".moe_rank:run", case, dtype, peers, title, 4 + len(OWN) + len(peers))
    answers, rate, link_bytes = ask(session, question, ranks, link, network)
    report(session, case, dtype, answers, link.text if link else "loopback", rate, link_bytes)


def flops(case: MoeCase, direction: str) -> int:
    """Of all ranks together: gate, up and down for each pair of a token and an expert, three times with a backward."""
    return 6 * case.tokens * case.top_k * case.hidden * case.inner * (1 if direction == "fwd" else 3)


def report(
    session: Session,
    case: MoeCase,
    dtype: str,
    answers: list[dict[str, Any]],
    link: str,
    rate: float | None,
    link_bytes: int,
) -> None:
    """Rows of one case: the link, unsharded, then everybody beside the ideal and the bytes they sent and kept."""
    from .linear import stats_of
    from .links import BURST, MTU
    from .moe_rank import OURS_UNSHARDED, UNSHARDED
    from .schema import Row
    from .sharded import cpu_of, ideal_of

    ranks = len(answers)
    base: dict[str, Any] = {"ranks": ranks, "dtype": dtype, "threads": 1}
    link_stats = stats_of(answers, "link")
    measured = 8 * link_bytes / (link_stats.p20 / 1e3)  # bits a second
    shaped: dict[str, Any] = {} if rate is None else {"rate_mbit": round(rate / 1e6, 2), "burst": BURST, "mtu": MTU}
    params = {"link": link, "op": f"moe {case.experts}x{case.top_k}"}
    row = Row(op="ceiling.link", provider="torch", shape=[link_bytes], params=params, **base)
    row.bytes, row.metrics = link_bytes, {"mbit": round(measured / 1e6, 2), **shaped}
    session.add_timed(row, link_stats)
    for direction in ("fwd", "fwd+bwd"):
        ideal, ideal_cpu = ideal_of(answers, direction)

        def new_row(provider: str) -> Row:
            return Row(
                op="moe.experts",
                provider=provider,
                direction=direction,  # noqa: B023 (called in this turn of the loop)
                shape=[case.tokens, case.experts, case.top_k, case.hidden, case.inner],
                params={"link": link},
                **base,
            )

        for name in [n.removesuffix(f" {direction}") for n in answers[0]["times"] if n.endswith(f" {direction}")]:
            key, row = f"{name} {direction}", new_row(name)
            stats, alone = stats_of(answers, key), name in (UNSHARDED, OURS_UNSHARDED)
            sent = [answer["sent"][key] for answer in answers]
            counted = None not in sent
            row.flops = flops(case, direction) // (1 if alone else ranks)
            row.bytes = max(sent) if counted else None
            cpu = cpu_of(answers, key)
            row.metrics = {"cpu_ms": round(cpu, 3), "x_ideal_cpu": round(cpu / ideal_cpu, 3)}
            row.metrics |= {"ideal_ms": round(ideal, 3), "x_ideal": round(stats.p50 / ideal, 3)}
            if name in answers[0]["errors"]:
                row.metrics["error"] = round(max(answer["errors"][name] for answer in answers), 3)
            if name in answers[0]["kept"]:
                row.metrics["kept_bytes"] = max(answer["kept"][name] for answer in answers)
            if not alone:
                wire = 8e3 * (row.bytes or 0) / (rate or measured)
                row.percent, row.ceiling = 100 * max(ideal, wire) / stats.p50, "the slower of the ideal and its wire"
                row.metrics |= {"wire_ms": round(wire, 3), "x_floor": round(stats.p50 / max(ideal, wire), 3)}
                if counted:
                    row.metrics["bytes_all_ranks"] = sum(sent)
            if name in answers[0]["planned"]:
                row.metrics["experts"] = answers[0]["planned"][name]["experts"]
                row.metrics["planned_bytes"] = max(answer["planned"][name][direction] for answer in answers)
            session.add_timed(row, stats)
        for name, note in answers[0]["notes"].items():
            row = session.add(new_row(name))
            row.status, _, row.reason = note.partition(": ")


def show(rows: Sequence[Row], ranks: int) -> None:
    """The table of one run: the fastest first in each question."""
    from .report import number, remark_on_percents, table

    lines: list[list[str]] = []
    present = [row for row in rows if row.status != "absent" and row.op == "moe.experts"]
    for question in dict.fromkeys(row.question() for row in present):
        asked = sorted((row for row in present if row.question() == question), key=lambda r: r.p50_ms or float("inf"))
        for i, row in enumerate(asked):
            lines.append([row.label().removeprefix("moe.") if i == 0 else "", row.who(), *_figures(row)])
    header = ["what", "who", "ms", "p20..p80", "x ideal", "x floor", "CPU x ideal", "KiB sent", "KiB kept", "wire ms"]
    table(f"experts on {rows[0].machine}, {ranks} ranks, one thread each", [*header, "remark"], lines, left=2)
    remark_on_percents(rows)
    for row in rows:
        if row.op == "ceiling.link":
            mbit = number(row.metrics["mbit"], 4)
            print(f"link {row.params['link']}, {row.params['op']}: {mbit} Mbit/s measured each way")
    for provider, reason in sorted({(row.provider, row.reason) for row in rows if row.status == "absent"}):
        print(f"absent: {provider} in moe: {reason}")


def _figures(row: Row) -> list[str]:
    from .report import number

    if row.p50_ms is None:
        return [""] * 8 + [f"{row.status}: {row.reason}"]
    m = row.metrics
    remark = [f"error {number(m['error'])}"] if "error" in m else []
    remark += [f"experts by {m['experts']}"] if "experts" in m else []
    return [
        number(row.p50_ms, 4),
        f"{number(row.p20_ms)}..{number(row.p80_ms)}",
        f"{m['x_ideal']:.2f}",
        f"{m['x_floor']:.2f}" if "x_floor" in m else "",
        f"{m['x_ideal_cpu']:.2f}",
        "" if row.bytes is None else f"{row.bytes / 1024:.1f}",
        f"{m['kept_bytes'] / 1024:.0f}" if "kept_bytes" in m else "",
        number(m.get("wire_ms")),
        ", ".join(remark),
    ]
