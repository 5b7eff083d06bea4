"""The sequence-parallel region a module works in: its group, its layout, and what a whole model shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ..functional import replicated
from ..layout import Group, group_rank, group_size, resolve_group


class Region:
    """Group and sequence dimension of one module, or of all modules of a converted model.

    ``seq_len`` is the unsharded length of the pass under way, set where the sequence is scattered; modules on their own
    take it as an argument where it is not a multiple of the number of ranks.

    ``summed`` maps replicated parameters to the tensors that stand for them during one forward of a converted model:
    their gradients leave through one node and are summed over the ranks in one exchange (:meth:`parameter`).

    ``deferring`` is the grad mode of a forward in which row-parallel outputs wait for the norm behind them
    (:class:`.deferred_sum.DeferredSum`); None: they do not wait.
    """

    def __init__(self, group: Group = None, seq_dim: int = -2):
        self.group: ProcessGroup | None = resolve_group(group)
        self.seq_dim = seq_dim
        self.seq_len: int | None = None
        self.summed: dict[Parameter, Tensor] = {}
        self.kept: dict[Parameter, Tensor] = {}  # those of the last forward, for its recomputation
        self.deferring: bool | None = None

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    def sum_together(self, params: Sequence[Parameter]) -> None:
        """From here on ``summed`` stands for ``params``; nothing where no gradients are wanted."""
        if not torch.is_grad_enabled():
            return
        trained = [param for param in params if param.requires_grad]
        tensors = replicated(trained, self.group) if trained and self.group is not None else trained
        self.summed = {p: t for p, t in zip(trained, tensors, strict=True) if t is not None}
        self.summed.update((p, p) for p in params if not p.requires_grad)

    def parameters(self, *params: Parameter | None) -> tuple[list[Tensor | None], bool]:
        """The tensors to compute with, and whether their gradients are summed over the ranks already."""
        summed = self.summed
        if not summed and self.kept and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            summed = self.kept  # recomputed in the backward: the very operations of the forward
        if summed and all(p is None or p in summed for p in params):
            return [None if p is None else summed[p] for p in params], True
        return list(params), False

    def summing(self, *params: Parameter | None) -> list[Tensor | None]:
        """The same for code that sums no gradients itself: in the parameters' own dtypes, gradients always summed."""
        tensors, summed = self.parameters(*params)
        if not summed and self.group is not None:
            tensors = replicated(params, self.group)
        pairs = zip(params, tensors, strict=True)
        return [None if p is None or t is None else t.to(p.dtype) for p, t in pairs]

    def defers(self, x: Tensor) -> bool:
        """Whether the row-parallel output of ``x`` may wait. Not inside a part that runs without gradients: they differ
        from its recomputation."""
        if torch.compiler.is_compiling() or self.deferring is None or torch.is_autocast_enabled(x.device.type):
            return False
        return torch.is_grad_enabled() == self.deferring

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """A copied model lives on the same ranks: process groups cannot be copied."""
        copy = Region.__new__(Region)
        copy.group, copy.seq_dim, copy.seq_len, copy.summed, copy.kept = self.group, self.seq_dim, None, {}, {}
        copy.deferring = None
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


_ENTRANCE = "_seqpar_entrance"


def mark_entrance(shard: Tensor) -> None:
    """Say that the sharded region begins with this tensor."""
    setattr(shard, _ENTRANCE, True)


def is_entrance(x: Tensor) -> bool:
    return getattr(x, _ENTRANCE, False)
