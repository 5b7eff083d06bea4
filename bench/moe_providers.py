"""Who is timed in ``bench moe``, on one rank: ours by how experts are divided, two by hand, Transformers' own.

Everybody gets tokens [T, H], their experts and the weights of these [T, K], and experts' weights as Transformers lays
them, [E, 2 * I, H] and [E, H, I]; and gives the weighted sums [T, H]. Which tokens and experts a rank has is up to the
provider.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.overlap.moe_routes import best_way

from .linear_providers import _gathered, _scattered
from .providers import Absent

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MoeCase:
    """One question: T tokens of all ranks, E experts of which each token meets K, H features outside, I inside."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int


@dataclass
class Provider:
    """``run(x, index, weights, w1, w2)``, and what of each it is given."""

    run: Run
    whole: bool = False  # all tokens, and not this rank's
    experts: str = "ep"  # whole experts of this rank; "tp": a part of each; "all"


def plain_experts(rows: Tensor, counts: Sequence[int], w1: Tensor, w2: Tensor) -> Tensor:
    """Each run of rows [P, H], sorted by expert, through its expert, by what PyTorch has for it."""
    if rows.dtype == torch.float64 or not rows.shape[0]:  # PyTorch's grouped matmul takes neither
        runs = zip(rows.split(list(counts)), w1.unbind(), w2.unbind(), strict=True)
        return torch.cat([_gate(run @ up.t()) @ down.t() for run, up, down in runs])
    ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(rows, w1.transpose(1, 2), offs=ends)
    return torch._grouped_mm(_gate(h), w2.transpose(1, 2), offs=ends)


def _gate(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def plain(x: Tensor, index: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The experts of ``w1``, numbered from 0 on, of all of ``x``; other numbers are experts elsewhere."""
    flat = index.reshape(-1)
    here = ((flat >= 0) & (flat < w1.shape[0])).nonzero().view(-1)
    pairs = here[flat[here].argsort(stable=True)]
    counts = flat[pairs].bincount(minlength=w1.shape[0]).tolist()
    tokens = pairs // index.shape[1]
    y = plain_experts(x[tokens], counts, w1, w2) * weights.reshape(-1)[pairs, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, y)


def unsharded(case: MoeCase) -> Provider:
    """PyTorch on all tokens and experts, each rank for itself: the ideal is this over the ranks."""
    return Provider(plain, True, "all")


def ours_unsharded(case: MoeCase) -> Provider:
    """Ours without a group."""
    return Provider(_ours(case, None, "ep"), True, "all")


def ours(case: MoeCase, group: dist.ProcessGroup, experts: str = "auto") -> Provider:
    """``auto`` divides experts as ``parallelize`` does."""
    way = best_way(case.experts, case.inner, group.size()) if experts == "auto" else experts
    return Provider(_ours(case, group, way), experts=way)


def _ours(case: MoeCase, group: dist.ProcessGroup | None, way: str) -> Run:
    def run(x: Tensor, index: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return sp.moe_mlp(x, index, weights, w1, w2, group=group, num_experts=case.experts, experts=way)

    return run


class _AllToAll(torch.autograd.Function):
    """Runs of rows to every rank; the backward sends their gradients back."""

    @staticmethod
    def forward(ctx, rows, sent, got, group):  # type: ignore[no-untyped-def,override]
        ctx.sent, ctx.got, ctx.group = sent, got, group
        out = rows.new_empty(sum(got), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), got, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return _AllToAll.apply(grad, ctx.got, ctx.sent, ctx.group), None, None, None


def by_hand(case: MoeCase, group: dist.ProcessGroup) -> Provider:
    """Pairs of a token and an expert sorted by expert, one all-to-all there and one back; weighted at home."""
    ranks, local = group.size(), case.experts // group.size()

    def run(x: Tensor, index: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        flat = index.reshape(-1)
        pairs = flat.argsort(stable=True)
        tokens = pairs // case.top_k
        to_experts = flat.bincount(minlength=case.experts)
        from_ranks = torch.empty_like(to_experts)  # [t, E / t]: pairs for each expert here
        dist.all_to_all_single(from_ranks, to_experts, group=group)
        sent = to_experts.view(ranks, local).sum(1).tolist()
        got = from_ranks.view(ranks, local).sum(1).tolist()
        rows = _AllToAll.apply(x[tokens], sent, got, group)
        expert = torch.arange(local, device=x.device).repeat(ranks).repeat_interleave(from_ranks)
        order = expert.argsort(stable=True)
        counts = from_ranks.view(ranks, local).sum(0).tolist()
        y = plain_experts(rows[order], counts, w1, w2)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=x.device)
        home = _AllToAll.apply(y[back], got, sent, group) * weights.reshape(-1)[pairs, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, home)

    return Provider(run)


class _Gather(torch.autograd.Function):
    """[T/t, ...] -> [T, ...] in rank order; the backward adds the ranks' gradients, each its own rows."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def,override]
        ctx.group = group
        return _gathered(x[None], group)[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return _scattered(grad[None], ctx.group)[0], None


class _Scatter(torch.autograd.Function):
    """The ranks' sum of [T, ...] -> [T/t, ...]; the backward gathers."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def,override]
        ctx.group = group
        return _scattered(x[None], group)[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return _gathered(grad[None], ctx.group)[0], None


def all_gather(case: MoeCase, group: dist.ProcessGroup) -> Provider:
    """Every token gathered, this rank's experts on those that chose them, the sums reduce-scattered.

    What Transformers' plan sends, for tokens that ranks share: its all-reduce is this gather and this scatter.
    """
    first = case.experts // group.size() * group.rank()

    def run(x: Tensor, index: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        every = _gathered(index[None], group)[0] - first
        out = plain(_Gather.apply(x, group), every, _Gather.apply(weights, group), w1, w2)
        return _Scatter.apply(out, group)

    return Provider(run)


def transformers(case: MoeCase, group: dist.ProcessGroup) -> Provider:
    """Its expert-parallel plan: all tokens on every rank, its experts' forward and its all-reduces."""
    if importlib.util.find_spec("transformers") is None:
        raise Absent("transformers is not installed")
    try:
        from torch.distributed.device_mesh import DeviceMesh
        from transformers import MixtralConfig
        from transformers.distributed.tensor_parallel import EpRouterParallel, MoeExpertsParallel, _AllReduceForward
        from transformers.integrations.moe import grouped_mm_experts_forward
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as error:
        raise Absent(f"another version of its expert parallelism: {error}") from None
    local = case.experts // group.size()
    config = MixtralConfig(hidden_size=case.hidden, intermediate_size=case.inner, num_local_experts=local)
    with torch.device("meta"):
        module: Any = MixtralExperts(config)
        router: Any = torch.nn.Module()
    module._is_expert_parallel, router.num_experts = True, case.experts
    mesh = DeviceMesh.from_group(group, "cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def run(x: Tensor, index: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        # As its plan wraps router and experts. The experts' parameters are this rank's, as its hook hands them on.
        _, scores, chosen = EpRouterParallel().transform_output_post_forward(router, (None, weights, index), mesh)
        given, _ = MoeExpertsParallel().transform_inputs_pre_forward(
            module, (x, chosen, scores), {}, mesh, is_expert_parallel=True
        )
        module._parameters.update(gate_up_proj=w1, down_proj=w2)
        return _AllReduceForward.apply(grouped_mm_experts_forward(module, *given), group)

    return Provider(run, whole=True)


Build = Callable[[MoeCase, dist.ProcessGroup], Provider]
PEERS: dict[str, Build] = {"by-hand": by_hand, "all-gather": all_gather, "transformers": transformers}
