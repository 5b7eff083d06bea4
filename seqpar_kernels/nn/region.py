"""The sequence-parallel region a module works in: its group, its layout, and what a whole model shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ..layout import Group, group_rank, group_size, resolve_group


class Region:
    """Group and sequence dimension of one module, or of all modules of a converted model.

    ``seq_len`` is the unsharded length of the pass under way, set where the sequence is scattered; modules on their own
    take it as an argument where it is not a multiple of the number of ranks.

    ``summed`` maps replicated parameters to the tensors that stand for them during one forward of a converted model:
    their gradients leave through one node and are summed over the ranks in one exchange (:meth:`parameter`).
    """

    def __init__(self, group: Group = None, seq_dim: int = -2):
        self.group: ProcessGroup | None = resolve_group(group)
        self.seq_dim = seq_dim
        self.seq_len: int | None = None
        self.summed: dict[Parameter, Tensor] = {}

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    def parameters(self, *params: Parameter | None) -> tuple[list[Tensor | None], bool]:
        """The tensors to compute with, and whether their gradients are summed over the ranks already."""
        if self.summed and all(p is None or p in self.summed for p in params):
            return [None if p is None else self.summed[p] for p in params], True
        return list(params), False

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """A copied model lives on the same ranks: process groups cannot be copied."""
        copy = Region.__new__(Region)
        copy.group, copy.seq_dim, copy.seq_len, copy.summed = self.group, self.seq_dim, None, {}
        memo[id(self)] = copy
        return copy

    def __repr__(self) -> str:
        return f"Region(rank {self.rank} of {self.ranks}, seq_dim={self.seq_dim})"


_SHARD = "_seqpar_shard_behind"


def show_whole(shard: Tensor, region: Region) -> Tensor:
    """A tensor of the unsharded shape that stands for ``shard``: for code that reads a shape before it computes.

    It takes no memory and holds NaN, so that a use of its values cannot pass unnoticed. Column-parallel layers look
    behind it (:func:`shard_behind`).
    """
    shape = list(shard.shape)
    shape[region.seq_dim] = shape[region.seq_dim] * region.ranks if region.seq_len is None else region.seq_len
    stand_in = torch.full((), float("nan"), dtype=shard.dtype, device=shard.device).expand(shape)
    setattr(stand_in, _SHARD, shard)
    return stand_in


def shard_behind(x: Tensor) -> Tensor:
    """The shard that ``x`` stands for; ``x`` itself where it stands for nothing else."""
    found: Tensor = getattr(x, _SHARD, x)
    return found
