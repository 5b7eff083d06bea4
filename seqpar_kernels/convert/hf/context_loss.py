"""The loss of a causal language model whose rows are shared by ranks: over all of them, the same on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from ...functional import reduce_from_tensor_parallel


class ContextLoss:
    """In the place of Transformers' ``ForCausalLMLoss``; labels come shifted already."""

    def __init__(self, group: ProcessGroup | None):
        self._group = group
        self.count: int | None = None  # labels of the whole batch; None: no forward that was given any is under way

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **_: Any,
    ) -> Tensor:
        """The sum over the rows of all ranks by the number of labels; its gradient is of this rank's rows."""
        if self.count is None:
            raise RuntimeError("context_parallel: the loss of a forward that was given no labels")
        if ignore_index != -100:
            raise ValueError(f"ignore_index: expected -100 with context_parallel, got {ignore_index}")
        rows = logits.float().reshape(-1, logits.shape[-1])
        mine = cross_entropy(rows, labels.reshape(-1).to(rows.device), ignore_index=ignore_index, reduction="sum")
        total = mine if self._group is None else reduce_from_tensor_parallel(mine.reshape(1), self._group).squeeze(0)
        if num_items_in_batch is None:
            return total / self.count if self.count else total / torch.zeros_like(total)
        return total / (
            num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        )
