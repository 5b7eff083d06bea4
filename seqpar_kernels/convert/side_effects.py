"""Restores random states and buffers after a trial of a function or module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def random_state(tensors: list[Tensor]) -> list[Tensor]:
    """The states of the generators that a function on ``tensors`` may draw from."""
    states = [torch.get_rng_state()]
    device = next((t.device for t in tensors if t.device.type == "cuda"), None)
    if device is not None:
        states.append(torch.cuda.get_rng_state(device))
    return states


def restore(states: list[Tensor], like: Tensor) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], like.device)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Inside, buffers may change; they are restored afterwards."""
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
