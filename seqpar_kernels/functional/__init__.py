"""The public functions: all validation, then one op call."""

from .linear import all_gather_linear, linear_reduce_scatter, planned_all_gather_linear, planned_linear_reduce_scatter
from .mappings import (
    copy_to_tensor_parallel,
    gather_sequence,
    gather_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_sequence,
    scatter_sequence,
    scatter_tensor_parallel,
)
from .norm import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm, replicated, run_norm

__all__ = [
    "all_gather_linear",
    "copy_to_tensor_parallel",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "gather_sequence",
    "gather_tensor_parallel",
    "linear_reduce_scatter",
    "planned_all_gather_linear",
    "planned_linear_reduce_scatter",
    "reduce_from_tensor_parallel",
    "reduce_scatter_sequence",
    "replicated",
    "run_norm",
    "scatter_sequence",
    "scatter_tensor_parallel",
]
