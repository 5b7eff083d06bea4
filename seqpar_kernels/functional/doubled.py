"""A gather whose backward sums what was whole: gradients t times too large, and nothing else amiss.

``gather_sequence`` sums the gradients of the ranks, as tensor-parallel computation behind it wants. Where every rank
goes on with the same computation instead, what comes back is the same on all of them. That can be seen without asking
anybody: the sum is this rank's own gradient, t times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import per_group
from ..kernels.spec import accumulation_dtype
from ..layout import SequenceShard, group_rank, group_size

_BACKWARDS_LOOKED_AT = 4


class DoubledGradients:
    """Looks at the first backwards of a group's gathers, and says once what it finds."""

    def __init__(self, group: ProcessGroup):
        self._ranks, self._rank = group_size(group), group_rank(group)
        self.left = _BACKWARDS_LOOKED_AT

    def watched(self, x: Tensor, gather: Callable[[Tensor], Tensor], dim: int, shard: SequenceShard) -> Tensor:
        """``gather(x)``, the backward of which is looked at."""
        mine: list[Tensor] = []
        stand_in = x.view_as(x)  # its gradient is what the gather gives, whatever else uses x

        def came(dy: Tensor) -> None:
            if self.left > 0:
                mine.append(dy.detach().narrow(dim, shard.start, shard.size))

        def left(dx: Tensor) -> None:
            if mine and self.left > 0:
                self.left -= 1
                self._look(mine.pop(), dx.detach())

        y = gather(stand_in)
        y.register_hook(came)
        stand_in.register_hook(left)
        return y

    def _look(self, dy: Tensor, dx: Tensor) -> None:
        wide = dy.to(accumulation_dtype(dy.dtype))
        total = wide
        for _ in range(1, self._ranks):  # as the ranks' gradients are summed
            total = total + wide
        if not torch.equal(total.to(dx.dtype), dx) or not dx.any():
            return
        self.left = 0
        warnings.warn(
            f"gather_sequence: the gradient of the gathered tensor is the same on all {self._ranks} ranks, and its "
            f"backward has summed it: gradients behind it are {self._ranks} times too large, unless each rank computes "
            "only a part. Where every rank computes the same from the gathered tensor (a loss, a norm, a plain "
            "module), pass tensor_parallel_output_grad=False",
            stacklevel=2,
        )


@per_group
def _of(group: ProcessGroup) -> DoubledGradients:
    return DoubledGradients(group)


def doubled_gradients(group: ProcessGroup) -> DoubledGradients | None:
    """None once enough backwards have been looked at."""
    found = _of(group)
    return found if found.left > 0 else None
