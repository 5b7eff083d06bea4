"""Refuses optimizers that cannot step listed parameters, where torch would fail with an error of DTensor."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .conversion import Conversion
from .dtensor_params import ListedParameter

_checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_installed = False
_steps = 0


def steps_taken() -> int:
    """How many steps torch's optimizers have begun in this process, outside of torch.compile."""
    return _steps


def refuse_unfit_optimizers(conversion: Conversion) -> None:
    """Check every optimizer of listed parameters before its first step. A second call changes nothing."""
    global _installed
    if conversion.region.ranks > 1 and not _installed:
        _installed = True
        register_optimizer_step_pre_hook(_check)


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    if torch.compiler.is_compiling():
        return
    _steps += 1
    if optimizer in _checked:
        return
    listed = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, ListedParameter)]
    why = _why_not(optimizer, listed) if listed else None
    if why is not None:
        raise ValueError(f"optimizer: {type(optimizer).__name__} {why}")
    _checked.add(optimizer)


def _why_not(optimizer: torch.optim.Optimizer, listed: list[ListedParameter]) -> str | None:
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if "Adafactor" in kinds:
        return (
            "averages rows and columns in ways that DTensors do not support, so it cannot step a parallelized model: "
            "use AdamW, Adagrad, SGD or Muon"
        )
    if "Rprop" in kinds:
        return "writes by a mask, which DTensors do not support: use AdamW, Adagrad, SGD or Muon"
    if "LBFGS" in kinds:
        uneven = next((p for p in listed if not p.cut.even), None)
        if uneven is not None:
            spec = uneven.cut.spec
            return (
                f"puts all gradients in one vector, and torch cannot flatten a DTensor of shape {tuple(uneven.shape)} "
                f"that is cut along dimension {spec.dim if spec else 0} in packed sections or unevenly: use another "
                "optimizer, or LBFGS on the parameters that are whole"
            )
    return None
