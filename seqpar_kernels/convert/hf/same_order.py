"""Gives all ranks the same order of the data, whatever their seeds. Needs Accelerate, like its only caller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Sampler


def same_order(loader: Any, device: torch.device) -> None:
    """Let the sampler of a loader that Accelerate has prepared draw the order of world rank 0.

    Accelerate assumes that each rank has the same order, and gives each its batches of it. A collective call, here and
    at the beginning of each epoch.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # Accelerate has wrapped it
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, SeedableRandomSampler):
        seed = torch.tensor(sampler.initial_seed % 2**64 - 2**63)
        sampler.initial_seed = int(_from_first(seed, device)) + 2**63
    elif sampler is not None and not isinstance(sampler, SameOrder):
        batches.sampler = SameOrder(sampler, device)


class SameOrder(Sampler[Any]):
    """``sampler`` with the random states of rank 0: of torch's default generator, and of its own one.

    A sampler draws all its numbers, or a seed for them, before its first index. The rank's own state is restored then.
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
        if name == "sampler":  # a copy has no attributes yet
            raise AttributeError(name)
        return getattr(self.sampler, name)


def _from_first(mine: Tensor, device: torch.device) -> Tensor:
    """World rank 0's tensor, on the host."""
    sent = mine.clone().to(device)
    dist.broadcast(sent, 0)
    return sent.cpu()
