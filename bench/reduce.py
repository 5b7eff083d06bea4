"""``bench reduce``: the end of a reduce-scatter, alone and going on with dropout + residual + norm in the same pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import positive, probability

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .session import Session

TEXT = "the sum of partial results, and the norm after it in the same pass"
PEERS = ("eager",)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=positive, nargs="+", default=[4, 8], help="partial results (default: 4 8)")
    parser.add_argument("--rows", type=positive, nargs="+", help="of one shard (default: 2048)")
    parser.add_argument("--hidden", type=positive, nargs="+", help="default: 4096 (cpu), 4096 8192 (cuda)")
    parser.add_argument("--p", type=probability, nargs="+", default=[0.0, 0.1], help="dropout (default: 0 0.1)")


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import reduce_cases
    from .report import timing_table

    rows = args.rows or [128 if args.quick else 2048]
    hidden = args.hidden or ([512] if args.quick else [4096, 8192] if session.device == "cuda" else [4096])
    planned = list(reduce_cases.cases(args.shards, args.p, args.dtype or ["bf16", "fp32"], rows, hidden))
    found = reduce_cases.run(session, planned)
    timing_table(found, f"reduce on {session.rows[-1].machine}, {session.rows[-1].threads} threads")
