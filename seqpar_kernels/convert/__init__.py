"""Existing models made sequence-parallel, and what became of them."""

from .explain import Explanation, explain
from .parallelize import parallelize
from .plans import BUILT_IN, STYLES, ParallelPlan
from .state import full_state_dict, gather_full_gradients

__all__ = [
    "BUILT_IN",
    "STYLES",
    "Explanation",
    "ParallelPlan",
    "explain",
    "full_state_dict",
    "gather_full_gradients",
    "parallelize",
]
