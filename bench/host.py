"""``bench host``: CPU time of one small call, in microseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .session import Session

TEXT = "what a small call costs the CPU, in microseconds"
PEERS = ("eager",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has one size and no option of its own."""


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import host_calls

    host_calls.show(host_calls.run(session))
