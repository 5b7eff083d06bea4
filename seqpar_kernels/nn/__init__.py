"""Modules, with the constructor arguments, parameter names and state_dict of their counterparts in torch.nn."""

from .embedding import VocabParallelEmbedding, VocabParallelHead
from .linear import ColumnParallelLinear, RowParallelLinear, SharedGather, SharedHeadsLinear
from .moe import ExpertForm, Experts, RowsByExpert
from .norm import Dropout, DropoutAddNorm, LayerNorm, RMSNorm
from .region import Region
from .sequence_attention import SequenceParallelAttention
from .sequence_cache import SequenceShardedCache
from .sharding import ShardSpec, full_tensor, local_part
from .split_norm import SplitRMSNorm
from .transformer import TransformerLayer

__all__ = [
    "ColumnParallelLinear",
    "Dropout",
    "DropoutAddNorm",
    "ExpertForm",
    "Experts",
    "LayerNorm",
    "RMSNorm",
    "Region",
    "RowParallelLinear",
    "RowsByExpert",
    "SequenceParallelAttention",
    "SequenceShardedCache",
    "ShardSpec",
    "SharedGather",
    "SharedHeadsLinear",
    "SplitRMSNorm",
    "TransformerLayer",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "full_tensor",
    "local_part",
]
