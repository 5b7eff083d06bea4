"""Cuts parameters over ranks, and gathers them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..checks import check_divides
from ..layout import SequenceShard, group_rank, group_size, vocabulary_range
from ..ops import gather
from ..ops.registry import group_name


class ShardSpec(NamedTuple):
    """Dimension ``dim`` is cut into sections (q|k|v of a packed projection), each of them over all ranks.

    ``sections`` is the number of equal sections, or their sizes. ``size`` is set for a dimension that need not be a
    multiple of the ranks: it is the whole size, cut as ``torch.chunk`` cuts, with less on the last ranks (a
    vocabulary), or with ``balanced`` as ``torch.tensor_split`` cuts, with one more on the first ranks (experts).

    Examples:
        >>> from seqpar_kernels.nn import ShardSpec
        >>> ShardSpec(0, sections=3).sizes(12)  # q, k and v packed in dimension 0
        [4, 4, 4]
    """

    dim: int
    sections: int | tuple[int, ...] = 1
    size: int | None = None
    balanced: bool = False

    def sizes(self, size: int) -> list[int]:
        """The sizes of the sections of a dimension of ``size``."""
        if isinstance(self.sections, tuple):
            return list(self.sections)
        return [size // self.sections] * self.sections

    def range(self, ranks: int, rank: int) -> tuple[int, int]:
        """Which entries of a dimension of ``size`` a rank holds: start and stop."""
        assert self.size is not None
        if self.balanced:
            shard = SequenceShard(self.size, ranks, rank)
            return shard.start, shard.stop
        return vocabulary_range(self.size, ranks, rank)


def check_shardable(name: str, size: int, spec: ShardSpec, ranks: int) -> None:
    """Raise ValueError where ``size`` cannot be cut as ``spec`` says."""
    sizes = spec.sizes(size)
    if sum(sizes) != size:
        if isinstance(spec.sections, tuple):
            raise ValueError(f"{name}: expected {sum(sizes)}, the sum of its sections {spec.sections}, got {size}")
        raise ValueError(f"{name}: expected a multiple of its {spec.sections} packed sections, got {size}")
    what = f"each of its {len(sizes)} sections" if len(sizes) > 1 else "its size"
    for section in dict.fromkeys(sizes):
        check_divides(name, section, ranks, what)


def local_part(full: Tensor, spec: ShardSpec, group: ProcessGroup | None) -> Tensor:
    """This rank's part of ``full``, a contiguous copy.

    Examples:
        >>> import torch
        >>> from seqpar_kernels.nn import ShardSpec, local_part
        >>> local_part(torch.randn(8, 16), ShardSpec(0), group=None).shape  # on 4 ranks: [2, 16]
        torch.Size([8, 16])
    """
    ranks, rank = group_size(group), group_rank(group)
    if ranks == 1:
        return full.detach().clone(memory_format=torch.contiguous_format)
    if spec.size is not None:
        start, stop = spec.range(ranks, rank)
        return full.detach().narrow(spec.dim, start, stop - start).clone(memory_format=torch.contiguous_format)
    sections = full.detach().split(spec.sizes(full.shape[spec.dim]), spec.dim)
    return torch.cat([section.chunk(ranks, spec.dim)[rank] for section in sections], spec.dim).contiguous()


def full_tensor(local: Tensor, spec: ShardSpec, group: ProcessGroup | None) -> Tensor:
    """The inverse of :func:`local_part`: the whole tensor on every rank (a collective call).

    Examples:
        >>> import torch
        >>> from seqpar_kernels.nn import ShardSpec, full_tensor, local_part
        >>> weight, spec = torch.randn(8, 16), ShardSpec(0)
        >>> torch.equal(full_tensor(local_part(weight, spec, group=None), spec, group=None), weight)
        True
    """
    ranks = group_size(group)
    if ranks == 1:
        return local.detach().clone()
    local = local.detach()
    if spec.size is not None and spec.balanced:
        return gather(local.contiguous(), spec.dim, spec.size, group_name(group), False)
    if spec.size is not None:
        most = -(-spec.size // ranks)
        missing = list(local.shape)
        missing[spec.dim] = most - local.shape[spec.dim]
        padded = torch.cat([local, local.new_zeros(missing)], spec.dim)
        whole = gather(padded, spec.dim, most * ranks, group_name(group), False)
        return whole.narrow(spec.dim, 0, spec.size).contiguous()
    size = local.shape[spec.dim] * ranks
    # ranks x sections x part along dim, rank-major -> section-major
    whole = gather(local.contiguous(), spec.dim, size, group_name(group), False)
    parts = [section // ranks for section in spec.sizes(size)]
    pieces = whole.split(parts * ranks, spec.dim)
    order = [rank * len(parts) + section for section in range(len(parts)) for rank in range(ranks)]
    return torch.cat([pieces[i] for i in order], spec.dim)
