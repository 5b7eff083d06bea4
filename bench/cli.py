"""The command line of ``python -m bench``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError, NotHere
from .options import DTYPE_NAMES, positive
from .suite import BENCHMARKS, TOOLS, command_of, module_of, peers

if TYPE_CHECKING:  # torch is imported late: --help is instant
    from .session import Session

COMMANDS: dict[str, Callable[[argparse.Namespace, Session], None]] = {name: command_of(name) for name in BENCHMARKS}
#: As it is run here: ``python -m bench`` or ``python -m seqpar_kernels.bench``.
PROGRAM = ("python", "-m", __package__ or "bench")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=shlex.join(PROGRAM),
        description="Measures this package beside its peers: each is checked first, ceilings are measured in the run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    measuring.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", help="default: bf16 fp32")
    measuring.add_argument("--peers", nargs="+", metavar="NAME", help="only these, or none (default: all there are)")
    measuring.add_argument("--quick", action="store_true", help="small sizes and little time: a look, not a result")
    measuring.add_argument(
        "--seconds", type=float, help="for one provider at one shape (default: 1; all: 0.4; quick: 0.3, on a GPU 0.1)"
    )
    measuring.add_argument("--threads", type=positive, help="torch threads (default: torch's own choice)")
    measuring.add_argument("--save", type=Path, metavar="DIR", help="write the rows to a file in DIR")

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=parents)

    for name in BENCHMARKS:
        module_of(name).add_options(command(name, module_of(name).TEXT, measuring))
    everything = command("all", "all of the above that this machine can run, at their default sizes", measuring)
    everything.add_argument("--ranks", type=positive, default=2)
    for name in TOOLS:
        module_of(name).add_options(command(name, module_of(name).TEXT))
    return parser


def make_session(args: argparse.Namespace, typed: str = "") -> Session:
    import torch

    from .session import Session
    from .timing import Effort

    if args.threads:
        torch.set_num_threads(args.threads)
    effort = Effort.quick(args.device) if args.quick else Effort.overview() if args.command == "all" else Effort()
    if args.seconds is not None:
        if args.seconds <= 0:
            raise BenchError(f"--seconds {args.seconds}: expected more than 0")
        effort = Effort(seconds=args.seconds, warmup=effort.warmup, least=effort.least, most=effort.most)
    chosen = None if args.peers is None else [name for name in args.peers if name != "none"]
    return Session(args.command, args.device, effort, args.quick, chosen, args.save, typed)


def check_peers(names: Sequence[str]) -> None:
    """
    Raises:
        BenchError: a name that is nobody's.
    """
    known = peers()
    for name in names:
        if name not in (*known, "none"):
            raise BenchError(f"--peers {name}: unknown; known are {', '.join(known)}, or none")


def commands_of_all(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Each at its default sizes or, to be done in minutes, below.

    Raises:
        BenchError: sizes that do not divide by --ranks.
    """
    found = {}
    for name in COMMANDS:
        given = [name, "--device", args.device]
        given += ["--quick"] if args.quick else []
        given += ["--dtype", *args.dtype] if args.dtype else []
        more = getattr(module_of(name), "in_all", None)
        found[name] = build_parser().parse_args([*given, *(more(args) if more else [])])
    for name, own in found.items():
        plan = getattr(module_of(name), "plan", None)
        if plan is not None:
            plan(own)
    return found


def run_all(args: argparse.Namespace, session: Session) -> None:
    """What cannot run here and what fails say why, in a row of their own; the rest goes on."""
    from .schema import Row

    for name, own in commands_of_all(args).items():
        try:
            COMMANDS[name](own, session)
        except NotHere as error:
            print(f"{name}: not run: {error}")
            session.add(Row(op=name, provider="ours", status="absent", reason=str(error)))
        except Exception as error:
            if not isinstance(error, BenchError):  # ours to mend: where it was raised helps
                traceback.print_exc()
            reason = str(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {error}"
            print(f"{name}: failed: {reason}")
            session.add(Row(op=name, provider="ours", status="failed", reason=reason))


def measure(args: argparse.Namespace, typed: str) -> int:
    # 8 virtual ranks have 16 streams, which would queue behind each other on the 8 connections of the default. Read
    # once, when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    check_peers(args.peers or ())
    session = make_session(args, typed)
    with session.saved():
        (run_all if args.command == "all" else COMMANDS[args.command])(args, session)
    if session.folder is not None:
        print(f"saved: {session.folder / session.file_name}")
    bad = [row for row in session.rows if row.status in ("wrong", "failed") and row.provider.startswith("ours")]
    return 1 if bad else 0


def run_command(args: argparse.Namespace, typed: str) -> int:
    if args.command in TOOLS:
        status: int = module_of(args.command).run_command(args)
        return status
    return measure(args, typed)


def command_line(argv: Sequence[str]) -> str:
    """What was typed, without where to save: somebody else's rows come out of it as well."""
    kept = list(argv)
    if "--save" in kept:
        del kept[kept.index("--save") : kept.index("--save") + 2]
    return shlex.join([*PROGRAM, *kept])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where ours was wrong or failed; 2 where the question was."""
    args = build_parser().parse_args(argv)
    # As exceptions, so that namespaces and ranks are cleaned up and what was measured is saved.
    before = {number: signal.signal(number, lambda *_: sys.exit(130)) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        return run_command(args, command_line(sys.argv[1:] if argv is None else argv))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
