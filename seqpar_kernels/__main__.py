"""``python -m seqpar_kernels``: what was built, what is available here, and the reason for every "no".

``torchrun --nproc-per-node 2 -m seqpar_kernels tune`` measures this machine and its links for the planner.
"""

import argparse
import os
import platform

import torch
import torch.distributed as dist

from . import __version__
from .convert.resolve import why_not_convert
from .kernels import BACKENDS, native, remark, why_not
from .overlap.tuning import tune


def report() -> str:
    """The text printed by ``python -m seqpar_kernels``."""
    lines = [
        f"seqpar_kernels {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}",
        "",
        "built",
    ]
    if native._native is None:
        lines.append(f"  extension          no: {native.build_error}")
    else:
        lines.append(
            f"  CPU kernels        yes: running {native._native.cpu_isa()}, threads by {native._native.cpu_threading()}"
        )
        archs = f"yes: {native._native.cuda_archs()}" if native._native.has_cuda else "no: built without nvcc"
        lines.append(f"  CUDA kernels       {archs}")
    lines += ["", "kernels"]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        for backend in BACKENDS:
            reason = why_not(backend, device)
            said = f"no: {reason}" if reason is not None else ": ".join(filter(None, ("yes", remark(backend, device))))
            lines.append(f"  {backend:<10} on {device.type:<5} {said}")
    if len(devices) == 1:
        lines.append(f"  cuda               no: {_no_cuda()}")
    lines += ["", "communication"]
    for name in ("gloo", "nccl", "ucc", "mpi"):
        available = dist.is_available() and getattr(dist, f"is_{name}_available")()
        lines.append(f"  {name:<18} {'yes' if available else 'no: this torch was built without it'}")
    reason = why_not_convert()
    lines += ["", "models", f"  {'parallelize':<18} {'yes' if reason is None else 'no: ' + reason}"]
    return "\n".join(lines)


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "no CUDA device is visible (no driver, no GPU, or CUDA_VISIBLE_DEVICES hides it)"


def tune_ranks() -> str | None:
    """The figures as text on rank 0, None on the others.

    Raises:
        SystemExit: not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise SystemExit("tune: start one process a rank: torchrun --nproc-per-node 2 -m seqpar_kernels tune")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    try:
        figures = tune()
        lines = [f"{name:<16} {value}" for name, value in figures._asdict().items()]
        return "\n".join(lines) if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seqpar_kernels", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["report", "tune"], default="report")
    text = tune_ranks() if parser.parse_args().command == "tune" else report()
    if text is not None:
        print(text)


if __name__ == "__main__":
    main()
