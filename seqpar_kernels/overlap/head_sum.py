"""A sum over heads, the output projection or the gradient of x: added up as heads arrive, in the order of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.spec import accumulation_dtype


def adds_in_blocks(like: Tensor) -> bool:
    """Whether a sum over heads may be added up as heads arrive: where a matmul gives fp32 (fp64) sums.

    PyTorch's CPU matmul of 16-bit tensors rounds its result, so that the sum is one matmul when all heads are there.
    """
    return like.dtype in (torch.float32, torch.float64) or like.device.type == "cuda"


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


class HeadSum:
    """``features`` [N, F] times ``weight`` [F, E], plus ``bias`` [E]: added in blocks of features, or at the end."""

    def __init__(self, weight: Tensor, bias: Tensor | None, features: Tensor):
        self._weight, self._bias, self._features = weight, bias, features
        self._in_blocks = adds_in_blocks(features)
        self._total: Tensor | None = None
        if self._in_blocks:
            self._total = self._begin()

    def _begin(self) -> Tensor:
        wide, shape = accumulation_dtype(self._features.dtype), (self._features.shape[0], self._weight.shape[1])
        if self._bias is None:
            return torch.zeros(shape, dtype=wide, device=self._features.device)
        return self._bias.to(wide).expand(shape).contiguous()

    def add(self, blocks: Sequence[range]) -> None:
        """These features are there."""
        if not self._in_blocks:
            return
        assert self._total is not None
        for block in blocks:
            some = slice(block.start, block.stop)
            _add_product(self._total, self._features[:, some], self._weight[some])

    def result(self) -> Tensor:
        if self._total is not None:
            return self._total.to(self._features.dtype)
        bias = self._bias
        return F.linear(self._features, self._weight.t(), bias)

    def shared_with(self, others: Sequence[HeadSum]) -> Callable[[], Tensor]:
        """Add up the sums of ``others`` with this one; returns a function that gives the whole."""
        if self._in_blocks:
            for other in others:
                other._total = self._total
            return self.result

        def whole() -> Tensor:
            wide = accumulation_dtype(self._features.dtype)
            total = self.result().to(wide)
            for other in others:
                total += other.result()
            return total.to(self._features.dtype)

        return whole
