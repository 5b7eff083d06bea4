"""Calls like ones that have been checked and planned before: what depends on sizes and options alone is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import Remembered, per_group
from ..overlap import engines
from ..overlap.machine_profile import Figures
from ..overlap.planner import Plan, max_workspace_bytes

_Known = tuple[Plan, tuple[Any, ...]]


@per_group
def _known_of(group: ProcessGroup) -> Remembered[tuple[Any, ...], _Known]:
    return Remembered()


#: Without a group.
_known_alone: Remembered[tuple[Any, ...], _Known] = Remembered()


class Met:
    """One kind of call on one group, or on none: its plan and place, if it has been met before."""

    __slots__ = ("_all", "_key", "known")

    def __init__(self, group: ProcessGroup | None, key: tuple[Any, ...]):
        self._all, self._key = _known_alone if group is None else _known_of(group), key
        self.known = self._all.get(key)

    @staticmethod
    def before(
        group: ProcessGroup | None, figures: Mapping[str, Figures] | None, options: tuple[Any, ...], *operands: object
    ) -> Met | None:
        """None where nothing can be looked up: under torch.compile or autocast.

        Operands are tensors, None or sequences of such; whatever else there is among them, or of a kind that cannot be
        compared, is for the checks to refuse.
        """
        if torch.compiler.is_compiling():
            return None
        try:
            # The type too: True is equal to 1.
            key: list[Any] = [max_workspace_bytes(), *options, *map(type, options)]
            for operand in operands:
                several: Any = (operand,)
                if operand is not None and not isinstance(operand, Tensor):
                    several = operand
                    key.append(len(several))
                for one in several:
                    key += (None,) if one is None else (type(one), one.shape, one.dtype, one.device, one.requires_grad)
            device: torch.device = operands[0].device  # type: ignore[attr-defined]
            if torch.is_autocast_enabled(device.type):
                return None
            if figures is not None:
                key.append(figures["cpu" if device.type == "cpu" else "cuda"])
            return Met(group, tuple(key))
        except (AttributeError, TypeError):
            return None

    def remember(self, settled: Plan, where: tuple[Any, ...]) -> None:
        """The call has been checked and planned. Whether the other engines can run may change from call to call."""
        if engines.named(settled.engine).everywhere:
            self._all[self._key] = (settled, where)
