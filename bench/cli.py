"""The command line of ``python -m bench``."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BenchError, NotHere
from .options import (
    add_layer_options,
    add_linear_options,
    add_loopback_options,
    add_norm_options,
    add_project_options,
    add_reduce_options,
    positive,
)

if TYPE_CHECKING:  # torch is imported late: --help is instant
    from .layer_plain import LayerCase
    from .linear import LinearJob
    from .memory import Sizes
    from .session import Session

DTYPE_NAMES = ("fp32", "bf16", "fp16", "fp64")


#: Benchmarks that say all of themselves: each a module with TEXT, ``add_options(parser)`` and ``run_command(args,
#: session)``, which imports torch late, and PEERS where --peers may name some. A new one is its file and its name here.
MODULES = ("guards", "attention")


def module_of(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


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
    measuring.add_argument(
        "--seconds", type=float, help="for one provider at one shape (default: 1; all: 0.4; quick: 0.3, on a GPU 0.1)"
    )
    measuring.add_argument("--threads", type=positive, help="torch threads (default: torch's own choice)")
    measuring.add_argument("--save", type=Path, metavar="DIR", help="write the rows to a file in DIR")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[measuring])

    add_norm_options(command("norm", "dropout + residual + norm, forward and backward"))
    add_reduce_options(command("reduce", "the sum of partial results, and the norm after it in the same pass"))
    add_linear_options(command("linear", "all-gather -> matmul and matmul -> reduce-scatter on several ranks"))
    add_layer_options(command("layer", "a transformer layer, GPT's and Llama's, on one rank and on several"))
    add_loopback_options(command("loopback", "the schedules over virtual ranks on one device, links paced"))
    gemm = command("gemm", "the matmul that waits for its rows beside cuBLAS, on one GPU")
    gemm.add_argument("--rows", type=positive, nargs="+", help="default: 8192 16384 (quick: 8192)")
    memory = command("memory", "bytes that autograd keeps for one layer, beside the paper's formula")
    memory.add_argument("--ranks", type=positive, default=2)
    memory.add_argument("--rows", type=positive, help="sequence length (default: 1024)")
    memory.add_argument("--batch", type=positive, default=1)
    memory.add_argument("--hidden", type=positive, help="default: 1024")
    memory.add_argument("--heads", type=positive, help="default: hidden / 64")
    coverage = command("coverage", "which op runs on which backend in which dtype here; --models: which models convert")
    coverage.add_argument("--models", nargs="*", metavar="NAME", help="Hugging Face architectures (none named: all)")
    coverage.add_argument("--ranks", type=positive, default=2, help="with --models (default: 2)")
    coverage.add_argument(
        "--page", type=Path, help="with --models: write the table here (default: docs/models.md if all)"
    )
    command("host", "what a small call costs the CPU, in microseconds")
    for name in MODULES:
        module_of(name).add_options(command(name, module_of(name).TEXT))
    everything = command("all", "all of the above that this machine can run, at their default sizes")
    everything.add_argument("--ranks", type=positive, default=2)
    plot = commands.add_parser("plot", help="pictures from saved files alone", description="Writes DIR/*.png.")
    plot.add_argument("folder", type=Path, metavar="DIR")
    text = "the tables of docs/benchmarks.md from the committed results"
    tables = commands.add_parser("tables", help=text, description=text)
    tables.add_argument("--file", type=Path, help="default: docs/benchmarks.md of this checkout")
    tables.add_argument("--results", type=Path, metavar="DIR", help="default: bench/results")
    add_project_options(commands)
    text = "two runs side by side, noise marked"
    compare = commands.add_parser("compare", help=text, description=text)
    compare.add_argument("first", type=Path, metavar="A", help="a file or a folder of --save")
    compare.add_argument("second", type=Path, metavar="B")
    compare.add_argument("--fail", action="store_true", help="exit 1 where a difference is more than noise")
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
    peers = None if args.peers is None else [name for name in args.peers if name != "none"]
    return Session(args.command, args.device, effort, args.quick, peers, args.save, typed)


def check_peers(names: Sequence[str]) -> None:
    """
    Raises:
        BenchError: a name that is nobody's.
    """
    from . import gemm, layer_providers, linear_providers, providers

    own = [peer for name in MODULES for peer in getattr(module_of(name), "PEERS", ())]
    peers = [*providers.PEERS, *linear_providers.PEERS, *layer_providers.PEERS, *gemm.PEERS, *own]
    known = list(dict.fromkeys(peers))
    for name in names:
        if name not in (*known, "none"):
            raise BenchError(f"--peers {name}: unknown; known are {', '.join(known)}, or none")


def run_norm(args: argparse.Namespace, session: Session) -> None:
    from . import norm, norm_features
    from .report import timing_table

    for name in args.features or ():
        if name not in norm_features.FEATURES:
            raise BenchError(f"--features {name}: unknown; known are {', '.join(norm_features.FEATURES)}")
    cuda = session.device == "cuda"
    rows = args.rows or ([512, 8192] if cuda and args.quick else [256] if args.quick else [4096])
    hidden = args.hidden or (
        [4096, 16384]
        if cuda and args.quick
        else [1024, 2048, 4096, 8192, 16384, 32768]
        if cuda
        else [512]
        if args.quick
        else [4096]
    )
    dtypes = args.dtype or (["bf16"] if cuda and args.quick else ["bf16", "fp32"])
    found = []
    if args.features is None:
        found = norm.run(session, list(norm.cases(args.kind, args.p, dtypes, rows, hidden)))
    size = 4096 if 4096 in hidden else hidden[0]
    found += norm_features.run(session, norm_features.cases(args.features or (), dtypes[0], rows[-1], size))
    timing_table(found, f"norm on {session.rows[-1].machine}, {session.rows[-1].threads} threads")


def run_reduce(args: argparse.Namespace, session: Session) -> None:
    from . import reduce
    from .report import timing_table

    rows = args.rows or [128 if args.quick else 2048]
    hidden = args.hidden or ([512] if args.quick else [4096, 8192] if session.device == "cuda" else [4096])
    planned = list(reduce.cases(args.shards, args.p, args.dtype or ["bf16", "fp32"], rows, hidden))
    found = reduce.run(session, planned)
    timing_table(found, f"reduce on {session.rows[-1].machine}, {session.rows[-1].threads} threads")


def plan_linear(args: argparse.Namespace) -> list[tuple[list[LinearJob], list[int]]]:
    """Jobs that share a link, and the chunk counts to try in them.

    Raises:
        BenchError: no such link; sizes that do not divide by the ranks.
    """
    from . import linear
    from .linear_providers import OPS
    from .links import parse_link

    hidden = args.hidden or (256 if args.quick else 1024)
    sizes = (args.rows or (512 if args.quick else 2048), hidden, args.inner or 4 * hidden)
    links = [parse_link(text) for text in args.link] if args.link else [None]
    ops, dtypes = args.op or OPS, args.dtype or ["fp32"]
    plans = [(linear.jobs(ops, sizes, dtypes, args.ranks, link), args.chunks) for link in links]
    if args.rows is None:
        plans.append((linear.jobs(ops, linear.SMALL, dtypes, args.ranks, None, small=True), []))
    return plans


def run_linear(args: argparse.Namespace, session: Session) -> None:
    from . import linear
    from .report import timing_table

    for planned, chunks in plan_linear(args):
        found = linear.run(session, planned, chunks)
        timing_table(found, f"linear on {found[-1].machine}, {args.ranks} ranks, one thread each")


def plan_layer(args: argparse.Namespace) -> list[LayerCase]:
    """
    Raises:
        BenchError: sizes that do not divide by the ranks.
    """
    from . import layer, layer_loopback

    if args.size and not args.virtual_ranks:
        raise BenchError("--size needs --virtual-ranks: such a layer is measured on one device")
    cuda = args.device == "cuda"
    counts = args.virtual_ranks or [args.ranks]
    hidden = args.hidden or (256 if args.quick and not cuda else 4096 if cuda else 1024)
    rows = args.rows or (128 if args.quick and not cuda else 2048 if cuda else 1024)
    heads = args.heads or max(*counts, 1, hidden // 64)
    dtypes = args.dtype or ["bf16"]
    if args.size:
        return [replace(layer_loopback.SIZES[name], dtype=dtype) for dtype in dtypes for name in args.size]
    return [
        layer.make_case(kind, rows, args.batch, hidden, heads, max(counts), dtype, args.p)
        for dtype in dtypes
        for kind in args.kind
    ]


def run_layer(args: argparse.Namespace, session: Session) -> None:
    from . import layer, layer_loopback
    from .report import timing_table

    planned = plan_layer(args)
    if args.virtual_ranks:
        found = layer_loopback.run(session, planned, args.virtual_ranks)
    else:
        found = layer.run(session, planned, args.ranks)
    timing_table(found, f"layer on {found[-1].machine}, one thread a rank")


def run_loopback(args: argparse.Namespace, session: Session) -> None:
    from . import loopback
    from .linear_providers import OPS
    from .report import timing_table

    cuda = session.device == "cuda"
    hidden = args.hidden or (8192 if cuda else 256 if args.quick else 1024)
    sizes = (args.rows or (8192 if cuda else 512 if args.quick else 2048), hidden, args.inner or 4 * hidden)
    ranks = args.ranks or ([2, 4, 8] if cuda else [2])
    dtypes = args.dtype or (["bf16"] if cuda else ["fp32"])
    planned = loopback.cases(args.op or OPS, sizes, dtypes, ranks, args.ratio)
    found = loopback.run(session, planned, args.chunks)
    timing_table(found, f"loopback on {found[-1].machine}, {session.rows[-1].threads} threads")


def run_gemm(args: argparse.Namespace, session: Session) -> None:
    from . import gemm
    from .report import timing_table

    rows = args.rows or ([8192] if args.quick else [8192, 16384])
    found = gemm.run(session, list(gemm.cases(args.dtype or ["bf16"], rows)))
    timing_table(found, f"gemm on {found[-1].machine}")


def run_host(args: argparse.Namespace, session: Session) -> None:
    from . import host

    host.show(host.run(session))


def plan_memory(args: argparse.Namespace) -> list[Sizes]:
    """
    Raises:
        BenchError: sizes that do not divide by the ranks.
    """
    from . import layer, memory

    hidden = args.hidden or (128 if args.quick else 1024)
    rows = args.rows or (64 if args.quick else 1024)
    heads = args.heads or max(args.ranks, hidden // 64)
    dtypes = args.dtype or ["bf16"]
    for dtype in dtypes:
        layer.make_case("gpt", rows, args.batch, hidden, heads, args.ranks, dtype, 0.1)
    return [memory.Sizes(rows, args.batch, hidden, heads, dtype) for dtype in dtypes]


def run_memory(args: argparse.Namespace, session: Session) -> None:
    from . import memory

    if session.device == "cuda":
        raise NotHere("memory counts bytes, which are the same on a GPU: use --device cpu")
    for sizes in plan_memory(args):
        memory.show(memory.run(session, sizes, args.ranks))


def run_coverage(args: argparse.Namespace, session: Session) -> None:
    if args.models is not None:
        run_models(args, session)
        return
    from . import coverage

    coverage.show(coverage.run(session, args.dtype or list(DTYPE_NAMES)))


def run_models(args: argparse.Namespace, session: Session) -> None:
    from . import coverage_models
    from .ranks import run_ranks

    cases = coverage_models.cases(args.models)
    session.progress.plan(len(cases))
    target = "bench.coverage_models:on_rank"
    results = run_ranks(target, {"cases": cases}, args.ranks, on_step=session.progress.step)[0]
    page = args.page or (None if args.models else coverage_models.PAGE)
    if page is not None:
        coverage_models.write_page(results, args.ranks, page)
        print(f"written: {page}")
    coverage_models.show(results, args.ranks)
    wrong = [result["kind"] for result in results if result["status"] == "wrong"]
    if wrong:
        raise BenchError(f"wrong: {', '.join(wrong)}")


def commands_of_all(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Each at its default sizes or, to be done in minutes, below.

    Raises:
        BenchError: sizes that do not divide by --ranks.
    """
    brief = args.device == "cpu" and not args.quick
    found = {}
    for name in COMMANDS:
        given = [name, "--device", args.device]
        given += ["--quick"] if args.quick else []
        given += ["--dtype", *args.dtype] if args.dtype else []
        given += ["--ranks", str(args.ranks)] if name in ("linear", "layer", "memory") else []
        given += ["--chunks"] if name == "loopback" else []  # the planner's choice alone
        given += ["--rows", "512"] if name == "layer" and brief else []
        found[name] = build_parser().parse_args(given)
    plan_memory(found["memory"])
    plan_linear(found["linear"])
    plan_layer(found["layer"])
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


COMMANDS: dict[str, Callable[[argparse.Namespace, Session], None]] = {
    "coverage": run_coverage,
    "host": run_host,
    "memory": run_memory,
    "norm": run_norm,
    "reduce": run_reduce,
    "linear": run_linear,
    "layer": run_layer,
    "loopback": run_loopback,
    "gemm": run_gemm,
    **{name: lambda args, session, name=name: module_of(name).run_command(args, session) for name in MODULES},
}


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
    if args.command == "plot":
        from . import plot

        for path in plot.run(args.folder):
            print(f"drawn: {path}")
        return 0
    if args.command == "project":
        from . import project

        nvlink = project.Link("NVLink", args.nvlink_ranks, args.nvlink_gbytes)
        infiniband = project.Link("InfiniBand", args.infiniband_ranks, args.infiniband_gbytes)
        project.run(args.folder, [nvlink, infiniband], args.size, args.message_us)
        return 0
    if args.command == "tables":
        from . import tables

        path = args.file or tables.PAGE
        print(f"{path}: {'written' if tables.run(path, args.results or tables.RESULTS) else 'up to date'}")
        return 0
    if args.command == "compare":
        from . import compare

        return 1 if compare.run(args.first, args.second) and args.fail else 0
    return measure(args, typed)


def command_line(argv: Sequence[str]) -> str:
    """What was typed, without where to save: somebody else's rows come out of it as well."""
    kept = list(argv)
    if "--save" in kept:
        del kept[kept.index("--save") : kept.index("--save") + 2]
    return shlex.join(["python", "-m", "bench", *kept])


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
