"""One rank of ``bench moe``: check every provider against fp64, count its bytes, time all in common rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.overlap.moe_routes import ExpertPlacement

from . import moe_providers
from .attention_rank import OURS_UNSHARDED, UNSHARDED, time_and_count
from .check import WrongResult, error_ratio, running_sum_error
from .facts import DTYPES
from .linear_rank import rounds, why_not_timed
from .moe_providers import MoeCase, Provider, ours_unsharded, plain, unsharded
from .timing import Effort

OWN = ("auto", "ep", "tp")
_RESULTS = ("out", "dx", "dweights", "dw1", "dw2")


class Inputs:
    """Tokens, routing, experts and the gradient of the result, whole and alike on all ranks, and this rank's parts."""

    def __init__(self, case: MoeCase, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        t, e, h, i = case.tokens, case.experts, case.hidden, case.inner
        self.case, self.group = case, group
        weights, self.index = torch.randn(t, e, generator=generator).softmax(-1).topk(case.top_k)
        self.x, self.weights, self.grad = random(t, h), weights / weights.sum(1, keepdim=True), random(t, h)
        self.w1, self.w2 = random(e, 2 * i, h, scale=h**-0.5), random(e, h, i, scale=i**-0.5)

    def part(self, name: str, whole: Tensor, provider: Provider) -> Tensor:
        """What of a tensor, or of its gradient, is this rank's."""
        ranks, rank = self.group.size(), self.group.rank()
        if name not in ("w1", "w2"):
            return whole if provider.whole else whole.chunk(ranks)[rank]
        if provider.experts == "all":
            return whole
        if provider.experts == "ep":
            return whole.chunk(ranks)[rank]
        if name == "w2":
            return whole.chunk(ranks, 2)[rank]
        return torch.cat([half.chunk(ranks, 1)[rank] for half in whole.chunk(2, 1)], 1)

    def given(self, provider: Provider) -> tuple[list[Tensor], Tensor]:
        """Leaves that want gradients: x, weights, w1, w2; and the index. Experts are parameters, for what is kept."""
        parts = [self.part(n, getattr(self, n), provider).clone() for n in ("x", "weights", "w1", "w2")]
        leaves = [t.requires_grad_() for t in parts[:2]] + [nn.Parameter(t) for t in parts[2:]]
        return leaves, self.part("index", self.index, provider).contiguous()


def run(job: dict[str, Any], group: dist.ProcessGroup, step: Callable[[str], None]) -> dict[str, Any]:
    """``job`` as made by :mod:`bench.moe`; returns start and end (ns) of every sample, by provider and direction,
    beside the CPU's milliseconds, bytes sent and kept, errors, and why who is missing is missing."""
    case = MoeCase(**job["case"])
    inputs, effort = Inputs(case, DTYPES[job["dtype"]], group), Effort(**job["effort"])
    out: dict[str, Any] = {name: {} for name in ("times", "cpu", "sent", "kept", "errors", "notes", "planned")}
    alone = {UNSHARDED: unsharded(case), OURS_UNSHARDED: ours_unsharded(case)}
    runners = {name: runner(provider, inputs) for name, provider in alone.items()}
    if job["calibrate"]:
        out["times"] = rounds({name: partial(call, True) for name, call in runners.items()}, effort, group, "cpu")
        out["planned"] = planned(inputs, moe_providers.ours(case, group))
        return out
    step("fp64")
    truth, reference = oracle(inputs), results(alone[UNSHARDED], inputs)
    out["errors"][OURS_UNSHARDED] = check(alone[OURS_UNSHARDED], inputs, truth, reference)
    for name, build in builders(job["peers"]).items():
        step(f"check {name}")

        built: list[Provider] = []

        def attempt(name: str = name, build: moe_providers.Build = build, built: list[Provider] = built) -> None:
            built.append(build(case, group))
            out["errors"][name] = check(built[0], inputs, truth, reference, name in moe_providers.PEERS)

        note = why_not_timed(attempt, group)
        if note:
            out["notes"][name] = note
            continue
        (provider,) = built
        out["kept"][name] = kept_by(provider, inputs)
        runners[name] = runner(provider, inputs)
        if name.startswith("ours"):
            out["planned"][name] = planned(inputs, provider)
    time_and_count(out, runners, group, effort, job["link_bytes"], step)
    return out


def builders(peers: list[str]) -> dict[str, moe_providers.Build]:
    """Everybody to check and time; looked up when called, for tests that put a wrong one in somebody's place."""
    ours = moe_providers.ours
    found: dict[str, moe_providers.Build] = {
        "ours" if way == "auto" else f"ours/{way}": partial(ours, experts=way) for way in OWN
    }
    found.update({name: moe_providers.PEERS[name] for name in peers})
    return found


def planned(inputs: Inputs, provider: Provider) -> dict[str, Any]:
    """How experts are divided, and the bytes that this rank should send: rows, ids and weights there, rows back."""
    case, group, way = inputs.case, inputs.group, provider.experts
    ranks, rank = group.size(), group.rank()
    placement = ExpertPlacement(case.experts, ranks, way)
    of_ranks = inputs.index.chunk(ranks)
    others = [r for r in range(ranks) if r != rank]
    out = sum(placement.tokens(of_ranks[rank], r).shape[0] for r in others)
    into = sum(placement.tokens(of_ranks[r], rank).shape[0] for r in others)
    row, meta = case.hidden * inputs.x.element_size(), 4 * case.top_k
    forward = out * (row + 2 * meta) + into * row + 16 * ranks * len(others)
    return {"experts": way, "fwd": forward, "fwd+bwd": forward + out * row + into * (row + meta)}


def runner(provider: Provider, inputs: Inputs) -> Callable[[bool], object]:
    leaves, index = inputs.given(provider)
    grad = inputs.part("grad", inputs.grad, provider)
    x, weights, w1, w2 = leaves

    def call(both: bool) -> object:
        y = provider.run(x, index, weights, w1, w2)
        return torch.autograd.grad(y, leaves, grad) if both else y

    return call


def results(provider: Provider, inputs: Inputs) -> list[Tensor]:
    """This rank's parts of out and of the gradients of x, weights, w1 and w2."""
    leaves, index = inputs.given(provider)
    x, weights, w1, w2 = leaves
    y = provider.run(x, index, weights, w1, w2)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.part("grad", inputs.grad, provider))]


def kept_by(provider: Provider, inputs: Inputs) -> int:
    """Bytes that autograd keeps for the backward, the experts' own left out."""
    leaves, index = inputs.given(provider)
    x, weights, w1, w2 = leaves
    report = sp.activation_bytes(provider.run, x, index, weights, w1, w2)
    torch.autograd.grad(report.result, leaves, inputs.part("grad", inputs.grad, provider))  # no rank waits for another
    return report.total


def check(
    provider: Provider, inputs: Inputs, truth: list[Tensor], reference: list[Tensor], peer: bool = False
) -> float:
    """The largest error of this rank's results, in units of PyTorch's in the same dtype.

    A peer may sum its weights' gradients in the plainest way.

    Raises:
        WrongResult: more than two of them.
    """
    worst = 0.0
    for name, mine, ref, want in zip(_RESULTS, results(provider, inputs), reference, truth, strict=True):
        of = name[1:] if name in ("dw1", "dw2") else name
        part = inputs.part(of, want, provider)
        ratio = error_ratio(mine, ref, want, part=part)
        worst = max(worst, ratio)
        if peer and name in ("dw1", "dw2"):
            ratio = error_ratio(mine, ref, want, running_sum_error(inputs.case.tokens), part)
        if ratio > 2:
            raise WrongResult(f"{name} errs {ratio:.1f} times as much as PyTorch in the same dtype (2 allowed)")
    return worst


def oracle(inputs: Inputs) -> list[Tensor]:
    """out and all gradients in fp64, one matmul an expert."""
    leaves = [getattr(inputs, name).double().requires_grad_() for name in ("x", "weights", "w1", "w2")]
    x, weights, w1, w2 = leaves
    y = plain(x, inputs.index, weights, w1, w2)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.grad.double())]
