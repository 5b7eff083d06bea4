"""``seqpar::all_to_all``: rows of every rank to every rank.

| op | result | shape | communication |
|---|---|---|---|
| all_to_all | out | [sum(output_sizes), ...] | all-to-all of x [sum(input_sizes), ...] |
| | dx | [sum(input_sizes), ...] | all-to-all of dy, with the sizes exchanged |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .registry import group_named, register


def _kernel(x: Tensor, output_sizes: list[int], input_sizes: list[int], group: str) -> Tensor:
    out = _fake(x, output_sizes, input_sizes, group)
    dist.all_to_all_single(out, x.contiguous(), list(output_sizes), list(input_sizes), group=group_named(group))
    return out


def _fake(x: Tensor, output_sizes: list[int], input_sizes: list[int], group: str) -> Tensor:
    return x.new_empty((sum(output_sizes), *x.shape[1:]))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output_sizes: list[int], input_sizes: list[int], group: str) -> Tensor:
        ctx.back = (input_sizes, output_sizes, group)
        return all_to_all.below_autograd(x, output_sizes, input_sizes, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(dy, *ctx.back), None, None, None


#: Dimension 0 of x has ``input_sizes[r]`` rows for rank r, dimension 0 of the result ``output_sizes[r]`` from rank r.
all_to_all = register(
    "all_to_all(Tensor x, SymInt[] output_sizes, SymInt[] input_sizes, str group) -> Tensor",
    _kernel,
    _fake,
    _AllToAll.apply,
)
