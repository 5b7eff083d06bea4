"""The sequence-parallel region of a module: its group, its layout, and the state that modules of a model share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ..functional import replicated
from ..layout import Group, group_rank, group_size, resolve_group
from ..ops.registry import in_backward


class Region:
    """Group and sequence dimension of one module, or of all modules of a converted model.

    ``seq_len`` is the unsharded length in the current forward, set where the sequence is scattered. Modules outside of
    a converted model take the length as an argument where it is not a multiple of the number of ranks.

    ``summed`` maps replicated parameters to the tensors that replace them in one forward of a converted model. The
    gradients of these tensors pass one autograd node, which sums them over the ranks in one exchange
    (:meth:`parameters`).

    ``deferring`` is the grad mode of a forward in which row-parallel outputs are deferred to the norm that follows
    (:class:`.deferred_sum.DeferredSum`); None: they are not deferred.

    Examples:
        >>> from seqpar_kernels.nn import Region
        >>> region = Region(group=None, seq_dim=1)
        >>> region
        Region(rank 0 of 1, seq_dim=1)
    """

    def __init__(self, group: Group = None, seq_dim: int = -2):
        self.group: ProcessGroup | None = resolve_group(group)
        self.seq_dim = seq_dim
        self.seq_len: int | None = None
        self.summed: dict[Parameter, Tensor] = {}
        self.kept: dict[Parameter, Tensor] = {}  # ``summed`` of the last forward, for its recomputation
        self.deferring: bool | None = None

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    def sum_together(self, params: Sequence[Parameter]) -> None:
        """Fill ``summed`` with tensors for ``params``; does nothing without grad mode."""
        if not torch.is_grad_enabled():
            return
        trained = [param for param in params if param.requires_grad]
        tensors = replicated(trained, self.group) if trained and self.group is not None else trained
        self.summed = {p: t for p, t in zip(trained, tensors, strict=True) if t is not None}
        self.summed.update((p, p) for p in params if not p.requires_grad)

    def parameters(self, *params: Parameter | None) -> tuple[list[Tensor | None], bool]:
        """The tensors to compute with, and whether their gradients are summed over the ranks already."""
        summed = self.summed
        if not summed and self.kept and not torch.compiler.is_compiling() and in_backward():
            summed = self.kept  # a recomputation in the backward repeats the operations of the forward
        if summed and all(p is None or p in summed for p in params):
            return [None if p is None else summed[p] for p in params], True
        return list(params), False

    def summing(self, *params: Parameter | None) -> list[Tensor | None]:
        """Tensors for ``params`` in their own dtypes whose gradients are always summed over the ranks."""
        tensors, summed = self.parameters(*params)
        if not summed and self.group is not None:
            tensors = replicated(params, self.group)
        pairs = zip(params, tensors, strict=True)
        return [None if p is None or t is None else t.to(p.dtype) for p, t in pairs]

    def defers(self, x: Tensor) -> bool:
        """Whether the row-parallel output of ``x`` may be deferred.

        It may not in a block that a checkpoint runs without gradients: its recomputation would differ.
        """
        if torch.compiler.is_compiling() or self.deferring is None or torch.is_autocast_enabled(x.device.type):
            return False
        return torch.is_grad_enabled() == self.deferring

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """A copy with the same group: process groups cannot be copied."""
        copy = Region.__new__(Region)
        copy.group, copy.seq_dim, copy.seq_len, copy.summed, copy.kept = self.group, self.seq_dim, None, {}, {}
        copy.deferring = None
        memo[id(self)] = copy
        return copy

    def __repr__(self) -> str:
        return f"Region(rank {self.rank} of {self.ranks}, seq_dim={self.seq_dim})"


_SHARD = "_seqpar_shard_behind"


def show_whole(shard: Tensor, region: Region) -> Tensor:
    """A tensor of the unsharded shape in place of ``shard``, for code that reads shapes before a column-parallel layer.

    It takes no memory and holds NaN, so that code that uses its values gives NaN. Column-parallel layers take the shard
    from it (:func:`shard_behind`).
    """
    shape = list(shard.shape)
    shape[region.seq_dim] = shape[region.seq_dim] * region.ranks if region.seq_len is None else region.seq_len
    stand_in = torch.full((), float("nan"), dtype=shard.dtype, device=shard.device).expand(shape)
    setattr(stand_in, _SHARD, shard)
    return stand_in


def shard_behind(x: Tensor) -> Tensor:
    """The shard that ``x`` replaces (:func:`show_whole`); ``x`` itself for any other tensor."""
    found: Tensor = getattr(x, _SHARD, x)
    return found


_ENTRANCE = "_seqpar_entrance"


def mark_entrance(shard: Tensor) -> None:
    """Mark ``shard`` as the first tensor of the sharded region."""
    setattr(shard, _ENTRANCE, True)


def is_entrance(x: Tensor) -> bool:
    return getattr(x, _ENTRANCE, False)
