"""What the benchmarks of ``python -m bench`` may be asked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


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


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def add_norm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, nargs="+", help="default: 4096")
    parser.add_argument("--hidden", type=positive, nargs="+", help="default: 4096 (cpu), 1024 to 32768 (cuda)")
    parser.add_argument("--p", type=probability, nargs="+", default=[0.0, 0.1], help="dropout (default: 0 0.1)")
    parser.add_argument("--kind", choices=("layer", "rms"), nargs="+", default=["layer", "rms"])
    text = "only what each option of the op costs, at one shape (none named: all options)"
    parser.add_argument("--features", nargs="*", metavar="NAME", help=text)


def add_reduce_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=positive, nargs="+", default=[4, 8], help="partial results (default: 4 8)")
    parser.add_argument("--rows", type=positive, nargs="+", help="of one shard (default: 2048)")
    parser.add_argument("--hidden", type=positive, nargs="+", help="default: 4096 (cpu), 4096 8192 (cuda)")
    parser.add_argument("--p", type=probability, nargs="+", default=[0.0, 0.1], help="dropout (default: 0 0.1)")


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


def add_loopback_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=("all_gather_linear", "linear_reduce_scatter"), nargs="+")
    text = "virtual ranks, of one process on one device (default: 2; cuda: 2 4 8)"
    parser.add_argument("--ranks", type=positive, nargs="+", help=text)
    parser.add_argument(
        "--rows", type=positive, help="sequence length of all ranks together (default: 2048; cuda: 8192)"
    )
    parser.add_argument("--hidden", type=positive, help="features outside (default: 1024; cuda: 8192)")
    parser.add_argument("--inner", type=positive, help="features inside, of all ranks (default: 4 x hidden)")
    parser.add_argument("--chunks", type=positive, nargs="*", default=[1, 2, 4, 8], help="beside the planner's choice")
    parser.add_argument(
        "--ratio", type=ratio, default=1.0, help="the wire's time in units of the matmuls' (default: 1)"
    )


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=("gpt", "llama"), nargs="+", default=["gpt", "llama"])
    parser.add_argument("--ranks", type=positive, default=2, help="also on so many, one thread each (default: 2)")
    parser.add_argument("--rows", type=positive, help="sequence length (default: 1024)")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--hidden", type=positive, help="default: 1024")
    parser.add_argument("--heads", type=positive, help="default: hidden / 64")
    parser.add_argument("--p", type=probability, default=0.1, help="dropout of the GPT layer (default: 0.1)")
    text = "layers of these models instead, 8192 rows, on one device (with --virtual-ranks)"
    parser.add_argument("--size", choices=("llama-8b", "gpt3-13b"), nargs="+", help=text)
    text = "whole and in so many parts, of one process on one device, instead of --ranks"
    parser.add_argument("--virtual-ranks", type=positive, nargs="+", metavar="T", help=text)


def add_project_options(commands: Any) -> None:
    text = "the planner's cost model fitted to saved rows, and what it projects for links that were not measured"
    project = commands.add_parser("project", help=text, description=text)
    project.add_argument("folder", type=Path, metavar="DIR")
    text = (
        "assumed, each way, a GPU (default: 450, half of the 900 that NVIDIA's H200 datasheet gives NVLink both ways)"
    )
    project.add_argument("--nvlink-gbytes", type=ratio, default=450.0, metavar="GB/s", help=text)
    text = "assumed, each way, a GPU (default: 50, one NDR port of 400 Gbit/s by NVIDIA's ConnectX-7 datasheet)"
    project.add_argument("--infiniband-gbytes", type=ratio, default=50.0, metavar="GB/s", help=text)
    text = "assumed cost of one message in microseconds (default: the planner's for the device of the rows)"
    project.add_argument("--message-us", type=ratio, metavar="US", help=text)
    project.add_argument("--nvlink-ranks", type=positive, default=8, help="default: 8")
    project.add_argument("--infiniband-ranks", type=positive, default=64, help="default: 64")
    project.add_argument("--size", choices=("llama-8b", "gpt3-13b"), nargs="+", default=["llama-8b", "gpt3-13b"])
