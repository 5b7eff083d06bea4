"""``bench loopback``: the schedules alone. Virtual ranks on one device, over links of a stated pace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import OPS
from .options import positive, ratio

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .session import Session

TEXT = "the schedules over virtual ranks on one device, links paced"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, nargs="+")
    text = "virtual ranks, of one process on one device (default: 2; cuda: 2 4 8)"
    parser.add_argument("--ranks", type=positive, nargs="+", help=text)
    text = "sequence length of all ranks together (default: 2048; cuda: 8192)"
    parser.add_argument("--rows", type=positive, help=text)
    parser.add_argument("--hidden", type=positive, help="features outside (default: 1024; cuda: 8192)")
    parser.add_argument("--inner", type=positive, help="features inside, of all ranks (default: 4 x hidden)")
    parser.add_argument("--chunks", type=positive, nargs="*", default=[1, 2, 4, 8], help="beside the planner's choice")
    text = "the wire's time in units of the matmuls' (default: 1)"
    parser.add_argument("--ratio", type=ratio, default=1.0, help=text)


def in_all(args: argparse.Namespace) -> list[str]:
    return ["--chunks"]  # the planner's choice alone


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import loopback_cases
    from .report import timing_table

    cuda = session.device == "cuda"
    hidden = args.hidden or (8192 if cuda else 256 if args.quick else 1024)
    sizes = (args.rows or (8192 if cuda else 512 if args.quick else 2048), hidden, args.inner or 4 * hidden)
    ranks = args.ranks or ([2, 4, 8] if cuda else [2])
    dtypes = args.dtype or (["bf16"] if cuda else ["fp32"])
    planned = loopback_cases.cases(args.op or OPS, sizes, dtypes, ranks, args.ratio)
    found = loopback_cases.run(session, planned, args.chunks)
    timing_table(found, f"loopback on {found[-1].machine}, {session.rows[-1].threads} threads")
