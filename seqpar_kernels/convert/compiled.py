"""Notices, while ``torch.compile`` traces a whole model, that it is not the one that was converted or checked last.

A compiled forward is not followed. So modules, hooks and forwards have to be those that the last check has seen, or,
of an architecture that is known, those that ``parallelize`` has left. It costs nothing later: it is asked at trace
time, and what matters here makes torch.compile trace again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Where hooks and forwards come from that bring in nothing to be trained: fully_shard's, Accelerate's autocast.
_HARMLESS = ("torch.distributed.", "accelerate.")


class Seen:
    """What ``model`` consists of: modules, hooks, forwards."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._parts: dict[str, list[Any]] = {}

    def remember(self) -> None:
        """The model as it is now has been checked."""
        self._parts = _parts(self._model)

    def refuse_others(self) -> None:
        """
        Raises:
            RuntimeError: the model has changed since.
        """
        changed = self._changed()
        if changed:
            raise RuntimeError(
                f"{changed}: a module, a hook or a forward has been added or replaced since the model was checked. "
                "Call the model once before torch.compile: an eager forward checks it again"
            )

    @torch._dynamo.assume_constant_result
    def _changed(self) -> str:
        now = _parts(self._model)
        found = next((name for name, part in now.items() if part != self._parts.get(name)), None)
        return "" if found is None else found or type(self._model).__name__


def _parts(model: nn.Module) -> dict[str, list[Any]]:
    """Name -> the module, its hooks and its own forward."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # Around the whole model the sequence is whole.
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()] if name else []
        added = [*hooks, vars(module).get("forward")]
        found[name] = [module, *(part for part in added if not _harmless(part))]
    return found


def _harmless(part: Any) -> bool:
    return str(getattr(part, "__module__", "")).startswith(_HARMLESS)
