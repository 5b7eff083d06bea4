"""``bench coverage``: which op runs on which backend in which dtype; with --models, which models convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError, need
from .options import DTYPE_NAMES, positive
from .place import of_checkout

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .session import Session

TEXT = "which op runs on which backend in which dtype here; --models: which models convert"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="*", metavar="NAME", help="Hugging Face architectures (none named: all)")
    parser.add_argument("--ranks", type=positive, default=2, help="with --models (default: 2)")
    text = "with --models: write the table here (default: docs/models.md of a checkout, if all)"
    parser.add_argument("--page", type=Path, help=text)


def run_command(args: argparse.Namespace, session: Session) -> None:
    if args.models is not None:
        run_models(args, session)
        return
    from . import coverage_ops

    coverage_ops.show(coverage_ops.run(session, args.dtype or list(DTYPE_NAMES)))


def run_models(args: argparse.Namespace, session: Session) -> None:
    need("transformers", "hf", "coverage --models")
    from . import coverage_models
    from .ranks import run_ranks

    cases = coverage_models.cases(args.models)
    session.progress.plan(len(cases))
    results = run_ranks(".coverage_models:on_rank", {"cases": cases}, args.ranks, on_step=session.progress.step)[0]
    page = args.page or (None if args.models else of_checkout("docs", "models.md"))
    if page is not None:
        coverage_models.write_page(results, args.ranks, page)
        print(f"written: {page}")
    coverage_models.show(results, args.ranks)
    wrong = [result["kind"] for result in results if result["status"] == "wrong"]
    if wrong:
        raise BenchError(f"wrong: {', '.join(wrong)}")
