"""``bench layer``: a transformer layer, forward and forward+backward, on one rank and on R ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from .errors import BenchError
from .layer_plain import LayerCase
from .layer_providers import OURS, PEERS, SINGLE
from .linear import stats_of
from .ranks import run_ranks
from .schema import Row
from .session import Session


def make_case(kind: str, s: int, b: int, h: int, a: int, ranks: int, dtype: str, p: float) -> LayerCase:
    """GPT: as many key heads as heads, 4 h inside. Llama: a quarter of the key heads, about 8/3 h inside, no dropout.

    Raises:
        BenchError: sizes that do not divide.
    """
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
        "bench.layer_rank:run",
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
