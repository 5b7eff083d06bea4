"""Calls like ones that have been checked and planned before: what depends on sizes and options alone is looked up.

What is kept is the call itself, made ready. This is the one place where the linears ask whether PyTorch runs eagerly:
nothing is looked up under torch.compile, autocast, a dispatch mode, a functorch transform or forward-mode AD.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import Remembered
from ..layout import Group, resolve_group
from ..ops.registry import eager
from ..overlap import engines
from ..overlap.planner import max_workspace_bytes
from ..overlap.tuning import planned_calls

Key = tuple[Any, ...]

#: Without a group.
_known_alone: Remembered[Key, Any] = Remembered()


def _known_on(group: Group) -> Remembered[Key, Any]:
    if group is None:
        return _known_alone
    if type(group) is not ProcessGroup:
        group = resolve_group(group)
    return _known_alone if group is None else planned_calls(group)


def known_call(
    name: str, group: Group, numbers: tuple[object, ...], options: tuple[object, ...], *operands: object
) -> tuple[Key | None, Any]:
    """What such a call of the function ``name`` is remembered under, and the call, None where it has not been met.

    The key is None where nothing may be looked up. ``numbers`` are ints or None, operands tensors, None or sequences of
    such: whatever else there is among them, or of a kind that cannot be compared, is for the checks to refuse.
    """
    if not eager() or torch._C._is_any_autocast_enabled():
        return None, None
    try:
        for number in numbers:
            if type(number) is not int and number is not None:  # True is equal to 1
                return None, None
        parts: list[Any] = [name, max_workspace_bytes(), numbers, options]
        for operand in operands:
            if operand is None:
                parts.append(None)
            elif isinstance(operand, Tensor):
                parts.append((type(operand), operand.shape, operand.dtype, operand.device, operand.requires_grad))
            else:
                several: Any = operand
                parts.append(len(several))
                for t in several:
                    parts.append(None if t is None else (type(t), t.shape, t.dtype, t.device, t.requires_grad))
        key = tuple(parts)
        known = planned_calls(group) if type(group) is ProcessGroup else _known_on(group)
        return key, known.get(key)
    except (AttributeError, TypeError):
        return None, None


def remember(group: Group, key: Key | None, call: Any) -> None:
    """Keep a call that has been checked and planned; but whether some engines can run may change from call to call."""
    if key is not None and engines.named(call.plan.engine).everywhere:
        _known_on(group)[key] = call
