"""The registry: what ``python -m bench`` can do. A command is one file of this folder, and its name stands here.

A benchmark has ``TEXT``, ``add_options(parser)`` and ``run_command(args, session)``. It imports torch inside of
``run_command`` and no earlier, so that ``--help`` is instant. It may have three things more:

- ``PEERS``: the names that --peers may pick from;
- ``plan(args)``: raises BenchError for sizes that do not fit, before ``bench all`` measures anything;
- ``in_all(args)``: the options that ``bench all`` gives it beside --device, --dtype and --quick.

A tool measures no rows. It has ``TEXT``, ``add_options(parser)`` and ``run_command(args)``, which returns the exit
status.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .session import Session

#: In the order of ``bench all``.
BENCHMARKS = (
    "coverage",
    "host",
    "memory",
    "norm",
    "reduce",
    "linear",
    "layer",
    "loopback",
    "gemm",
    "guards",
    "attention",
    "moe",
)
TOOLS = ("plot", "tables", "project", "compare", "soak")


def module_of(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def command_of(name: str) -> Callable[[argparse.Namespace, Session], None]:
    """The benchmark of this name; its module is imported when it is called."""
    return lambda args, session: module_of(name).run_command(args, session)


def peers() -> list[str]:
    """The peers of all benchmarks, each once."""
    return list(dict.fromkeys(peer for name in BENCHMARKS for peer in getattr(module_of(name), "PEERS", ())))
