"""``python -m bench``, and the command ``seqpar-bench`` of an installed package: see :mod:`bench.cli`."""

import sys

from .allocator import restart_with_allocator_settings
from .cli import build_parser, main
from .suite import TOOLS


def run() -> int:
    """Measures in an interpreter with the allocator's settings. What measures nothing does not start a second one."""
    if build_parser().parse_args().command not in TOOLS:  # --help and mistakes end here
        restart_with_allocator_settings()
    return main()


if __name__ == "__main__":
    sys.exit(run())
