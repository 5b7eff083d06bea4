"""``seqpar::gather``, ``reduce_scatter``, ``split``, ``all_reduce``: mappings between regions, of any dimension.

n is the size of dimension ``dim`` of the whole tensor, over t ranks. Sums run in rank order, in fp32 (fp64 for fp64).

| op | result | shape | communication |
|---|---|---|---|
| gather | out | [..., n, ...] | all-gather of x [..., n/t, ...] |
| | dx, partial_grad | [..., n/t, ...] | reduce-scatter of dy: each rank has a part of the gradient |
| | dx, else | [..., n/t, ...] | none, a slice of dy: each rank has the whole gradient |
| reduce_scatter | out | [..., n/t, ...] | reduce-scatter of x [..., n, ...] |
| | dx | [..., n, ...] | all-gather of dy |
| split | out | [..., n/t, ...] | none, a slice of x [..., n, ...] |
| | dx | [..., n, ...] | all-gather of dy |
| all_reduce | out | that of x | all-reduce of x |
| | dx | that of x | none, dy itself |
| CopyToRegion | out | that of x | none, x itself |
| | dx | that of x | all-reduce of dy |
| SumGradients | outs | those of params | none, the params (16-bit ones in fp32) |
| | dparams | those of params | one all-reduce of all gradients together |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import select
from ..layout import SequenceShard, group_rank, group_size
from ..overlap import pipeline
from .registry import group_named, register


def _shard(group: str, length: int) -> SequenceShard:
    pg = group_named(group)
    return SequenceShard(length, group_size(pg), group_rank(pg))


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _with_features(x: Tensor) -> Tensor:
    """A view with a last dimension of size 1: the pipeline cuts any dimension but the last."""
    return x.unsqueeze(-1)


def _without_features(x: Tensor) -> Tensor:
    return pipeline.reshaped(x, x.shape[:-1])


def _gather_kernel(x: Tensor, dim: int, length: int, group: str, partial_grad: bool) -> Tensor:
    return _without_features(pipeline.gather(_with_features(x), dim, length, group_named(group)))


def _gather_fake(x: Tensor, dim: int, length: int, group: str, partial_grad: bool) -> Tensor:
    return _resized(x, dim, length)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int, group: str, partial_grad: bool) -> Tensor:
        ctx.place = (dim, group, partial_grad)
        return gather.below_autograd(x, dim, length, group, partial_grad)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dim, group, partial_grad = ctx.place
        dx = reduce_scatter(dy, dim, group) if partial_grad else split(dy, dim, group)
        return dx, None, None, None, None


def _reduce_scatter_kernel(x: Tensor, dim: int, group: str) -> Tensor:
    return _without_features(pipeline.reduce_scatter(_with_features(x), dim, group_named(group)))


def _reduce_scatter_fake(x: Tensor, dim: int, group: str) -> Tensor:
    return _resized(x, dim, _shard(group, x.shape[dim]).size)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.place = (dim, x.shape[dim], group)
        return reduce_scatter.below_autograd(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dim, length, group = ctx.place
        return gather(dy, dim, length, group, True), None, None


def _split_kernel(x: Tensor, dim: int, group: str) -> Tensor:
    shard = _shard(group, x.shape[dim])
    return x.narrow(dim, shard.start, shard.size).clone(memory_format=torch.contiguous_format)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.place = (dim, x.shape[dim], group)
        return split.below_autograd(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dim, length, group = ctx.place
        return gather(dy, dim, length, group, False), None, None


def _all_reduce_kernel(x: Tensor, group: str) -> Tensor:
    """Reduce-scatter and all-gather of the flat tensor, so that every rank gets the same bits."""
    pg = group_named(group)
    flat = x.reshape(-1, 1)
    if pg is None or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if x.numel() * group_size(pg) <= _SMALL:
        parts = pipeline.gather(flat, 0, flat.shape[0] * group_size(pg), pg, "all_reduce")
        total = select(None, x.device).reduce_shards(parts.view(group_size(pg), 1, -1), None)
    else:
        total = pipeline.reduce_scatter(flat, 0, pg, "all_reduce")
        total = pipeline.gather(total, 0, flat.shape[0], pg, "all_reduce gather")
    return pipeline.reshaped(total, x.shape)


_SMALL = 1 << 16  # elements; below it one all-gather takes less time than a reduce-scatter and an all-gather


def _all_reduce_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return all_reduce.below_autograd(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None


class CopyToRegion(torch.autograd.Function):
    """Identity forward, all-reduce backward, for a replicated tensor from which each rank computes another result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(dy, ctx.group), None


class SumGradients(torch.autograd.Function):
    """Identity forward for replicated parameters; the backward sums all their gradients in one exchange.

    16-bit parameters are returned in fp32, so that gradients are not rounded before the sum over ranks.
    """

    @staticmethod
    def forward(ctx: Any, group: str, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.dtypes = [p.dtype for p in params]
        ctx.set_materialize_grads(False)
        return tuple(p.float() if p.dtype in (torch.bfloat16, torch.float16) else p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [g for g in grads if g is not None]
        sums = iter(sum_over_ranks(present, ctx.group)) if present else iter(())
        return (None, *(None if g is None else next(sums).to(d) for g, d in zip(grads, ctx.dtypes, strict=True)))


def _sum_over_ranks_kernel(tensors: list[Tensor], group: str) -> list[Tensor]:
    out: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        picked = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        total = _all_reduce_kernel(torch.cat([tensors[i].reshape(-1) for i in picked]), group)
        pieces = total.split([tensors[i].numel() for i in picked])
        out.update((i, piece.view(tensors[i].shape).clone()) for i, piece in zip(picked, pieces, strict=True))
    return [out[i] for i in range(len(tensors))]


def _sum_over_ranks_fake(tensors: list[Tensor], group: str) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


gather = register(
    "gather(Tensor x, int dim, SymInt length, str group, bool partial_grad) -> Tensor",
    _gather_kernel,
    _gather_fake,
    _Gather.apply,
)
reduce_scatter = register(
    "reduce_scatter(Tensor x, int dim, str group) -> Tensor",
    _reduce_scatter_kernel,
    _reduce_scatter_fake,
    _ReduceScatter.apply,
)
split = register("split(Tensor x, int dim, str group) -> Tensor", _split_kernel, _reduce_scatter_fake, _Split.apply)
all_reduce = register(
    "all_reduce(Tensor x, str group) -> Tensor", _all_reduce_kernel, _all_reduce_fake, _ReduceFromRegion.apply
)
sum_over_ranks = register(
    "sum_over_ranks(Tensor[] tensors, str group) -> Tensor[]", _sum_over_ranks_kernel, _sum_over_ranks_fake, None
)
