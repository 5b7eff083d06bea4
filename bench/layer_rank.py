"""One rank of ``bench layer`` and of ``bench memory``: check every layer, then time it, or count what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .check import WrongResult
from .facts import DTYPES
from .layer_plain import LayerCase
from .layer_providers import OURS, PEERS, SINGLE, Builder, Group, Provider, by_hand, check, eager, inputs, ours
from .linear_rank import rounds, why_not_timed
from .timing import Effort

Step = Callable[[str], None]
_DENSE = torch.contiguous_format


def run(job: dict[str, Any], group: dist.ProcessGroup, step: Step) -> dict[str, Any]:
    """``job`` as made by :mod:`bench.layer`; returns start and end (ns) of every sample, by provider and direction."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    case = LayerCase(**job["case"])
    out: dict[str, Any] = {"times": {}, "notes": {}, "errors": {}}
    single = group.size() == 1
    builders = {**OURS, **(SINGLE if single else PEERS)}
    providers: dict[str, Provider] = {}
    for name in job["providers"]:
        if name not in builders:
            continue
        step(f"check {name}")

        def attempt(name: str = name) -> None:
            out["errors"][name] = check(builders[name], case, device, None if single else group)
            providers[name] = builders[name](case, device, None if single else group)

        note = why_not_timed(attempt, group)
        if note:
            providers.pop(name, None)
            out["notes"][name] = note
    for direction, both in {"fwd": False, "fwd+bwd": True}.items():
        step(f"time {direction}")
        runners = {f"matmul {direction}": matmul_runner(case, device, group, both)}
        for name, provider in providers.items():
            runners[f"{name} {direction}"] = runner(case, provider, device, group, both)
        out["times"].update(rounds(runners, Effort(**job["effort"]), group, device))
    return out


def shard_of(whole: Tensor, provider: Provider, group: dist.ProcessGroup) -> Tensor:
    """[B, S, H] -> [B, S/t, H] in memory of its own, or all of it for who wants that."""
    return whole if provider.whole else whole.chunk(group.size(), 1)[group.rank()].clone(memory_format=_DENSE)


def runner(
    case: LayerCase, provider: Provider, device: str, group: dist.ProcessGroup, both: bool
) -> Callable[[], object]:
    """A training step's forward, or forward and backward."""
    x, dy = (shard_of(whole, provider, group) for whole in inputs(case, device))
    x.requires_grad_()
    if not both:
        return lambda: provider.call(x)
    wanted = [x, *provider.params.values()]
    return lambda: torch.autograd.grad(provider.call(x), wanted, dy)


def matmul_runner(case: LayerCase, device: str, group: dist.ProcessGroup, both: bool) -> Callable[[], object]:
    """The floor: this rank's linears and attention alone, everything they need at hand; all ranks at once."""
    t, dtype = group.size(), DTYPES[case.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    heads = (case.b, case.a // t, case.s, case.h // case.a)
    qkv = [random(*heads), *(random(case.b, case.kv // t, *heads[2:]) for _ in "kv")]
    pairs = []
    for name, (out, into) in case.linears().items():
        row = name in ("out_proj", "down_proj")
        size = (out, into // t) if row else (out // t, into)
        pairs.append((random(case.b, case.s, size[1]), random(*size)))

    def forward() -> list[Tensor]:
        found = [F.linear(x, weight) for x, weight in pairs]
        return [*found, F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=case.kv != case.a)]

    if not both:
        return forward
    wanted = [*qkv, *(tensor for pair in pairs for tensor in pair)]
    grads = [torch.randn_like(out) for out in forward()]
    return lambda: torch.autograd.grad(forward(), wanted, grads)


# --- bench memory ----------------------------------------------------------------------------------------------------

#: Switched on one after the other.
STEPS = ("share_gather", "fuse_dropout_add_norm", "fuse_reduce_norm", "recompute_norm", "recompute_activation")


def regimes(ranks: int) -> dict[str, Builder]:
    """Who keeps what: name -> layer."""
    stages = {"ours, nothing fused": ours(*STEPS)}
    for i, name in enumerate(STEPS, 1):
        stages[f"ours + {name}"] = ours(*STEPS[i:])
    if ranks == 1:
        return {"plain torch": eager, **stages}
    return {"TP by hand": by_hand("tp"), "TP+SP as Megatron": by_hand("sp"), **stages}


def count(job: dict[str, Any], group: Group, step: Step) -> dict[str, Any]:
    """By kind of layer and regime: bytes kept on this rank, and the error without dropout, or what is wrong."""
    from seqpar_kernels import activation_bytes

    found: dict[str, Any] = {}
    for kind, given in job["cases"].items():
        case = LayerCase(**given)
        found[kind] = {}
        for name, build in regimes(1 if group is None else group.size()).items():
            step(f"{kind} {name}")
            try:
                error, note = check(build, case, "cpu", group), ""
            except WrongResult as wrong:
                error, note = 0.0, str(wrong)
            provider = build(case, "cpu", group)
            x = inputs(case, "cpu")[0]
            if group is not None:
                x = shard_of(x, provider, group)
            report = activation_bytes(provider.call, x.requires_grad_())
            found[kind][name] = {"bytes": report.total, "error": error, "wrong": note}
    return found
