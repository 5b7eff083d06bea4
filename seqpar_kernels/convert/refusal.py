"""SEQPAR_STRICT for whole models: their first forward ends in an error where something runs unfused."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..strict import refuse
from .explain import explain


def refuse_unfused(model: nn.Module) -> None:
    """Let the first forward of ``model`` in each mode raise a RuntimeError with all that is slower than need be."""
    seen: set[bool] = set()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if module.training in seen:
            return
        seen.add(module.training)
        slower = [row for row in explain(module).rows if row.slower]
        if slower:
            listing = "".join(f"\n  {row.module} ({row.style}): {row.why}" for row in slower)
            refuse(f"{type(module).__name__} has {len(slower)} modules that run unfused", listing)

    model.register_forward_hook(after)
