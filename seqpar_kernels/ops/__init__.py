"""Registered ops, ``torch.ops.seqpar.*``: what torch.compile sees. Validation happens one floor up."""

from .all_to_all import all_to_all
from .attention import dropout_attention, rotary
from .block_attention import block_attention, merge_attention
from .decode_attention import decode_attention
from .decompositions import decompositions, inductor_fusion
from .gather_linear import (
    PreparedGatherLinear,
    all_gather_linear,
    all_gather_linear_into,
    all_gather_linear_keeping,
)
from .linear_norm import linear_reduce_scatter_dropout_add_norm, linear_reduce_scatter_dropout_add_norm_into
from .linear_scatter import PreparedLinearScatter, linear_reduce_scatter, linear_reduce_scatter_into
from .main_grad import announced
from .mappings import CopyToRegion, SumGradients, all_reduce, gather, reduce_scatter, split
from .moe import MoeScalars, moe_mlp, moe_mlp_into
from .norm import NormCall, PreparedNorm, dropout_add_norm
from .projected_attention import projected_attention
from .recompute import (
    ACTIVATIONS,
    NormRecipe,
    activate,
    activation_linear_reduce_scatter,
    activation_linear_reduce_scatter_into,
    all_gather_linear_of_norm,
    all_gather_linear_of_norm_into,
)
from .sequence_attention import sequence_attention
from .vocab import linear_cross_entropy, vocab_cross_entropy, vocab_embedding

__all__ = [
    "ACTIVATIONS",
    "CopyToRegion",
    "MoeScalars",
    "NormCall",
    "NormRecipe",
    "PreparedGatherLinear",
    "PreparedLinearScatter",
    "PreparedNorm",
    "SumGradients",
    "activate",
    "activation_linear_reduce_scatter",
    "activation_linear_reduce_scatter_into",
    "all_gather_linear",
    "all_gather_linear_into",
    "all_gather_linear_keeping",
    "all_gather_linear_of_norm",
    "all_gather_linear_of_norm_into",
    "all_reduce",
    "all_to_all",
    "announced",
    "block_attention",
    "decode_attention",
    "decompositions",
    "dropout_add_norm",
    "dropout_attention",
    "gather",
    "inductor_fusion",
    "linear_cross_entropy",
    "linear_reduce_scatter",
    "linear_reduce_scatter_dropout_add_norm",
    "linear_reduce_scatter_dropout_add_norm_into",
    "linear_reduce_scatter_into",
    "merge_attention",
    "moe_mlp",
    "moe_mlp_into",
    "projected_attention",
    "reduce_scatter",
    "rotary",
    "sequence_attention",
    "split",
    "vocab_cross_entropy",
    "vocab_embedding",
]
