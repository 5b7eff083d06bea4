"""RMSNorm over features that are cut over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_divides
from ..functional import copy_to_tensor_parallel, reduce_from_tensor_parallel
from ..functional.mappings import split_rms_norm
from ..kernels.spec import accumulation_dtype
from ..layout import Group
from ..ops.registry import eager
from .norm import RMSNorm
from .own_forward import own_forward
from .region import Region
from .sharding import ShardSpec, local_part


class SplitRMSNorm(nn.Module):
    """RMSNorm over the last dimension of a column-parallel output [..., S, N/t], N features on t ranks.

    For query and key norms that span all heads: each rank normalizes its own heads with the mean square over all of
    them, one fp32 number a row summed over the ranks. The weight is cut like the features.

    Examples:
        >>> import torch
        >>> from seqpar_kernels.nn import SplitRMSNorm
        >>> plain = torch.nn.RMSNorm(16, eps=1e-6)
        >>> norm = SplitRMSNorm.from_torch(plain, group=None)
        >>> x = torch.randn(2, 8, 16)
        >>> torch.allclose(norm(x), plain(x), atol=1e-5)
        True
    """

    weight: nn.Parameter | None

    def __init__(self, norm: RMSNorm, group: Group = None):
        super().__init__()
        self.region = Region(group)
        self.features = norm.normalized_shape[0]
        check_divides("normalized_shape", self.features, self.region.ranks, "its size")
        self.eps, self.zero_centered_weight = norm.eps, norm.zero_centered_weight
        self.sharded: dict[str, ShardSpec] = {}
        weight: nn.Parameter | None = norm.weight
        if weight is not None and self.region.ranks > 1:
            self.sharded["weight"] = ShardSpec(0)
            weight = nn.Parameter(local_part(weight, ShardSpec(0), self.region.group), weight.requires_grad)
        self.register_parameter("weight", weight)

    @classmethod
    def from_torch(cls, module: nn.Module, group: Group = None) -> SplitRMSNorm:
        """From any RMSNorm that :meth:`RMSNorm.from_torch` takes."""
        return cls(RMSNorm.from_torch(module), group).train(module.training)

    @own_forward
    def forward(self, x: Tensor) -> Tensor:
        """[..., S, N/t] -> the same shape."""
        group = self.region.group
        if eager():
            return split_rms_norm(x, self.weight, self.features, self.eps, self.zero_centered_weight, group)
        rows = x.to(accumulation_dtype(x.dtype))
        # The loss of every rank depends on the sum, so that the gradient of the sum is summed over the ranks too.
        total = reduce_from_tensor_parallel(rows.square().sum(-1, keepdim=True), group)  # [..., S, 1]
        total = copy_to_tensor_parallel(total, group)
        eps = self.eps if self.eps is not None else torch.finfo(rows.dtype).eps
        y = rows * torch.rsqrt(total / self.features + eps)
        if self.weight is not None:
            y = y * (self.weight + 1 if self.zero_centered_weight else self.weight)
        return y.to(x.dtype)
