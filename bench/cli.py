"""The command line of ``python -m bench``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError

if TYPE_CHECKING:  # torch is imported late: --help is instant
    from .session import Session

DTYPE_NAMES = ("fp32", "bf16", "fp16", "fp64")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a probability in [0, 1), got {text!r}")
    return value


def add_norm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, nargs="+", help="default: 4096")
    parser.add_argument("--hidden", type=positive, nargs="+", help="default: 4096 (cpu), 1024 to 32768 (cuda)")
    parser.add_argument("--p", type=probability, nargs="+", default=[0.0, 0.1], help="dropout (default: 0 0.1)")
    parser.add_argument("--kind", choices=("layer", "rms"), nargs="+", default=["layer", "rms"])


def add_linear_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=("all_gather_linear", "linear_reduce_scatter"), nargs="+")
    parser.add_argument("--ranks", type=positive, default=2, help="processes, one thread each (default: 2)")
    parser.add_argument("--rows", type=positive, help="sequence length of all ranks together (default: 2048)")
    parser.add_argument("--hidden", type=positive, help="features outside (default: 1024)")
    parser.add_argument("--inner", type=positive, help="features inside, of all ranks (default: 4 x hidden)")
    parser.add_argument("--chunks", type=positive, nargs="*", default=[1, 2, 4, 8], help="beside the planner's choice")
    parser.add_argument(
        "--link", nargs="+", metavar="RATE", help="1gbit, or ratio:R: the wire R times as long as the matmul"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures this package beside its peers: each is checked first, ceilings are measured in the run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    measuring.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", help="default: bf16 fp32")
    measuring.add_argument("--peers", nargs="+", metavar="NAME", help="only these, or none (default: all there are)")
    measuring.add_argument("--quick", action="store_true", help="small sizes and little time: a look, not a result")
    measuring.add_argument("--seconds", type=float, help="for one provider at one shape (default: 2, quick: 0.3)")
    measuring.add_argument("--threads", type=positive, help="torch threads (default: torch's own choice)")
    measuring.add_argument("--save", type=Path, metavar="DIR", help="write the rows to a file in DIR")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[measuring])

    add_norm_options(command("norm", "dropout + residual + norm, forward and backward"))
    add_linear_options(command("linear", "all-gather -> matmul and matmul -> reduce-scatter on several ranks"))
    command("host", "what a small call costs the CPU, in microseconds")
    return parser


def make_session(args: argparse.Namespace) -> Session:
    import torch

    from .session import Session
    from .timing import Effort

    if args.threads:
        torch.set_num_threads(args.threads)
    effort = Effort.quick() if args.quick else Effort()
    if args.seconds is not None:
        if args.seconds <= 0:
            raise BenchError(f"--seconds {args.seconds}: expected more than 0")
        effort = Effort(seconds=args.seconds, warmup=effort.warmup, least=effort.least, most=effort.most)
    peers = None if args.peers is None else [name for name in args.peers if name != "none"]
    return Session(args.command, args.device, effort, args.quick, peers, args.save)


def run_norm(args: argparse.Namespace, session: Session) -> None:
    from . import norm
    from .providers import PEERS
    from .report import timing_table

    norm.check_peers(session.peers, list(PEERS))
    cuda = session.device == "cuda"
    rows = args.rows or ([512, 8192] if cuda and args.quick else [256] if args.quick else [4096])
    hidden = args.hidden or (
        [1024, 4096, 16384]
        if cuda and args.quick
        else [1024, 2048, 4096, 8192, 16384, 32768]
        if cuda
        else [512]
        if args.quick
        else [4096]
    )
    planned = list(norm.cases(args.kind, args.p, args.dtype or ["bf16", "fp32"], rows, hidden))
    found = norm.run(session, planned)
    timing_table(found, f"norm on {session.rows[-1].machine}, {session.rows[-1].threads} threads")


def run_linear(args: argparse.Namespace, session: Session) -> None:
    from . import linear
    from .linear_providers import OPS, PEERS
    from .links import parse_link
    from .norm import check_peers
    from .report import timing_table

    check_peers(session.peers, PEERS)
    hidden = args.hidden or (256 if args.quick else 1024)
    sizes = (args.rows or (512 if args.quick else 2048), hidden, args.inner or 4 * hidden)
    links = [parse_link(text) for text in args.link] if args.link else [None]
    plans = [linear.jobs(args.op or OPS, sizes, args.dtype or ["fp32"], args.ranks, link) for link in links]
    for planned in plans:
        found = linear.run(session, planned, args.chunks)
        timing_table(found, f"linear on {found[-1].machine}, {args.ranks} ranks, one thread each")


def run_host(args: argparse.Namespace, session: Session) -> None:
    from . import host

    host.show(host.run(session))


def measure(args: argparse.Namespace) -> int:
    session = make_session(args)
    runner: dict[str, Callable[..., None]] = {"norm": run_norm, "linear": run_linear, "host": run_host}
    with session.saved():
        runner[args.command](args, session)
    if session.folder is not None:
        print(f"saved: {session.folder / session.file_name}")
    return (
        1 if any(row.status in ("wrong", "failed") and row.provider.startswith("ours") for row in session.rows) else 0
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where ours was wrong or failed; 2 where the question was."""
    args = build_parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))  # so that everything is cleaned up behind us
    try:
        return measure(args)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
