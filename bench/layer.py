"""``bench layer``: a transformer layer, forward and forward+backward, on one rank and on R ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import BenchError
from .linear import stats_of
from .options import positive, probability
from .ranks import run_ranks
from .schema import Row

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .layer_plain import LayerCase
    from .session import Session

TEXT = "a transformer layer, GPT's and Llama's, on one rank and on several"
PEERS = ("eager", "compile", "by-hand", "dtensor", "megatron")
KINDS = ("gpt", "llama")
#: Layers of published models: :data:`bench.layer_loopback.SIZES`.
SIZES = ("llama-8b", "gpt3-13b")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--ranks", type=positive, default=2, help="also on so many, one thread each (default: 2)")
    parser.add_argument("--rows", type=positive, help="sequence length (default: 1024)")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--hidden", type=positive, help="default: 1024")
    parser.add_argument("--heads", type=positive, help="default: hidden / 64")
    parser.add_argument("--p", type=probability, default=0.1, help="dropout of the GPT layer (default: 0.1)")
    text = "layers of these models instead, 8192 rows, on one device (with --virtual-ranks)"
    parser.add_argument("--size", choices=SIZES, nargs="+", help=text)
    text = "whole and in so many parts, of one process on one device, instead of --ranks"
    parser.add_argument("--virtual-ranks", type=positive, nargs="+", metavar="T", help=text)


def in_all(args: argparse.Namespace) -> list[str]:
    brief = args.device == "cpu" and not args.quick
    return ["--ranks", str(args.ranks), *(["--rows", "512"] if brief else [])]


def plan(args: argparse.Namespace) -> list[LayerCase]:
    """
    Raises:
        BenchError: sizes that do not divide by the ranks.
    """
    if args.size and not args.virtual_ranks:
        raise BenchError("--size needs --virtual-ranks: such a layer is measured on one device")
    cuda = args.device == "cuda"
    counts = args.virtual_ranks or [args.ranks]
    hidden = args.hidden or (256 if args.quick and not cuda else 4096 if cuda else 1024)
    rows = args.rows or (128 if args.quick and not cuda else 2048 if cuda else 1024)
    heads = args.heads or max(*counts, 1, hidden // 64)
    dtypes = args.dtype or ["bf16"]
    if args.size:
        from .layer_loopback import SIZES as CASES

        return [dataclasses.replace(CASES[name], dtype=dtype) for dtype in dtypes for name in args.size]
    return [
        make_case(kind, rows, args.batch, hidden, heads, max(counts), dtype, args.p)
        for dtype in dtypes
        for kind in args.kind
    ]


def run_command(args: argparse.Namespace, session: Session) -> None:
    from .report import timing_table

    planned = plan(args)
    if args.virtual_ranks:
        from . import layer_loopback

        found = layer_loopback.run(session, planned, args.virtual_ranks)
    else:
        found = run(session, planned, args.ranks)
    timing_table(found, f"layer on {found[-1].machine}, one thread a rank")


def make_case(kind: str, s: int, b: int, h: int, a: int, ranks: int, dtype: str, p: float) -> LayerCase:
    """GPT: as many key heads as heads, 4 h inside. Llama: a quarter of the key heads, about 8/3 h inside, no dropout.

    Raises:
        BenchError: sizes that do not divide.
    """
    from .layer_plain import LayerCase

    if h % a or (h // a) % 2:
        raise BenchError(f"--hidden {h}: expected an even multiple of --heads {a}")
    if a % ranks:
        raise BenchError(f"--heads {a}: expected a multiple of --ranks {ranks}")
    if s % ranks:
        raise BenchError(f"--rows {s}: expected a multiple of --ranks {ranks} (the peers cannot split it)")
    llama = kind == "llama"
    kv = a // 4 if llama and a % (4 * ranks) == 0 else a
    f = -(-8 * h // (3 * 16 * ranks)) * 16 * ranks if llama else 4 * h
    return LayerCase(kind, s, b, h, a, kv, f, dtype, 0.0 if llama else p)


def run(session: Session, planned: Sequence[LayerCase], ranks: int) -> list[Row]:
    """Every case on one rank and on ``ranks``, where there are devices enough; returns the rows added."""
    import torch

    first = len(session.rows)
    counts = sorted({1, ranks})
    have = torch.cuda.device_count()
    if session.device == "cuda" and have < ranks:
        reason = f"there are {have} CUDA devices: one rank needs one device"
        session.add(Row(op="layer", provider="ours", ranks=ranks, status="absent", reason=reason))
        counts = [1]
    for case in planned:
        for t in counts:
            measure(session, case, t)
    return session.rows[first:]


def measure(session: Session, case: LayerCase, ranks: int) -> None:
    from .layer_providers import OURS, PEERS, SINGLE

    peers = [name for name in (SINGLE if ranks == 1 else PEERS) if session.wanted(name)]
    providers = [*OURS, *peers]
    job = {
        "case": dataclasses.asdict(case),
        "providers": providers,
        "effort": dataclasses.asdict(dataclasses.replace(session.effort, least=min(session.effort.least, 7))),
    }
    title = f"layer {case.kind} {case.s}x{case.b}x{case.h} {case.dtype} {ranks} ranks"
    session.progress.plan(len(providers) + 2)
    answers = run_ranks(
        ".layer_rank:run",
        job,
        ranks,
        device=session.device,
        on_step=lambda text: session.progress.step(f"{title}: {text}"),
    )
    report(session, case, answers, ranks)


def report(session: Session, case: LayerCase, answers: list[dict[str, Any]], ranks: int) -> None:
    """Rows of one case; percent is that of the linears and the attention alone."""
    for direction in ("fwd", "fwd+bwd"):

        def new_row(provider: str) -> Row:
            return Row(
                op=f"layer.{case.kind}",
                provider=provider,
                direction=direction,  # noqa: B023 (called in this turn of the loop)
                shape=case.shape(),
                dtype=case.dtype,
                ranks=ranks,
                params={"p": case.p},
                flops=case.flops(direction, ranks),  # noqa: B023
                threads=1,
            )

        floor = stats_of(answers, f"matmul {direction}")
        for name in answers[0]["times"]:
            provider = name.removesuffix(f" {direction}")
            if provider == name:
                continue
            stats, row = stats_of(answers, name), new_row(provider)
            if provider != "matmul":
                row.percent, row.ceiling = 100 * floor.p50 / stats.p50, "its linears and attention alone"
                row.metrics = {"matmul_ms": round(floor.p50, 3), "x_floor": round(stats.p50 / floor.p50, 3)}
                row.metrics["error"] = round(max(answer["errors"][provider] for answer in answers), 3)
            session.add_timed(row, stats)
        for name, note in answers[0]["notes"].items():
            row = session.add(new_row(name))
            row.status, _, row.reason = note.partition(": ")
