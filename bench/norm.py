"""``bench norm``: dropout + residual add + norm, forward and forward+backward, beside the peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import positive, probability

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .session import Session

TEXT = "dropout + residual + norm, forward and backward"
PEERS = ("eager", "compile", "flash-attn", "liger", "quack")
KINDS = ("layer", "rms")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, nargs="+", help="default: 4096")
    parser.add_argument("--hidden", type=positive, nargs="+", help="default: 4096 (cpu), 1024 to 32768 (cuda)")
    parser.add_argument("--p", type=probability, nargs="+", default=[0.0, 0.1], help="dropout (default: 0 0.1)")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    text = "only what each option of the op costs, at one shape (none named: all options)"
    parser.add_argument("--features", nargs="*", metavar="NAME", help=text)


def sizes(args: argparse.Namespace, cuda: bool) -> tuple[list[int], list[int]]:
    """Rows and hidden sizes: those that were asked for, or the default of this device."""
    if args.quick:
        rows, hidden = ([512, 8192], [4096, 16384]) if cuda else ([256], [512])
    else:
        rows, hidden = [4096], [1024, 2048, 4096, 8192, 16384, 32768] if cuda else [4096]
    return args.rows or rows, args.hidden or hidden


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import norm_cases, norm_features
    from .errors import BenchError
    from .report import timing_table

    for name in args.features or ():
        if name not in norm_features.FEATURES:
            raise BenchError(f"--features {name}: unknown; known are {', '.join(norm_features.FEATURES)}")
    cuda = session.device == "cuda"
    rows, hidden = sizes(args, cuda)
    dtypes = args.dtype or (["bf16"] if cuda and args.quick else ["bf16", "fp32"])
    found = []
    if args.features is None:
        found = norm_cases.run(session, list(norm_cases.cases(args.kind, args.p, dtypes, rows, hidden)))
    size = 4096 if 4096 in hidden else hidden[0]
    found += norm_features.run(session, norm_features.cases(args.features or (), dtypes[0], rows[-1], size))
    timing_table(found, f"norm on {session.rows[-1].machine}, {session.rows[-1].threads} threads")
