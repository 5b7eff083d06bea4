"""``bench soak``: long runs on real gloo ranks: ever-new lengths, faults, kills.

``lengths`` trains steps of lengths that never come again and reads the resident memory of every rank. ``faults`` has
one rank a round raise in forward, backward or a hook, be refused for its arguments, call another op, skip one or stop
for a while; every rank catches and goes on. A round ends with calls whose results are compared; all of a round's last
must succeed. Each kill takes a world of its own. ``--patience`` shortens the watch's, so that a round takes less time.
"""

from __future__ import annotations

import argparse
import sys

TEXT = "long runs on real gloo ranks: ever-new lengths, faults, kills; memory growth, hangs and wrong results"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("what", choices=["lengths", "faults", "kills"])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5000, help="of lengths")
    parser.add_argument("--rounds", type=int, default=1000, help="of faults; worlds of kills")
    parser.add_argument("--patience", type=float, default=1.0, help="seconds after which a wait is looked into")


def run_command(args: argparse.Namespace) -> int:
    from . import soak_ranks

    good = soak_ranks.run(args.what, args.ranks, args.steps, args.rounds, args.patience)
    print("good" if good else "NOT GOOD")
    return 0 if good else 1


def main(arguments: list[str]) -> int:
    """As a module of its own: ``python -m bench.soak``."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.soak", description=__doc__)
    add_options(parser)
    return run_command(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
