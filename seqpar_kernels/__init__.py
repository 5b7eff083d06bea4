"""Sequence parallelism for PyTorch as drop-in parts.

Fused dropout + residual + LayerNorm/RMSNorm on sequence shards, matmuls pipelined with their all-gather and
reduce-scatter, and ``parallelize(model, mesh)``, which turns an existing model sequence-parallel.
"""

from . import megatron, nn
from .convert import ParallelPlan, explain, full_state_dict, gather_full_gradients, parallelize
from .functional import (
    all_gather_linear,
    copy_to_tensor_parallel,
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    gather_sequence,
    gather_tensor_parallel,
    linear_reduce_scatter,
    reduce_from_tensor_parallel,
    reduce_scatter_sequence,
    scatter_sequence,
    scatter_tensor_parallel,
)
from .layout import SequenceShard
from .memory import activation_bytes
from .nn import ColumnParallelLinear, Dropout, DropoutAddNorm, LayerNorm, RMSNorm, RowParallelLinear

__version__ = "0.1.0"

__all__ = [
    "ColumnParallelLinear",
    "Dropout",
    "DropoutAddNorm",
    "LayerNorm",
    "ParallelPlan",
    "RMSNorm",
    "RowParallelLinear",
    "SequenceShard",
    "activation_bytes",
    "all_gather_linear",
    "copy_to_tensor_parallel",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "explain",
    "full_state_dict",
    "gather_full_gradients",
    "gather_sequence",
    "gather_tensor_parallel",
    "linear_reduce_scatter",
    "megatron",
    "nn",
    "parallelize",
    "reduce_from_tensor_parallel",
    "reduce_scatter_sequence",
    "scatter_sequence",
    "scatter_tensor_parallel",
]
