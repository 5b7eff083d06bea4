"""Registered ops, ``torch.ops.seqpar.*``: what torch.compile sees. Validation happens one floor up."""

from .linear import all_gather_linear, linear_reduce_scatter
from .mappings import CopyToRegion, SumGradients, all_reduce, gather, reduce_scatter, split
from .norm import dropout_add_norm

__all__ = [
    "CopyToRegion",
    "SumGradients",
    "all_gather_linear",
    "all_reduce",
    "dropout_add_norm",
    "gather",
    "linear_reduce_scatter",
    "reduce_scatter",
    "split",
]
