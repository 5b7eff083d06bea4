"""``bench layer --virtual-ranks``: a layer in t parts on one device, beside the same layer whole in plain PyTorch.

What several GPUs would share, one does in turn: the time says what sequence parallelism costs beside the layer's own
arithmetic (smaller matmuls, copies in the place of messages), not what it saves. Bytes are those of a rank all the
same: counted as autograd keeps them, and on a GPU beside what its allocator gave.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .check import WrongResult
from .layer_plain import LayerCase
from .layer_providers import Builder, Provider, _plain_results, check, compiled, eager, inputs, megatron, ours
from .layer_rank import matmul_runner
from .providers import Absent
from .ranks import run_ranks
from .schema import Row
from .session import Session
from .timing import Effort, Runner, Stats, interleave

#: Layers of published models at a long sequence.
SIZES = {
    "llama-8b": LayerCase("llama", 8192, 1, 4096, 32, 8, 14336, "bf16", 0.0),
    "gpt3-13b": LayerCase("gpt", 8192, 1, 5120, 40, 40, 20480, "bf16", 0.1),
}
WHOLE: dict[str, Builder] = {"ours": ours(), "eager": eager, "compile": compiled, "megatron": megatron}
#: Rows for the check, whose fp64 oracle holds all scores.
CHECKED_ROWS = 256

Step = Callable[[str], None]


class Whole:
    """One layer on one rank."""

    ranks = 1

    def __init__(self, build: Builder, case: LayerCase, device: str, group: dist.ProcessGroup):
        self._build, self._case, self._device, self._group = build, case, device, group
        self._provider: Provider | None = None

    def check(self) -> float:
        small = dataclasses.replace(self._case, s=min(self._case.s, CHECKED_ROWS))
        return check(self._build, small, self._device, self._group if self._build is megatron else None)

    def prepare(self) -> None:
        self._provider = self._build(self._case, self._device, self._group if self._build is megatron else None)
        self._x, self._dy = inputs(self._case, self._device)
        self._x.requires_grad_()

    def forward(self, around: Callable[[Callable[[], Tensor], Tensor], Any]) -> list[Any]:
        """``around(forward, x)`` of each rank."""
        assert self._provider is not None
        provider, x = self._provider, self._x
        return [around(lambda: provider.call(x), x)]

    def backward(self, outs: Sequence[Tensor]) -> None:
        assert self._provider is not None
        torch.autograd.grad(outs[0], [self._x, *self._provider.params.values()], self._dy)

    def close(self) -> None:
        self._provider = None


class Virtual:
    """Ours in t parts, each on a virtual rank."""

    def __init__(self, case: LayerCase, device: str, ranks: int):
        from seqpar_kernels.comm.loopback import Loopback

        self.ranks, self._case, self._device = ranks, case, device
        self._world = Loopback(ranks, device)
        self._parts: list[tuple[Provider, Tensor, Tensor]] = []

    def check(self) -> float:
        small = dataclasses.replace(self._case, s=min(self._case.s, CHECKED_ROWS), p=0.0)
        _plain_results(small, self._device, self.ranks)  # once, before the ranks all ask for it
        return max(self._world.run(lambda g: check(ours(), small, self._device, g)))

    def prepare(self) -> None:
        whole = inputs(self._case, self._device)

        def part(g: dist.ProcessGroup) -> tuple[Provider, Tensor, Tensor]:
            x, dy = (t.chunk(self.ranks, 1)[g.rank()].clone() for t in whole)
            return ours()(self._case, self._device, g), x.requires_grad_(), dy

        self._parts = self._world.run(part)

    def forward(self, around: Callable[[Callable[[], Tensor], Tensor], Any]) -> list[Any]:
        def one(g: dist.ProcessGroup) -> Any:
            provider, x, _ = self._parts[g.rank()]
            return around(lambda: provider.call(x), x)

        return self._world.run(one)

    def backward(self, outs: Sequence[Tensor]) -> None:
        def one(g: dist.ProcessGroup) -> None:
            provider, x, dy = self._parts[g.rank()]
            torch.autograd.grad(outs[g.rank()], [x, *provider.params.values()], dy)

        self._world.run(one)

    def close(self) -> None:
        self._parts = []
        self._world.close()


def kept(forward: Callable[[], Tensor], x: Tensor, skip: set[int]) -> tuple[Tensor, int, int]:
    """The result; bytes that autograd keeps of it, each storage once and parameters not at all; those new with it."""
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage  # held: its address must not come back as another's
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    total = sum(storage.nbytes() for storage in seen.values())
    old = x.untyped_storage()
    new = total - (old.nbytes() if old.data_ptr() in seen else 0)
    result = y.untyped_storage()
    return y, total, new + (0 if result.data_ptr() in seen else result.nbytes())


def memory(layer: Whole | Virtual, device: str) -> dict[str, int]:
    """Bytes of a rank (the most of any), and on a GPU what the allocator says of all ranks together."""
    params = {t.untyped_storage().data_ptr() for t in held_by(layer)}
    layer.backward(layer.forward(lambda forward, x: forward()))  # workspaces of libraries are there from now on
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    found = layer.forward(lambda forward, x: kept(forward, x, params))
    if cuda:
        torch.cuda.synchronize()
    outs, counted, new = (list(of_ranks) for of_ranks in zip(*found, strict=True))
    del found
    figures = {"kept_bytes": max(counted), "new_bytes_all_ranks": sum(new)}
    if cuda:
        figures["allocated_bytes_all_ranks"] = torch.cuda.memory_allocated() - before
    layer.backward(outs)
    if cuda:
        torch.cuda.synchronize()
        figures["peak_bytes_all_ranks"] = torch.cuda.max_memory_allocated() - before
    return figures


def held_by(layer: Whole | Virtual) -> list[Tensor]:
    """Parameters and buffers: what does not count."""
    providers = [layer._provider] if isinstance(layer, Whole) else [provider for provider, _, _ in layer._parts]
    found: list[Tensor] = []
    for provider in providers:
        assert provider is not None
        module = getattr(provider.call, "_orig_mod", provider.call)
        found += provider.params.values()
        found += module.buffers() if isinstance(module, torch.nn.Module) else []
    return found


def on_rank(job: dict[str, Any], group: dist.ProcessGroup, step: Step) -> dict[str, Any]:
    """The one process of ``run``: every layer checked, counted and timed."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    case, effort = LayerCase(**job["case"]), Effort(**job["effort"])
    layers: dict[str, Whole | Virtual] = {
        name: Whole(WHOLE[name], case, device, group) for name in WHOLE if name == "ours" or name in job["peers"]
    }
    layers |= {f"ours/{ranks}": Virtual(case, device, ranks) for ranks in job["ranks"]}
    out: dict[str, Any] = {"times": {}, "notes": {}, "metrics": {}}
    for name, layer in list(layers.items()):
        step(f"check {name}")
        try:
            metrics = {"error": round(layer.check(), 3)}
            layer.prepare()
            out["metrics"][name] = {**metrics, **memory(layer, device)}
        except (Absent, WrongResult) as error:
            out["notes"][name] = f"{'absent' if isinstance(error, Absent) else 'wrong'}: {error}"
        except Exception as error:
            out["notes"][name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
        if name in out["notes"]:
            layers.pop(name).close()
    for direction, both in {"fwd": False, "fwd+bwd": True}.items():
        step(f"time {direction}")
        matmul = matmul_runner(case, device, group, both)
        runners: dict[str, Runner] = {"matmul": lambda _, matmul=matmul: matmul()}
        for name, layer in layers.items():
            runners[name] = lambda _, layer=layer, both=both: run_once(layer, both)
        for name, stats in interleave(runners, device, effort).items():
            out["times"][f"{name} {direction}"] = dataclasses.astuple(stats)
    for layer in layers.values():
        layer.close()
    return out


def run_once(layer: Whole | Virtual, both: bool) -> None:
    outs = layer.forward(lambda forward, x: forward())
    if both:
        layer.backward(outs)


def run(session: Session, planned: Sequence[LayerCase], ranks: Sequence[int]) -> list[Row]:
    """Every case whole and on each count of virtual ranks; returns the rows added."""
    # Every virtual rank has two streams: on the 8 connections of the default they would queue behind each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    first = len(session.rows)
    peers = [name for name in WHOLE if name != "ours" and session.wanted(name)]
    for case in planned:
        session.progress.plan(3 + len(peers) + len(ranks))
        title = f"layer {case.kind} {case.s}x{case.b}x{case.h} {case.dtype} on one device"
        effort = dataclasses.replace(session.effort, least=min(session.effort.least, 7))
        job = {"case": dataclasses.asdict(case), "ranks": list(ranks), "peers": peers}
        (answer,) = run_ranks(
            ".layer_loopback:on_rank",
            {**job, "effort": dataclasses.asdict(effort)},
            1,
            device=session.device,
            on_step=lambda text, title=title: session.progress.step(f"{title}: {text}"),  # type: ignore[misc]
        )
        report(session, case, answer)
    return session.rows[first:]


def report(session: Session, case: LayerCase, answer: dict[str, Any]) -> None:
    """Rows of one case. FLOPs are those of all ranks, since one device does them all."""
    for direction in ("fwd", "fwd+bwd"):

        def new_row(name: str) -> Row:
            provider, _, count = name.partition("/")
            return Row(
                op=f"layer.{case.kind}",
                provider=provider,
                direction=direction,  # noqa: B023 (called in this turn of the loop)
                shape=case.shape(),
                dtype=case.dtype,
                ranks=int(count or 1),
                params={"p": case.p, "place": "virtual ranks on one device" if count else "one device"},
                clock="cuda" if session.device == "cuda" else "wall",
                flops=case.flops(direction, 1),  # noqa: B023
                threads=1,
            )

        times = {name: Stats(*answer["times"][f"{name} {direction}"]) for name in ("matmul", *answer["metrics"])}
        for name, stats in times.items():
            row = new_row(name)
            if name != "matmul":
                floor = times["matmul"].p50
                row.percent, row.ceiling = 100 * floor / stats.p50, "its linears and attention alone, whole"
                row.metrics = {"matmul_ms": round(floor, 3), "x_floor": round(stats.p50 / floor, 3)}
                row.metrics |= {
                    f"x {peer}": round(stats.p50 / times[peer].p50, 3) for peer in ("eager",) if peer in times
                }
                row.metrics |= answer["metrics"][name]
                unit = case.s * case.b * case.h / row.ranks
                row.metrics["sbh_over_t"] = round(answer["metrics"][name]["kept_bytes"] / unit, 2)
            session.add_timed(row, stats)
        for name, note in answer["notes"].items():
            row = session.add(new_row(name))
            row.status, _, row.reason = note.partition(": ")
