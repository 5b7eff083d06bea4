"""Megatron-Core's names for the region mappings. Megatron's layout is [S, B, H], so ``seq_dim`` defaults to 0 here."""

from torch import Tensor

from . import functional as F
from .layout import Group

__all__ = [
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
]


def copy_to_tensor_model_parallel_region(input_: Tensor, group: Group) -> Tensor:
    """Identity forward, all-reduce backward."""
    return F.copy_to_tensor_parallel(input_, group)


def reduce_from_tensor_model_parallel_region(input_: Tensor, group: Group) -> Tensor:
    """All-reduce forward, identity backward."""
    return F.reduce_from_tensor_parallel(input_, group)


def scatter_to_tensor_model_parallel_region(input_: Tensor, group: Group) -> Tensor:
    """Split along the last dimension forward, all-gather backward."""
    return F.scatter_tensor_parallel(input_, group)


def gather_from_tensor_model_parallel_region(input_: Tensor, group: Group) -> Tensor:
    """All-gather along the last dimension forward, split backward."""
    return F.gather_tensor_parallel(input_, group)


def scatter_to_sequence_parallel_region(input_: Tensor, group: Group, seq_dim: int = 0) -> Tensor:
    """Split along the sequence forward, all-gather backward."""
    return F.scatter_sequence(input_, group, seq_dim)


def gather_from_sequence_parallel_region(
    input_: Tensor,
    group: Group,
    tensor_parallel_output_grad: bool = True,
    seq_dim: int = 0,
    seq_len: int | None = None,
) -> Tensor:
    """All-gather along the sequence forward; backward reduce-scatter, or split where gradients are whole."""
    return F.gather_sequence(
        input_, group, seq_dim, seq_len=seq_len, tensor_parallel_output_grad=tensor_parallel_output_grad
    )


def reduce_scatter_to_sequence_parallel_region(input_: Tensor, group: Group, seq_dim: int = 0) -> Tensor:
    """Reduce-scatter along the sequence forward, all-gather backward."""
    return F.reduce_scatter_sequence(input_, group, seq_dim)
