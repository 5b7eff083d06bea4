"""Helpers for tensors that every floor uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous tensor of another shape that is no view, so that autograd allows in-place changes of the result."""
    if t.shape == torch.Size(shape) and not t._is_view():
        return t
    return torch.ops.aten._unsafe_view.default(t, list(shape))


def is_dtensor(kind: type) -> bool:
    """Whether tensors of this class are DTensors. Their module, slow to import, is so for unknown classes alone."""
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return issubclass(kind, DTensor)


def rows_of(x: Tensor) -> Tensor:
    """[..., H] as [rows, H]."""
    return x.reshape(-1, x.shape[-1])
