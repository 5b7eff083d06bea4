"""Sequence parallelism for PyTorch as drop-in parts.

Fused dropout + residual + LayerNorm/RMSNorm on sequence shards, matmuls pipelined with their all-gather and
reduce-scatter, and ``parallelize(model, mesh)``, which turns an existing model sequence-parallel.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import (
        ParallelPlan,
        Verification,
        full_state_dict,
        gather_full_gradients,
        load_sharded_optimizer_state_dict,
        sharded_optimizer_state_dict,
        sharded_state_dict,
        unparallelize,
    )
    from .convert.explain import explain
    from .convert.parallelize import parallelize
    from .convert.verify import verify

from . import megatron, nn
from .functional import (
    DispatchedTokens,
    all_gather_linear,
    copy_to_tensor_parallel,
    decode_attention,
    degree_groups,
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    gather_sequence,
    gather_tensor_parallel,
    linear_reduce_scatter,
    linear_reduce_scatter_dropout_add_norm,
    load_balancing_loss,
    merge_attention,
    moe_combine,
    moe_dispatch,
    moe_mlp,
    next_token_labels,
    pack_documents,
    packed_attention,
    reduce_from_tensor_parallel,
    reduce_scatter_sequence,
    router_z_loss,
    scatter_sequence,
    scatter_tensor_parallel,
    sequence_parallel_attention,
    sequence_parallel_self_attention,
    sequence_positions,
    shard_sequence,
    unshard_sequence,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    vocab_parallel_linear_cross_entropy,
)
from .layout import SequenceShard
from .memory import activation_bytes
from .nn import (
    ColumnParallelLinear,
    Dropout,
    DropoutAddNorm,
    Experts,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    SequenceParallelAttention,
    SequenceShardedCache,
    TransformerLayer,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from .ops import inductor_fusion
from .overlap.planner import set_max_workspace_bytes
from .overlap.tuning import tune
from .packing import PackingPlan

__version__ = "0.1.0"

__all__ = [
    "ColumnParallelLinear",
    "DispatchedTokens",
    "Dropout",
    "DropoutAddNorm",
    "Experts",
    "LayerNorm",
    "PackingPlan",
    "ParallelPlan",
    "RMSNorm",
    "RowParallelLinear",
    "SequenceParallelAttention",
    "SequenceShard",
    "SequenceShardedCache",
    "TransformerLayer",
    "Verification",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "activation_bytes",
    "all_gather_linear",
    "copy_to_tensor_parallel",
    "decode_attention",
    "degree_groups",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "explain",
    "full_state_dict",
    "gather_full_gradients",
    "gather_sequence",
    "gather_tensor_parallel",
    "inductor_fusion",
    "linear_reduce_scatter",
    "linear_reduce_scatter_dropout_add_norm",
    "load_balancing_loss",
    "load_sharded_optimizer_state_dict",
    "megatron",
    "merge_attention",
    "moe_combine",
    "moe_dispatch",
    "moe_mlp",
    "next_token_labels",
    "nn",
    "pack_documents",
    "packed_attention",
    "parallelize",
    "reduce_from_tensor_parallel",
    "reduce_scatter_sequence",
    "router_z_loss",
    "scatter_sequence",
    "scatter_tensor_parallel",
    "sequence_parallel_attention",
    "sequence_parallel_self_attention",
    "sequence_positions",
    "set_max_workspace_bytes",
    "shard_sequence",
    "sharded_optimizer_state_dict",
    "sharded_state_dict",
    "tune",
    "unparallelize",
    "unshard_sequence",
    "verify",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "vocab_parallel_linear_cross_entropy",
]


def __getattr__(name: str) -> Any:
    """Names of the conversion, imported where they are first used: it needs DTensor, which is slow to import."""
    if name == "convert":
        return importlib.import_module(".convert", __name__)
    if name not in __all__:  # all other names of it are there already
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(".convert", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "convert"})
