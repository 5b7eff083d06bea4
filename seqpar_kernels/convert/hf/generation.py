"""``generate`` of a converted Hugging Face model: all ranks of the group write one text."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...overlap import pipeline
from ..alike import Alike
from ..attention_dropout import default_generator
from ..conversion import Conversion


def generate_alike(conversion: Conversion) -> None:
    """Let ``model.generate`` sample the same tokens on all ranks, however they are seeded.

    Sampling draws from the default generators, and the logits are the same on all ranks. So ``generate`` begins with
    the generators' states of the group's first rank, and a rank that had others gets them back behind it: what a
    rightly seeded run writes stays what it was. Prompts are compared first; where tokens are drawn, every forward and
    the result are compared, so that ranks that come apart raise before one of them has ended and the others wait.
    """
    group = conversion.region.group
    model: Any = conversion.model
    if group is None or not callable(getattr(model, "generate", None)):
        return
    generate = model.generate

    @functools.wraps(generate)
    def generated(*args: Any, **kwargs: Any) -> Any:
        """A collective call."""
        alike = conversion.alike
        with drawing_alike(group, _device(model)):
            if alike is None:
                return generate(*args, **kwargs)
            with alike.while_drawing():
                out = generate(*args, **kwargs)
            _compare_result(alike, out)
            return out

    model.generate = generated


@contextlib.contextmanager
def drawing_alike(group: ProcessGroup, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those that the group's first rank draws. A collective call."""
    generators = list(dict.fromkeys([torch.default_generator, default_generator(device)]))
    own = [generator.get_state() for generator in generators]
    first = _of_first_rank(torch.cat(own), group, device).split([state.numel() for state in own])
    others = [not torch.equal(mine, theirs) for mine, theirs in zip(own, first, strict=True)]
    for generator, state, other in zip(generators, first, others, strict=True):
        if other:
            generator.set_state(state)
    try:
        yield
    finally:
        for generator, state, other in zip(generators, own, others, strict=True):
            if other:
                generator.set_state(state)


@torch.no_grad()
def _of_first_rank(mine: Tensor, group: ProcessGroup, device: torch.device) -> Tensor:
    """[n] -> [n], on the host."""
    name = "state of the random generators"
    whole = pipeline.gather(mine.to(device).unsqueeze(-1), 0, mine.numel() * group.size(), group, name)
    return whole.view(group.size(), mine.numel())[0].cpu()


def _compare_result(alike: Alike, out: Any) -> None:
    ids = getattr(out, "sequences", out)
    alike.result("generate", {"the generated ids": ids} if isinstance(ids, Tensor) else {})


def _device(model: nn.Module) -> torch.device:
    for module in model.modules():
        for held in dict.values(module._parameters):
            if held is not None:
                return torch.device(held.device)
    return torch.device("cpu")
