"""``bench guards``: what the guards of a converted model cost a training step of the demo's models.

The same model is converted several times on the same ranks, with all guards and with some switched off, and their steps
(forward, backward, optimizer) run in turn. A guard's cost is the difference between the two steps of one round.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported late: --help is instant
    import argparse

    from .schema import Row
    from .session import Session

TEXT = "what the guards of a converted model cost a step of the demo's models, on several ranks"
MODELS = {"gpt2": "GPT-2", "llama": "Llama"}
#: Guard -> the module of the package that it lies in.
GUARDS = {"the comparison of the ranks": "alike", "the watch for changes": "changes"}
#: Percent of a step that all guards together may cost.
ALLOWED = 1.0
_SECONDS = 20.0  # a hundredth of a step needs many of them


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--ranks", type=int, choices=range(2, 9), default=2, help="one thread each (default: 2)")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile, where they must cost nothing")


def run_command(args: argparse.Namespace, session: Session) -> None:
    from . import facts
    from .report import timing_table

    effort = session.effort
    if args.seconds is None and args.command == "guards" and not args.quick:
        effort = dataclasses.replace(effort, seconds=_SECONDS)
    found = run(session, args.model, args.ranks, args.compiled, dataclasses.asdict(effort))
    timing_table(found, f"guards on {facts.machine(session.device)}, {args.ranks} ranks, one thread each")
    for row in found:
        if "cost_percent" in row.metrics:
            what = row.provider.removeprefix("ours, without ")
            cost, low, high = (row.metrics[name] for name in ("cost_percent", "cost_p20", "cost_p80"))
            print(
                f"{row.label()}: {what} costs {cost:+.2f} % of a step (p20..p80 of its rounds {low:+.2f}..{high:+.2f})"
            )


def here() -> list[str]:
    """The guards that this version of the package has."""
    return [name for name, module in GUARDS.items() if importlib.util.find_spec(f"seqpar_kernels.convert.{module}")]


def run(session: Session, models: list[str], ranks: int, compiled: bool, effort: dict[str, Any]) -> list[Row]:
    """Every model; returns the rows added.

    Raises:
        NotHere: no guard, or fewer devices than ranks.
    """
    import torch

    from .errors import NotHere, need

    need("transformers", "hf", "guards")
    if not here():
        raise NotHere("this version of the package has no guard that can be switched off")
    if session.device == "cuda" and torch.cuda.device_count() < ranks:
        raise NotHere(f"there are {torch.cuda.device_count()} CUDA devices: one rank needs one device")
    first = len(session.rows)
    for model in models:
        measure(session, model, ranks, compiled, effort)
    return session.rows[first:]


def measure(session: Session, model: str, ranks: int, compiled: bool, effort: dict[str, Any]) -> None:
    from .linear import stats_of
    from .ranks import run_ranks
    from .schema import Row

    # The demo's own sizes: batch, sequence, hidden, layers.
    size = (2, 64, 192, 2) if session.quick else (4, 256, 384, 6)
    job = {"model": MODELS[model], "size": size, "compiled": compiled, "effort": effort}
    answers = run_ranks(
        ".guards_rank:run",
        job,
        ranks,
        device=session.device,
        on_step=lambda text: session.progress.step(f"guards {model}: {text}"),
    )
    every = _samples(answers, "ours")
    for name in answers[0]["times"]:
        row = Row(
            op=f"guards.{model}",
            provider=name,
            direction="step",
            shape=list(size),
            dtype="fp32",
            ranks=ranks,
            params={"compiled": True} if compiled else {},
            threads=1,
        )
        if name != "ours":
            cost = _cost(every, _samples(answers, name))
            row.metrics = {"cost_percent": cost[1], "cost_p20": cost[0], "cost_p80": cost[2]}
            # Of the thread that runs the model: other programs on the machine do not disturb it, waiting is not in it.
            cpu = max(_cost(answer["cpu"]["ours"], answer["cpu"][name])[1] for answer in answers)
            row.metrics.update(cpu_percent=cpu, allowed_percent=0.0 if compiled else ALLOWED)
        session.add_timed(row, stats_of(answers, name))


def _samples(answers: list[dict[str, Any]], name: str) -> list[float]:
    """Milliseconds from the first rank's start to the last rank's end, round by round."""
    rounds = zip(*(answer["times"][name] for answer in answers), strict=True)
    return [(max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6 for spans in rounds]


def _cost(every: list[float], without: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 of the differences of one round, in percent of the usual step without the guard."""
    usual = statistics.median(without)
    costs = sorted(100 * (a - b) / usual for a, b in zip(every, without, strict=True))
    found = statistics.quantiles(costs, n=10, method="inclusive") if len(costs) > 1 else costs * 9
    return round(found[1], 3), round(found[4], 3), round(found[7], 3)
