"""``bench memory``: bytes that autograd keeps for one transformer layer, beside the paper's formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import NotHere
from .options import positive

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .memory_kept import Sizes
    from .session import Session

TEXT = "bytes that autograd keeps for one layer, beside the paper's formula"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--rows", type=positive, help="sequence length (default: 1024)")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--hidden", type=positive, help="default: 1024")
    parser.add_argument("--heads", type=positive, help="default: hidden / 64")


def in_all(args: argparse.Namespace) -> list[str]:
    return ["--ranks", str(args.ranks)]


def plan(args: argparse.Namespace) -> list[Sizes]:
    """
    Raises:
        BenchError: sizes that do not divide by the ranks.
    """
    from . import layer, memory_kept

    hidden = args.hidden or (128 if args.quick else 1024)
    rows = args.rows or (64 if args.quick else 1024)
    heads = args.heads or max(args.ranks, hidden // 64)
    dtypes = args.dtype or ["bf16"]
    for dtype in dtypes:
        layer.make_case("gpt", rows, args.batch, hidden, heads, args.ranks, dtype, 0.1)
    return [memory_kept.Sizes(rows, args.batch, hidden, heads, dtype) for dtype in dtypes]


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import memory_kept

    if session.device == "cuda":
        raise NotHere("memory counts bytes, which are the same on a GPU: use --device cpu")
    for sizes in plan(args):
        memory_kept.show(memory_kept.run(session, sizes, args.ranks))
