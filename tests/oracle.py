"""The fp64 oracle and the error budget: at most twice the error of the same-dtype PyTorch reference."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(got: Tensor, reference: Tensor, oracle: Tensor, what: str, magnitude: float = 0.0) -> None:
    """``got`` errs against ``oracle`` (fp64) at most twice as much as ``reference`` does.

    One rounding of the result is allowed on top: the reference may happen to err by less than its own precision. Where
    terms of size ``magnitude`` may cancel, it is their rounding that counts.
    """
    assert got.shape == oracle.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    if got.numel() == 0:
        return
    scale = oracle.abs().amax().clamp(min=magnitude)
    rounding = torch.finfo(got.dtype).eps * scale
    budget = 2 * ((reference.double() - oracle).abs().amax() + rounding)
    error = (got.double() - oracle).abs().amax()
    assert error <= budget, f"{what}: error {error:.3e}, budget {budget:.3e}"
