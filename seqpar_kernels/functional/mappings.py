"""Region mappings: between replicated, sequence-sharded and tensor-parallel tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import check_float, check_sequence, check_tensor
from ..comm.coordination import checked_together
from ..kernels.spec import accumulation_dtype
from ..layout import Group, normalize_dim, resolve_group, shard_of
from ..ops.registry import apply, eager, group_name
from ..ops.split_norm import SplitNorm
from .doubled import doubled_gradients


def scatter_sequence(x: Tensor, group: Group, seq_dim: int = -2) -> Tensor:
    """Each rank keeps its rows of a replicated tensor; the backward gathers.

    [..., S, ..., H] -> [..., S/t, ..., H] (Megatron: ``scatter_to_sequence_parallel_region``).

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x = torch.randn(2, 8, 16)
        >>> shard = sp.scatter_sequence(x, group=None)  # on 4 ranks: [2, 2, 16]
        >>> shard.shape
        torch.Size([2, 8, 16])
    """
    return split_dimension(x, group, seq_dim, sequence=True)


def gather_sequence(
    x: Tensor,
    group: Group,
    seq_dim: int = -2,
    *,
    seq_len: int | None = None,
    tensor_parallel_output_grad: bool = True,
) -> Tensor:
    """All rows on every rank. [..., S/t, ..., H] -> [..., S, ..., H]

    Args:
        x: this rank's shard.
        group: ProcessGroup, 1-D DeviceMesh or None.
        seq_dim: the sequence dimension.
        seq_len: the unsharded length; needed only where it is not a multiple of the number of ranks.
        tensor_parallel_output_grad: True where the code that takes the result is tensor-parallel, so that each rank has
            a part of the gradient: the backward reduce-scatters. False where every rank computes the same with the
            result and has the whole gradient: the backward splits. (Megatron's argument of the same name.) True in the
            second case makes the gradient t times too large: the first backwards on a group check this, and warn.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> shard = torch.randn(2, 8, 16)
        >>> x = sp.gather_sequence(shard, group=None)  # on 4 ranks: [2, 32, 16]
        >>> torch.equal(sp.scatter_sequence(x, group=None), shard)
        True
    """
    return gather_dimension(x, group, seq_dim, seq_len, tensor_parallel_output_grad, sequence=True)


def reduce_scatter_sequence(x: Tensor, group: Group, seq_dim: int = -2) -> Tensor:
    """Sum over ranks, each keeps its rows; the backward gathers. [..., S, ..., H] -> [..., S/t, ..., H]

    The sum is taken in rank order in fp32 (fp64 for fp64).

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> partial_sums = torch.randn(2, 8, 16)
        >>> sp.reduce_scatter_sequence(partial_sums, group=None).shape  # on 4 ranks: [2, 2, 16]
        torch.Size([2, 8, 16])
    """
    return reduce_scatter_dimension(x, group, seq_dim, sequence=True)


def scatter_tensor_parallel(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Each rank keeps its part of dimension ``dim`` of a replicated tensor; the backward gathers.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x = torch.randn(2, 8, 16)
        >>> sp.scatter_tensor_parallel(x, group=None).shape  # on 4 ranks: [2, 8, 4]
        torch.Size([2, 8, 16])
    """
    return split_dimension(x, group, dim)


def gather_tensor_parallel(x: Tensor, group: Group, dim: int = -1, *, size: int | None = None) -> Tensor:
    """All parts of dimension ``dim`` on every rank; the backward splits (every rank has the whole gradient).

    ``size`` is the full size of ``dim``; needed only where it is not a multiple of the number of ranks.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> features = torch.randn(2, 8, 16)
        >>> sp.gather_tensor_parallel(features, group=None).shape  # on 4 ranks: [2, 8, 64]
        torch.Size([2, 8, 16])
    """
    return gather_dimension(x, group, dim, size, False)


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Identity; the backward sums over ranks. For a replicated tensor that enters tensor-parallel computation.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, weight = torch.randn(8, 16), torch.randn(4, 16)  # the same x and another weight on every rank
        >>> features = sp.copy_to_tensor_parallel(x, group=None) @ weight.t()
        >>> features.shape
        torch.Size([8, 4])
    """
    pg, _ = _checked(x, group, None, step=False)
    if pg is None:
        return x
    out: Tensor = ops.CopyToRegion.apply(x, group_name(pg))
    if not torch.compiler.is_compiling():
        setattr(out, "_seqpar_copied", True)  # noqa: B010 - for the check of a converted model's first forward
    return out


def split_rms_norm(
    x: Tensor, weight: Tensor | None, features: int, eps: float | None, zero_centered: bool, group: Group
) -> Tensor:
    """RMSNorm of [..., S, N/t] over N = ``features`` on all ranks; for :class:`seqpar_kernels.nn.SplitRMSNorm`."""
    pg, _ = _checked(x, group, None)
    eps = torch.finfo(accumulation_dtype(x.dtype)).eps if eps is None else eps
    y: Tensor = apply(SplitNorm, x, weight, features, eps, zero_centered, group_name(pg))
    return y


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks, in rank order in fp32, the same bits on every rank; the backward is the identity.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> features, weight = torch.randn(8, 4), torch.randn(16, 4)  # this rank's part of both
        >>> sp.reduce_from_tensor_parallel(features @ weight.t(), group=None).shape
        torch.Size([8, 16])
    """
    pg, _ = _checked(x, group, None)
    return x if pg is None else ops.all_reduce(x, group_name(pg))


def _checked(
    x: Tensor, group: Group, dim: int | None, *, sequence: bool = False, step: bool = True
) -> tuple[ProcessGroup | None, int]:
    """The group, and ``dim`` as a non-negative index; an error reaches every rank."""
    pg = resolve_group(group)
    with checked_together(pg, step=step):
        check_tensor("x", x)
        check_float("x", x)
        if dim is None:
            return pg, 0
        return pg, check_sequence("x", x, dim) if sequence else normalize_dim("dim", dim, x.dim())


def split_dimension(x: Tensor, group: Group, dim: int, *, sequence: bool = False) -> Tensor:
    """This rank's part of a replicated tensor; ``sequence``: ``dim`` must not be the last dimension."""
    pg, dim = _checked(x, group, dim, sequence=sequence, step=False)
    return x if pg is None else ops.split(x, dim, group_name(pg))


def gather_dimension(
    x: Tensor, group: Group, dim: int, size: int | None, partial_grad: bool, *, sequence: bool = False
) -> Tensor:
    """The parts of all ranks; ``partial_grad``: the backward sums the gradients of all ranks."""
    pg, dim = _checked(x, group, dim, sequence=sequence)
    if pg is None:
        return x
    with checked_together(pg):
        shard = shard_of("x", x.shape[dim], pg, size)
    looked_at = doubled_gradients(pg) if partial_grad and x.requires_grad and eager() else None
    if looked_at is None:
        return ops.gather(x, dim, shard.length, group_name(pg), partial_grad)
    return looked_at.watched(x, lambda t: ops.gather(t, dim, shard.length, group_name(pg), True), dim, shard)


def reduce_scatter_dimension(x: Tensor, group: Group, dim: int, *, sequence: bool = False) -> Tensor:
    """This rank's part of the sum over ranks."""
    pg, dim = _checked(x, group, dim, sequence=sequence)
    return x if pg is None else ops.reduce_scatter(x, dim, group_name(pg))
