"""``bench project``: the planner's cost model fitted to measured rows, and carried to links that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .layer import SIZES
from .options import positive, ratio

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

TEXT = "the planner's cost model fitted to saved rows, and what it projects for links that were not measured"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")
    text = (
        "assumed, each way, a GPU (default: 450, half of the 900 that NVIDIA's H200 datasheet gives NVLink both ways)"
    )
    parser.add_argument("--nvlink-gbytes", type=ratio, default=450.0, metavar="GB/s", help=text)
    text = "assumed, each way, a GPU (default: 50, one NDR port of 400 Gbit/s by NVIDIA's ConnectX-7 datasheet)"
    parser.add_argument("--infiniband-gbytes", type=ratio, default=50.0, metavar="GB/s", help=text)
    text = "assumed cost of one message in microseconds (default: the planner's for the device of the rows)"
    parser.add_argument("--message-us", type=ratio, metavar="US", help=text)
    parser.add_argument("--nvlink-ranks", type=positive, default=8, help="default: 8")
    parser.add_argument("--infiniband-ranks", type=positive, default=64, help="default: 64")
    parser.add_argument("--size", choices=SIZES, nargs="+", default=list(SIZES))


def run_command(args: argparse.Namespace) -> int:
    from . import project_model

    nvlink = project_model.Link("NVLink", args.nvlink_ranks, args.nvlink_gbytes)
    infiniband = project_model.Link("InfiniBand", args.infiniband_ranks, args.infiniband_gbytes)
    project_model.run(args.folder, [nvlink, infiniband], args.size, args.message_us)
    return 0
