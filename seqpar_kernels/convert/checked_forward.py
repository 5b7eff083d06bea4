"""Begins the check of a forward where one is due, and ends it after success or an error."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..comm.coordination import coordination_of
from .changes import Watch
from .conversion import Conversion
from .foreign import trained_arguments
from .plans import counted
from .rules import Rules
from .shard_check import ShardCheck
from .structure import Structure
from .verify_offer import offer_verify


class CheckedForward:
    """Begins and ends the checks of the model of ``conversion``, which has a group."""

    def __init__(self, conversion: Conversion):
        model = conversion.model
        self._conversion, self._model, self._region = conversion, model, conversion.region
        self._key: Any = None  # tells this forward from others
        self.ends = conversion.edges_at("scatter_input", "gather_output")
        self.structure = conversion.structure = Structure(model, conversion.harmless_hooks)
        self.watch = conversion.watch = Watch(model, conversion.owned, self.structure, *self.ends)

    def start(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Begin a forward of ``module``; check it if none like it has been checked."""
        conversion, model, watch = self._conversion, self._model, self.watch
        watch.begin(model.training)
        self._key = id(module), model.training, *trained_arguments(args, kwargs)
        if watch.unchecked(self._key):
            for refuse in conversion.before_check:
                refuse(conversion)
            planned, gathers = conversion.planned_parameters(model), frozenset(self.ends[1])
            rules = Rules(model, self._region, conversion.styles, counted(model, conversion.plan))
            check = ShardCheck(model, conversion.owned, planned, gathers, rules, lambda: watch.stage == "cut")
            conversion.check = check
            watch.check()
            check.start(module, args, kwargs)

    def close(self, output: Any) -> None:
        """End a forward that has succeeded and returns ``output``."""
        check = self._conversion.check
        if check is not None:
            check.stop()
            check.check_output(output)
            if check.rules.conclusive:
                self.watch.passed(self._key, check)
                self._conversion.checked.add(self._model.training)
            self._conversion.check = None
        self.watch.finished()

    def give_up(self, failed: bool) -> None:
        """End the check. After an error, tell the peers, which may not have met it, not to wait for this rank."""
        check, self._conversion.check = self._conversion.check, None
        if check is not None:
            check.stop()
        error = sys.exc_info()[1] if failed and not torch.compiler.is_compiling() else None
        if error is not None and self._region.group is not None:
            if check is not None:
                check.rules.note_on(error)
            offer_verify(error)
            coordination_of(self._region.group).stop(error)
