"""Attention dropout of a converted model: heads on different ranks get different masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ColumnParallelLinear, Dropout, Region, RowParallelLinear
from ..random import draw_seed

_NAMES = ("attention_dropout", "attn_dropout", "attn_pdrop", "dropout")


class HeadDropout:
    """Gives this rank its own random numbers between the colwise and rowwise layers of one attention module.

    The seed is drawn on every rank alike, so the generator is in the same state on all ranks behind the module, and
    activation checkpointing replays the same masks.
    """

    def __init__(self, attention: nn.Module, region: Region):
        self.attention, self.region = attention, region
        self._before: tuple[torch.Generator, Tensor] | None = None
        for child in attention.children():
            if isinstance(child, ColumnParallelLinear):
                child.register_forward_hook(self._enter)
            elif isinstance(child, RowParallelLinear):
                child.register_forward_pre_hook(self._leave)

    def _enter(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._before is not None or not self.attention.training or torch.compiler.is_compiling():
            return
        seed = int(draw_seed(torch.device("cpu"))) // 2  # leaves room to add the rank
        generator = default_generator(output.device)
        self._before = generator, generator.get_state()
        generator.manual_seed(seed + self.region.rank)

    def _leave(self, *_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the state of the default generator; does nothing outside of the attention module."""
        if self._before is not None:
            generator, state = self._before
            self._before = None
            generator.set_state(state)


def head_dropouts(model: nn.Module, region: Region) -> Iterator[HeadDropout]:
    """Yield one for every attention module with dropout between a colwise and a rowwise child."""
    for module in model.modules():
        kinds = {type(child) for child in module.children()}
        cut = any(issubclass(kind, ColumnParallelLinear) for kind in kinds) and RowParallelLinear in kinds
        if cut and any(_probability(getattr(module, name, 0.0)) > 0 for name in _NAMES):
            yield HeadDropout(module, region)


def _probability(value: Any) -> float:
    if isinstance(value, Dropout):  # acts on the shard, behind the rowwise layer
        return 0.0
    value = getattr(value, "p", value)
    return value if isinstance(value, float) else 0.0


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random functions draw from on ``device``."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
