"""Sequence parallelism on two existing models: train them in one process and on several ranks, and compare.

``make demo``, or ``python examples/demo.py --ranks 2 --steps 40 --out demo_out``. Exits non-zero if the runs disagree.
"""

import argparse
import math
import os
import queue
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from demo_report import draw, show, write_numbers
from demo_run import MODELS, Job, relative_difference, run_rank
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LOSS_LIMIT = 1e-5  # relative, at every step, in fp32; docs/numerics.md has the rules that make runs agree


@dataclass
class Comparison:
    """One model, both runs. Differences are relative; a gradient's is ||a - b|| / ||b|| of its tensor."""

    model: str
    parameters: int
    ranks: int
    losses: list[float]  # unsharded
    sharded_losses: list[float]
    loss_differences: list[float]
    largest_loss_difference: float
    gradient_difference: float  # at step 0, dropout on
    gradient_tensor: str
    gradient_limit: float  # twice the error of plain fp32 PyTorch against fp64
    plain_loss_difference: float  # dropout off, both runs against plain Hugging Face in fp64
    plain_gradient_difference: float
    activation_bytes: int  # unsharded
    sharded_activation_bytes: list[int]  # by rank
    step_ms: float
    sharded_step_ms: float
    failures: list[str] = field(default_factory=list)


def run(job: Job, progress: Progress, label: str) -> list[dict[str, Any]]:
    """Starts ``job.ranks`` processes, shows their progress, returns what each rank found.

    A rank that raises or dies ends the others at once, and its traceback is the error.
    """
    context = torch.multiprocessing.get_context("spawn")
    messages = context.Queue()
    bars = {name: progress.add_task(f"{name:5} · {label}", total=job.steps, loss="") for name in MODELS}
    processes = torch.multiprocessing.spawn(
        run_rank, args=(job, messages.put), nprocs=job.ranks, join=False, daemon=True
    )
    done = False
    while not done:
        try:
            rank, name, step, loss = messages.get(timeout=0.2)
        except queue.Empty:
            done = processes.join(timeout=0.01)
            continue
        if rank != 0:
            continue
        if step is None:
            progress.update(bars[name], loss="checking without dropout")
        else:
            progress.update(bars[name], completed=step + 1, loss=f"loss {loss:.4f}")
            if not progress.console.is_terminal and (step + 1) % 10 == 0:
                progress.console.print(f"{name} · {label}: step {step + 1} of {job.steps}, loss {loss:.4f}")
    return [torch.load(f"{job.folder}/rank{rank}.pt", weights_only=True) for rank in range(job.ranks)]


def worst(values: Iterable[float]) -> float:
    """The largest value, or nan where there is one (``max`` may ignore it)."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def compare(name: str, unsharded: dict[str, Any], sharded: list[dict[str, Any]]) -> Comparison:
    """The comparison; ``failures`` lists the limits that it exceeds."""
    first, plain, exact = sharded[0], unsharded["fp32"], unsharded["fp64"]
    one, many = unsharded["train"], first["train"]
    # Two runs that each stay within the error of PyTorch's own fp32 model differ by at most twice that error.
    limit = 2 * relative_difference(plain["gradients"], exact["gradients"])[0]
    difference, tensor = relative_difference(many["gradients"], one["gradients"])
    checks = [unsharded["check"], first["check"]]
    differences = [relative(a, b) for a, b in zip(many["losses"], one["losses"], strict=True)]
    result = Comparison(
        model=name,
        parameters=unsharded["parameters"],
        ranks=len(sharded),
        losses=one["losses"],
        sharded_losses=many["losses"],
        loss_differences=differences,
        largest_loss_difference=worst(differences),
        gradient_difference=difference,
        gradient_tensor=tensor,
        gradient_limit=limit,
        plain_loss_difference=worst(
            relative(a, b) for check in checks for a, b in zip(check["losses"], exact["losses"], strict=True)
        ),
        plain_gradient_difference=worst(
            relative_difference(check["gradients"], exact["gradients"])[0] for check in checks
        ),
        activation_bytes=unsharded["activation_bytes"],
        sharded_activation_bytes=[found["activation_bytes"] for found in sharded],
        step_ms=one["step_ms"],
        sharded_step_ms=max(found["train"]["step_ms"] for found in sharded),
    )
    for what, value, bound in (
        ("the losses of the two runs differ", result.largest_loss_difference, LOSS_LIMIT),
        ("the gradients of the two runs differ", result.gradient_difference, limit),
        ("without dropout the loss differs from plain Hugging Face's", result.plain_loss_difference, LOSS_LIMIT),
        ("without dropout a gradient differs from plain Hugging Face's", result.plain_gradient_difference, limit),
    ):
        if not value <= bound:  # also catches nan
            result.failures.append(f"{name}: {what} by {value:.1e}, more than {bound:.1e}")
    if any(found["train"]["losses"] != many["losses"] for found in sharded):
        result.failures.append(f"{name}: the ranks report different losses")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the sequence-parallel run")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where the picture and the numbers go")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="models of a second, for the test suite")
    options = parser.parse_args()
    if options.ranks < 2 or options.steps < 2:
        parser.error(f"--ranks and --steps must be at least 2, got {options.ranks} and {options.steps}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= options.ranks else "cpu"
    size = (2, 64, 192, 2) if options.tiny else (4, 256, 384, 6)  # batch, sequence, hidden, layers
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On a busy machine threads that spin while they wait make a step take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for part in ("unsharded", "sharded"):
            Path(folder, part).mkdir()
        job = Job(options.ranks, options.steps, *size, device=device, folder=f"{folder}/sharded")
        alone = replace(job, ranks=1, folder=f"{folder}/unsharded", oracle=True)
        try:
            with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
                (unsharded,) = run(alone, progress, "1 process")
                sharded = run(job, progress, f"{job.ranks} ranks")
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
            print(f"demo: a rank failed\n{error}", file=sys.stderr)
            return 1
    results = [compare(name, unsharded[name], [found[name] for found in sharded]) for name in MODELS]
    options.out.mkdir(parents=True, exist_ok=True)
    picture = draw(results, LOSS_LIMIT, options.out / "demo.png")
    tables = {name: sharded[0][name]["explain"] for name in MODELS}
    facts = {key: value for key, value in asdict(job).items() if key not in ("folder", "oracle")}
    numbers = write_numbers(results, facts, tables, options.out)
    show(console, results, LOSS_LIMIT, job, [picture, *numbers], time.perf_counter() - start)
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
