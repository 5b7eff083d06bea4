"""Modules. Where torch.nn has a twin: its constructor arguments, parameter names and state_dict."""

from .linear import ColumnParallelLinear, RowParallelLinear, SharedGather
from .norm import Dropout, DropoutAddNorm, LayerNorm, RMSNorm
from .region import Region
from .sharding import ShardSpec, full_tensor, local_part

__all__ = [
    "ColumnParallelLinear",
    "Dropout",
    "DropoutAddNorm",
    "LayerNorm",
    "RMSNorm",
    "Region",
    "RowParallelLinear",
    "ShardSpec",
    "SharedGather",
    "full_tensor",
    "local_part",
]
