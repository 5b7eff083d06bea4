"""One rank of ``bench guards``: the same model with all guards and without, their training steps in turn."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqpar_kernels as sp

from .errors import BenchError
from .guards import here
from .guards_models import LEARNING_RATE, SEED, Sizes, batch, build_model, loss_of
from .linear_rank import rounds
from .timing import Effort, with_cpu_time

Step = Callable[[str], None]


@dataclass(frozen=True)
class Guard:
    """One guard, and how a model is made without it.

    Attributes:
        name: one of :data:`bench.guards.GUARDS`.
        converting: around ``parallelize``.
        checked: called with the model after its first forward.
    """

    name: str
    converting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    checked: Callable[[nn.Module], None] = lambda model: None


@contextlib.contextmanager
def _without_comparison() -> Iterator[None]:
    """Models that are converted inside do not compare their batches between the ranks."""
    variable = "SEQPAR_COMPARE_RANKS"
    before = os.environ.get(variable)
    os.environ[variable] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _stop_watching(model: nn.Module) -> None:
    """Take every forward for one that was checked, and look at no leaves; hooks that watch modules are taken off."""
    watch = model._seqpar.watch  # type: ignore[union-attr]
    watch.unchecked = lambda key: False
    watch.entered_by = watch.judge_leaves = lambda *_: None
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__qualname__", "").startswith("Watch."):
                del module._forward_pre_hooks[number]


GUARDS = (
    Guard("the comparison of the ranks", converting=_without_comparison),
    Guard("the watch for changes", checked=_stop_watching),
)


def run(job: dict[str, Any], group: dist.ProcessGroup, step: Step) -> dict[str, Any]:
    """``job`` as made by :mod:`bench.guards`; returns start and end (ns) of every step, by provider."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    guards = [guard for guard in GUARDS if guard.name in here()]
    providers = {"ours": [], **{f"ours, without {guard.name}": [guard] for guard in guards}}
    if len(guards) > 1:
        providers["ours, without all guards"] = guards
    sizes = Sizes(*job["size"])
    ids = batch(sizes, device)
    runners: dict[str, Callable[[], object]] = {}
    losses: dict[str, float] = {}
    for name, off in providers.items():
        step(f"convert: {name}")
        model = _converted(job["model"], sizes, device, group, ids, off)
        torch.manual_seed(SEED)
        losses[name] = loss_of(model, ids).item()
        runners[name] = _training_step(torch.compile(model) if job["compiled"] else model, ids)
    if len(set(losses.values())) > 1:  # a guard only looks on
        raise BenchError(f"the loss depends on the guards: {losses}")
    step("time")
    cpu: dict[str, list[float]] = {name: [] for name in runners}
    timed = {name: with_cpu_time(runner, cpu[name], time.thread_time_ns) for name, runner in runners.items()}
    times = rounds(timed, Effort(**job["effort"]), group, device)
    return {"times": times, "cpu": {name: cpu[name][-len(spans) :] for name, spans in times.items()}}


def _converted(
    name: str, sizes: Sizes, device: str, group: dist.ProcessGroup, ids: Tensor, off: list[Guard]
) -> nn.Module:
    with contextlib.ExitStack() as stack:
        for guard in off:
            stack.enter_context(guard.converting())
        model = sp.parallelize(build_model(name, sizes, device), group)
        model.loss_type = "ForCausalLM"  # GPT-2's names none, and torch.compile breaks where it warns of that
        loss_of(model, ids).backward()  # the check of the first forward
    for guard in off:
        guard.checked(model)
    return model


def _training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
