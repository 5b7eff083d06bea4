"""Megatron-Core's names for the region mappings, with Megatron's arguments in Megatron's order.

Tensors are [S, B, H] as in Megatron: the sequence is dimension 0. ``group=None`` is the default tensor-parallel group,
as in Megatron: the one of :func:`set_default_group`, else that of an initialised ``megatron.core.parallel_state``, else
an error; it never means one rank. Unlike in Megatron, lengths need not be a multiple of the ranks, and sums over ranks
run in rank order in float32. Integer tensors are communicated without gradient. ``use_global_buffer=True`` is accepted
and has no effect: every result has memory of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .functional import exchange as F
from .layout import Group, group_size, resolve_group

__all__ = [
    "all_gather_last_dim_from_tensor_parallel_region",
    "all_to_all",
    "all_to_all_hp2sp",
    "all_to_all_sp2hp",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_default_group",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_last_dim_to_tensor_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
    "set_default_group",
]

_default: Group = None

# Other names of megatron.core.tensor_parallel -> what to use here. Their arguments differ, so they are no aliases.
_ELSEWHERE = {
    "ColumnParallelLinear": "seqpar_kernels.nn.ColumnParallelLinear",
    "RowParallelLinear": "seqpar_kernels.nn.RowParallelLinear",
    "VocabParallelEmbedding": "seqpar_kernels.nn.VocabParallelEmbedding",
    "vocab_parallel_cross_entropy": "seqpar_kernels.vocab_parallel_cross_entropy",
    "linear_with_grad_accumulation_and_async_allreduce": "seqpar_kernels.all_gather_linear with main_grad",
    "linear_with_frozen_weight": "seqpar_kernels.all_gather_linear with a weight that requires no gradient",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise AttributeError(
            f"seqpar_kernels.megatron has only the mappings; for {name} use {_ELSEWHERE[name]}, whose arguments differ"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def set_default_group(group: Group) -> None:
    """Set the group that ``group=None`` means in this module: a ProcessGroup or 1-D DeviceMesh; None unsets it.

    Raises:
        ValueError: no group.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> megatron.set_default_group(group.WORLD)
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.gather_from_sequence_parallel_region(x).shape  # on 4 ranks: [32, 2, 16]
        torch.Size([8, 2, 16])
        >>> megatron.set_default_group(None)
    """
    global _default
    resolve_group(group)
    _default = group


def get_default_group() -> ProcessGroup | DeviceMesh:
    """The group that ``group=None`` means.

    Raises:
        RuntimeError: there is no default group.

    Examples:
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> megatron.set_default_group(group.WORLD)
        >>> megatron.get_default_group() is group.WORLD
        True
        >>> megatron.set_default_group(None)
    """
    if _default is not None and dist.is_initialized():
        return _default
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and dist.is_initialized():
        found = state.get_tensor_model_parallel_group(check_initialized=False)
        if found is not None:
            return found
    raise RuntimeError(
        "group: None is the default tensor-parallel group, and there is none; pass group=, or call "
        "seqpar_kernels.megatron.set_default_group(group) after torch.distributed.init_process_group"
    )


def _meant(group: Group) -> Group:
    return get_default_group() if group is None else group


def copy_to_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """Identity forward, all-reduce backward.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.copy_to_tensor_model_parallel_region(x, group.WORLD).shape
        torch.Size([8, 2, 16])
    """
    return F.copy_to(input_, _meant(group))


def reduce_from_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """All-reduce forward, identity backward.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.reduce_from_tensor_model_parallel_region(x, group.WORLD).shape
        torch.Size([8, 2, 16])
    """
    return F.reduce_from(input_, _meant(group))


def scatter_to_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """Split along the last dimension forward, all-gather backward.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.scatter_to_tensor_model_parallel_region(x, group.WORLD).shape  # on 4 ranks: [8, 2, 4]
        torch.Size([8, 2, 16])
    """
    return F.split(input_, _meant(group), -1)


def gather_from_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """All-gather along the last dimension forward, split backward.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.gather_from_tensor_model_parallel_region(x, group.WORLD).shape  # on 4 ranks: [8, 2, 64]
        torch.Size([8, 2, 16])
    """
    return F.gather(input_, _meant(group), -1, partial_grad=False)


def scatter_to_sequence_parallel_region(input_: Tensor, group: Group = None, *, seq_dim: int = 0) -> Tensor:
    """Split along the sequence forward, all-gather backward.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.scatter_to_sequence_parallel_region(x, group.WORLD).shape  # on 4 ranks: [2, 2, 16]
        torch.Size([8, 2, 16])
    """
    return F.split(input_, _meant(group), seq_dim)


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    group: Group = None,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
    *,
    seq_dim: int = 0,
    seq_len: int | None = None,
) -> Tensor:
    """All-gather along the sequence forward; backward reduce-scatter, or split where gradients are whole.

    Args:
        input_: this rank's rows.
        tensor_parallel_output_grad: see :func:`seqpar_kernels.gather_sequence`. A group in its place is taken for
            ``group``.
        group: None is the default group.
        output_split_sizes: the rows of each rank, where they are not cut as ``torch.tensor_split`` cuts.
        use_global_buffer: no effect.
        seq_dim, seq_len: the sequence dimension and its unsharded length; Megatron has neither argument.

    Raises:
        ValueError: an argument that does not fit, by name.
        RuntimeError: no default group; ranks that disagree.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.gather_from_sequence_parallel_region(x, group.WORLD).shape  # on 4 ranks: [32, 2, 16]
        torch.Size([8, 2, 16])
    """
    if isinstance(tensor_parallel_output_grad, (ProcessGroup, DeviceMesh)):
        if group is not None:
            raise ValueError("tensor_parallel_output_grad: expected a bool, got a group, and another one as group")
        tensor_parallel_output_grad, group = True, tensor_parallel_output_grad
    if not isinstance(tensor_parallel_output_grad, bool):
        raise ValueError(f"tensor_parallel_output_grad: expected a bool, got {tensor_parallel_output_grad!r}")
    group = _meant(group)
    if output_split_sizes is None:
        return F.gather(input_, group, seq_dim, partial_grad=tensor_parallel_output_grad, size=seq_len)
    return F.gather_sizes(input_, group, seq_dim, output_split_sizes, partial_grad=tensor_parallel_output_grad)


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor,
    group: Group = None,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
    *,
    seq_dim: int = 0,
) -> Tensor:
    """Reduce-scatter along the sequence forward, all-gather backward.

    ``input_split_sizes``: the rows that each rank gets, where they are not cut as ``torch.tensor_split`` cuts.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.reduce_scatter_to_sequence_parallel_region(x, group.WORLD).shape  # on 4 ranks: [2, 2, 16]
        torch.Size([8, 2, 16])
    """
    group = _meant(group)
    if input_split_sizes is None:
        return F.reduce_scatter(input_, group, seq_dim)
    return F.reduce_scatter_sizes(input_, group, seq_dim, input_split_sizes)


def all_gather_last_dim_from_tensor_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """All-gather along the last dimension forward, reduce-scatter backward.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.all_gather_last_dim_from_tensor_parallel_region(x, group.WORLD).shape  # on 4 ranks: [8, 2, 64]
        torch.Size([8, 2, 16])
    """
    return F.gather(input_, _meant(group), -1, partial_grad=True)


def reduce_scatter_last_dim_to_tensor_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """Reduce-scatter along the last dimension forward, all-gather backward.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 2, 16)
        >>> megatron.reduce_scatter_last_dim_to_tensor_parallel_region(x, group.WORLD).shape  # on 4 ranks: [8, 2, 4]
        torch.Size([8, 2, 16])
    """
    return F.reduce_scatter(input_, _meant(group), -1)


def all_to_all(
    group: Group,
    input_: Tensor,
    output_split_sizes_: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Send rows of dimension 0 to every rank; the backward sends the gradients back.

    Args:
        group: a group; there is no default, as in Megatron.
        input_: [rows, ...].
        output_split_sizes_: the number of rows from each rank; None: the same from each.
        input_split_sizes: the number of rows to each rank; None: the same to each.

    Raises:
        ValueError: an argument that does not fit, by name.
        RuntimeError: sizes of different ranks that do not fit together; on every rank, before any row is sent.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 16)
        >>> megatron.all_to_all(group.WORLD, x).shape  # 2 rows to each of 4 ranks, 2 from each
        torch.Size([8, 16])
    """
    if group is None:
        raise ValueError(
            "group: expected a ProcessGroup or a 1-D DeviceMesh, got None; all_to_all has no default group"
        )
    return F.all_to_all(input_, group, output_split_sizes_, input_split_sizes)


def all_to_all_sp2hp(input_: Tensor, group: Group = None) -> Tensor:
    """From this rank's tokens with all features, [tokens / t, H], to all tokens with its features, [tokens, H / t].

    Leading dimensions are flattened.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 16)
        >>> megatron.all_to_all_sp2hp(x, group.WORLD).shape  # on 4 ranks: [32, 4]
        torch.Size([8, 16])
    """
    group = _meant(group)
    ranks = group_size(resolve_group(group))
    F.check_divides_by("input_", input_, -1, ranks)
    rows = input_.reshape(-1, input_.shape[-1])
    return F.all_to_all(rows.unflatten(-1, (ranks, -1)).transpose(0, 1).flatten(0, 1), group, None, None)


def all_to_all_hp2sp(input_: Tensor, group: Group = None) -> Tensor:
    """From all tokens with this rank's features, [tokens, H / t], to its tokens with all features, [tokens / t, H].

    Leading dimensions are flattened.

    Examples:
        >>> import torch
        >>> from torch.distributed import group
        >>> from seqpar_kernels import megatron
        >>> x = torch.randn(8, 16)
        >>> megatron.all_to_all_hp2sp(x, group.WORLD).shape  # on 4 ranks: [2, 64]
        torch.Size([8, 16])
    """
    group = _meant(group)
    ranks = group_size(resolve_group(group))
    F.check_divides_by("input_", input_, -1, 1)
    rows = input_.reshape(-1, input_.shape[-1])
    F.check_divides_by("input_", rows, 0, ranks)
    return F.all_to_all(rows, group, None, None).unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1)
