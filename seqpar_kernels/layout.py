"""Groups, and the rows of the unsharded sequence that a rank holds."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

#: What the public functions take as ``group``.
Group = ProcessGroup | DeviceMesh | None

if TYPE_CHECKING:  # not in every version of PyTorch
    from torch.distributed.distributed_c10d import GroupName


class WrongTypeError(TypeError, ValueError):
    """An argument of a wrong type: a TypeError, and a ValueError as all errors about arguments of this package."""


class SequenceShard(NamedTuple):
    """Rows ``start..stop`` of a sequence of ``length`` rows, split over ``ranks`` like ``torch.tensor_split``.

    The first ``length % ranks`` ranks hold one row more than the others.

    Examples:
        >>> import seqpar_kernels as sp
        >>> shard = sp.SequenceShard(length=10, ranks=4, rank=1)
        >>> shard.start, shard.stop, shard.size
        (3, 6, 3)
    """

    length: int
    ranks: int
    rank: int

    def of(self, rank: int) -> SequenceShard:
        """The shard of another rank of the same group."""
        return SequenceShard(self.length, self.ranks, rank)

    @property
    def start(self) -> int:
        return split_point(self.length, self.ranks, self.rank)

    @property
    def stop(self) -> int:
        return split_point(self.length, self.ranks, self.rank + 1)

    @property
    def size(self) -> int:
        return self.stop - self.start


def split_point(length: int, parts: int, index: int) -> int:
    """Where part ``index`` of ``tensor_split(length, parts)`` begins."""
    return index * (length // parts) + min(index, length % parts)


def vocabulary_range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Rows ``start..stop`` of a vocabulary of ``size`` entries that ``rank`` holds.

    Cut as ``torch.chunk`` and DTensor's ``Shard`` cut: ceil(size / ranks) rows each, the last ranks fewer or none.
    """
    most = -(-size // ranks)
    return min(rank * most, size), min((rank + 1) * most, size)


#: Variables that say how many processes were started together -> who sets them.
LAUNCHERS = {
    "WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}


def check_launched(group: Group) -> None:
    """Refuse None where a launcher has started several ranks and no process group has been initialised.

    ``torch.distributed.group.WORLD`` is None until then.

    Raises:
        RuntimeError: a variable of LAUNCHERS is more than 1, and torch.distributed is not initialised.
    """
    if group is not None or dist.is_initialized():
        return
    for variable, launcher in LAUNCHERS.items():
        launched = os.environ.get(variable, "1")
        if launched.isdecimal() and int(launched) > 1:
            raise RuntimeError(
                f"group: expected one, got None in one of {launched} processes ({variable}, set by {launcher}) before "
                "torch.distributed.init_process_group, so that each would train a whole model on its own; "
                "torch.distributed.group.WORLD is None until then. Call init_process_group first and pass the group or "
                f"mesh. For the same kernels without communication pass None afterwards, or unset {variable}"
            )


def resolve_group(group: Group) -> ProcessGroup | None:
    """``group`` as a ProcessGroup; None for None and for a group of one rank.

    Raises:
        ValueError: a mesh with more than one dimension, a group without this process, or no group (also a TypeError).
    """
    if group is None:
        return None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a 1-D DeviceMesh, got one of {group.ndim} dimensions {group.mesh_dim_names}; "
                f"pass the tensor-parallel dimension, e.g. mesh['tp']"
            )
        if group.get_coordinate() is None:
            raise ValueError("group: this process is not a member of the mesh")
        group = group.get_group()
    if type(group) is int and group == dist.GroupMember.NON_GROUP_MEMBER:  # new_group returns this to other ranks
        raise ValueError("group: this process is not a member of the group")
    if not isinstance(group, ProcessGroup):
        raise WrongTypeError(
            f"group: expected a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__} "
            f"{group!r}; {_group_meant(group)}"
        )
    return group if group.size() > 1 else None


def _group_meant(group: object) -> str:
    """What to pass in place of ``group``, which is no group."""
    if isinstance(group, str):
        return f"pass that dimension of the mesh, mesh[{group!r}]"
    if isinstance(group, (list, tuple, set, range)):
        return "make a group of these ranks once, on every rank: torch.distributed.new_group(ranks)"
    return "pass torch.distributed.group.WORLD for all ranks, or a dimension of the mesh, e.g. mesh['tp']"


def group_size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def normalize_dim(name: str, dim: int, ndim: int) -> int:
    """``dim`` as a non-negative index into ``ndim`` dimensions."""
    if not -ndim <= dim < ndim:
        raise ValueError(f"{name}: expected an index into {ndim} dimensions, got {dim}")
    return dim % ndim


def check_shard(name: str, local: int, ranks: int, rank: int, seq_len: int | None) -> SequenceShard:
    """The shard of ``rank`` for a tensor that has ``local`` rows there.

    Raises:
        ValueError: ``local`` is not this rank's share of ``seq_len``.
    """
    shard = SequenceShard(local * ranks if seq_len is None else seq_len, ranks, rank)
    if shard.size != local:
        raise ValueError(
            f"{name}: rank {rank} of {ranks} holds {local} rows, but its shard of seq_len={shard.length} has "
            f"{shard.size} (rows {shard.start}..{shard.stop}, split as torch.tensor_split does)"
        )
    return shard


def shard_of(name: str, local: int, group: ProcessGroup | None, seq_len: int | None) -> SequenceShard:
    """:func:`check_shard` for this process in ``group``."""
    return check_shard(name, local, group_size(group), group_rank(group), seq_len)


def process_group(name: str) -> ProcessGroup:
    """The group registered under ``name``."""
    return _resolve_process_group(cast("GroupName", name))


def row_map(shape: torch.Size, seq_dim: int, shard: SequenceShard) -> tuple[int, int, int]:
    """(block, stride, offset) of ``csrc/seqpar.h``'s RowMap for a shard of ``shape`` [..., S/t, ..., H].

    Rows are counted in memory order of the unsharded tensor: [B, S, H] gives b * S + s, [S, B, H] gives s * B + b.
    ``seq_dim`` is non-negative. A tensor sharded over its rows only has one block.
    """
    inner = math.prod(shape[seq_dim + 1 : -1])
    return shard.size * inner, shard.length * inner, shard.start * inner
