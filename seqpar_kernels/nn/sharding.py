"""How a parameter is cut over ranks, and putting it together again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..checks import check_divides
from ..layout import group_rank, group_size
from ..ops import gather
from ..ops.library import group_name


class ShardSpec(NamedTuple):
    """Dimension ``dim`` is cut into ``sections`` equal sections (q|k|v of a packed projection), each over all ranks."""

    dim: int
    sections: int = 1


def check_shardable(name: str, size: int, spec: ShardSpec, ranks: int) -> None:
    """Raises ValueError where ``size`` cannot be cut as ``spec`` says."""
    if size % spec.sections:
        raise ValueError(f"{name}: expected a multiple of its {spec.sections} packed sections, got {size}")
    what = f"each of its {spec.sections} sections" if spec.sections > 1 else "its size"
    check_divides(name, size // spec.sections, ranks, what)


def local_part(full: Tensor, spec: ShardSpec, group: ProcessGroup | None) -> Tensor:
    """This rank's part of ``full``, a contiguous copy."""
    ranks, rank = group_size(group), group_rank(group)
    if ranks == 1:
        return full.detach().clone(memory_format=torch.contiguous_format)
    parts = [section.chunk(ranks, spec.dim)[rank] for section in full.detach().chunk(spec.sections, spec.dim)]
    return torch.cat(parts, spec.dim).contiguous()


def full_tensor(local: Tensor, spec: ShardSpec, group: ProcessGroup | None) -> Tensor:
    """The inverse of :func:`local_part`: the whole tensor on every rank (a collective call)."""
    ranks = group_size(group)
    if ranks == 1:
        return local.detach().clone()
    # [ranks * sections * part] along dim, rank-major -> section-major
    whole = gather(local.detach().contiguous(), spec.dim, local.shape[spec.dim] * ranks, group_name(group), False)
    pieces = whole.chunk(ranks * spec.sections, spec.dim)
    order = [rank * spec.sections + section for section in range(spec.sections) for rank in range(ranks)]
    return torch.cat([pieces[i] for i in order], spec.dim)
