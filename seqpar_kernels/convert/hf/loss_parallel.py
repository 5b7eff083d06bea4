"""``parallelize(..., loss_parallel=True)``: head and embedding cut by vocabulary, and the loss without logits.

Nothing of the model's own forward is rewritten. Where it is given labels, the last norm hands on a stand-in for the
hidden state, the head a stand-in for the logits (no memory, all NaN), and the model's ``loss_function`` computes the
loss of the shard behind them. A model that does anything to either on the way is told so by the first forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import Region, VocabParallelHead
from ...nn.own_forward import trusted
from ...nn.region import show_whole


class LossParallel:
    """The state of one forward: what stands for what."""

    def __init__(self, head: VocabParallelHead, region: Region, loss_function: Callable[..., Tensor]):
        self._head, self._region = head, region
        self._loss_function = loss_function
        self.active = False  # this forward has labels
        self._shard: Tensor | None = None
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None
        self._done = False

    def begin(self, active: bool) -> None:
        self.active, self._done = active, False
        self._shard = self._hidden = self._logits = None

    def hide(self, shard: Tensor) -> Tensor:
        """Behind the last norm: remember the shard, hand on a stand-in."""
        self._shard, self._hidden = shard, show_whole(shard, self._region)
        return self._hidden

    def head(self, x: Tensor) -> Tensor:
        """In the head's place. [..., H] -> [..., V]"""
        if not self.active:
            with trusted():
                return type(self._head).forward(self._head, x)
        hidden = self._hidden
        # A view of all rows is the same: decoders slice the last hidden state by logits_to_keep.
        same = hidden is not None and x.shape == hidden.shape
        if same and hidden is not None and not torch.compiler.is_compiling():
            same = x.data_ptr() == hidden.data_ptr()
        if not same:
            raise RuntimeError(
                "loss_parallel: the head was not given the last hidden state as it left the final norm (a forward with "
                "labels must keep all rows: logits_to_keep=0)"
            )
        self._logits = x.new_full((), float("nan")).expand(*x.shape[:-1], self._head.out_features)
        return self._logits

    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """In place of transformers' ForCausalLMLoss."""
        if not self.active:
            return self._loss_function(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if self._shard is None or logits is not self._logits:
            raise RuntimeError("loss_parallel: the model changes its logits before the loss, and logits never exist")
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(logits.shape[:-1]).to(self._shard.device)
        reduction = "mean" if num_items_in_batch is None else "sum"
        with trusted():
            loss = self._head.loss(self._shard, target, ignore_index=ignore_index, reduction=reduction)
        self._done = True
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def finish(self, output: Any) -> Any:
        """The model's output without the logits, which are not there."""
        if not self.active:
            return output
        if not self._done:
            raise RuntimeError("loss_parallel: the model was given labels and did not call its loss_function")
        if isinstance(output, Mapping):
            return type(output)(**{key: value for key, value in output.items() if value is not self._logits})
        return tuple(None if value is self._logits else value for value in output)
