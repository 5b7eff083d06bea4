"""The public functions: all validation, then one op call."""

from ..ops import NormRecipe
from .attention import causal_attention
from .decode_attention import decode_attention
from .linear import (
    all_gather_linear,
    checked_all_gather_linear,
    checked_linear_reduce_scatter,
    linear_reduce_scatter,
)
from .linear_norm import (
    checked_linear_norm,
    linear_reduce_scatter_dropout_add_norm,
)
from .mappings import (
    copy_to_tensor_parallel,
    gather_sequence,
    gather_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_sequence,
    scatter_sequence,
    scatter_tensor_parallel,
)
from .merge_attention import merge_attention
from .moe import moe_mlp
from .moe_dispatch import DispatchedTokens, moe_combine, moe_dispatch
from .moe_loss import load_balancing_loss, router_z_loss
from .norm import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm
from .norm_call import NormOptions, NormTensors, replicated, run_norm
from .packing import degree_groups, pack_documents, packed_attention
from .projected_attention import self_attention_choice, sequence_parallel_self_attention
from .sequence_attention import attention_choice, sequence_parallel_attention
from .sequence_layout import next_token_labels, sequence_positions, shard_sequence, unshard_sequence
from .vocab import vocab_parallel_embedding
from .vocab_loss import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

__all__ = [
    "DispatchedTokens",
    "NormOptions",
    "NormRecipe",
    "NormTensors",
    "all_gather_linear",
    "attention_choice",
    "causal_attention",
    "checked_all_gather_linear",
    "checked_linear_norm",
    "checked_linear_reduce_scatter",
    "copy_to_tensor_parallel",
    "decode_attention",
    "degree_groups",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "gather_sequence",
    "gather_tensor_parallel",
    "linear_reduce_scatter",
    "linear_reduce_scatter_dropout_add_norm",
    "load_balancing_loss",
    "merge_attention",
    "moe_combine",
    "moe_dispatch",
    "moe_mlp",
    "next_token_labels",
    "pack_documents",
    "packed_attention",
    "reduce_from_tensor_parallel",
    "reduce_scatter_sequence",
    "replicated",
    "router_z_loss",
    "run_norm",
    "scatter_sequence",
    "scatter_tensor_parallel",
    "self_attention_choice",
    "sequence_parallel_attention",
    "sequence_parallel_self_attention",
    "sequence_positions",
    "shard_sequence",
    "unshard_sequence",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "vocab_parallel_linear_cross_entropy",
]
