"""Existing models made sequence-parallel, and what became of them."""

from .conversion import conversion_of
from .explain import explain
from .explanation import Explanation, Row
from .hf.built_in_plans import BUILT_IN
from .hf.plan_from_config import derive_plan
from .parallelize import parallelize
from .plans import STYLES, ParallelPlan
from .state import (
    full_state_dict,
    gather_full_gradients,
    load_sharded_optimizer_state_dict,
    sharded_optimizer_state_dict,
    sharded_state_dict,
    unparallelize,
)
from .verify import verify
from .verify_report import Verification

__all__ = [
    "BUILT_IN",
    "STYLES",
    "Explanation",
    "ParallelPlan",
    "Row",
    "Verification",
    "conversion_of",
    "derive_plan",
    "explain",
    "full_state_dict",
    "gather_full_gradients",
    "load_sharded_optimizer_state_dict",
    "parallelize",
    "sharded_optimizer_state_dict",
    "sharded_state_dict",
    "unparallelize",
    "verify",
]
