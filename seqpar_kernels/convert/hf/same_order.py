"""One order of the data on all ranks, however they are seeded. Needs Accelerate, like its only caller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Sampler


def same_order(loader: Any, device: torch.device) -> None:
    """Let the sampler of a loader that Accelerate has prepared draw what it draws on world rank 0.

    Accelerate shares out the batches of one order, and trusts that each rank has the same. Collective, here and at the
    beginning of each epoch.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # what Accelerate has put around it
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, SeedableRandomSampler):
        seed = torch.tensor(sampler.initial_seed % 2**64 - 2**63)
        sampler.initial_seed = int(_from_first(seed, device)) + 2**63
    elif sampler is not None and not isinstance(sampler, SameOrder):
        batches.sampler = SameOrder(sampler, device)


class SameOrder(Sampler[Any]):
    """``sampler``, drawing from rank 0's random states: torch's default generator, and one of its own.

    It draws all it needs, or a seed for it, before it gives its first index; a rank's own state comes back then.
    """

    def __init__(self, sampler: Any, device: torch.device):
        self.sampler, self.device = sampler, device

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.sampler, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.set_state(_from_first(generator.get_state(), self.device))
        own = torch.get_rng_state()
        first = _from_first(own, self.device)
        other = not torch.equal(own, first)
        if other:
            torch.set_rng_state(first)
        found = iter(self.sampler)
        try:
            index = next(found)
        except StopIteration:
            return
        finally:
            if other:
                torch.set_rng_state(own)
        yield index
        yield from found

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.sampler, name)


def _from_first(mine: Tensor, device: torch.device) -> Tensor:
    """World rank 0's tensor, on the host."""
    sent = mine.clone().to(device)
    dist.broadcast(sent, 0)
    return sent.cpu()
