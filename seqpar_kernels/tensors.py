"""Small things that every floor does with tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh contiguous tensor in another shape, and not as a view: autograd lets results be modified in place."""
    if t.shape == torch.Size(shape) and not t._is_view():
        return t
    return torch.ops.aten._unsafe_view.default(t, list(shape))


def rows_of(x: Tensor) -> Tensor:
    """[..., H] as [rows, H]."""
    return x.reshape(-1, x.shape[-1])
