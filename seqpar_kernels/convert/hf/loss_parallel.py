"""The loss of ``parallelize(..., loss_parallel=True)``, computed without logits.

The model's forward stays as it is. With labels, the last norm returns a stand-in for the hidden state, and the head a
stand-in for the logits (no memory, all NaN). ``loss_function`` then computes the loss from the shard. The stand-in for
the logits remembers how the model scales and caps them. If the model changes a stand-in in another way, the forward
raises an error.

torch.compile traces no such stand-in. There the change is what the model's config says, and a number that passes
through the model's own code is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...functional.mappings import scatter_sequence
from ...nn import Region, VocabParallelHead
from ...nn.own_forward import trusted
from ...nn.region import show_whole
from .stand_in_logits import UNCHANGED, LogitChange, StandInLogits


class LossParallel:
    """The state of one forward: the stand-ins, and the shard behind them."""

    def __init__(
        self,
        head: VocabParallelHead,
        region: Region,
        loss_function: Callable[..., Tensor],
        configured: LogitChange,
        shown: bool,
    ):
        """``configured``: how the model changes its logits by its config.

        ``shown``: the model needs all rows of the hidden state behind the last block (its last norm may run a second
        time elsewhere), so they are gathered, and the head takes its shard of what it is given.
        """
        self._shown = shown
        self._head, self._region, self._configured = head, region, configured
        self._loss_function = loss_function
        self.active = False  # whether this forward has labels
        self._shard: Tensor | None = None
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None  # as the head returned it
        self._changed: Tensor | None = None  # as the loss was given it
        self._done = False

    def begin(self, active: bool) -> None:
        self.active, self._done = active, False
        self._shard = self._hidden = self._logits = self._changed = None

    @property
    def hides(self) -> bool:
        """Whether this forward has a stand-in for the hidden state."""
        return self.active and not self._shown

    def hide(self, shard: Tensor) -> Tensor:
        """Behind the last norm: keep the shard, and return a stand-in."""
        self._shard, self._hidden = shard, show_whole(shard, self._region)
        return self._hidden

    def head(self, x: Tensor) -> Tensor:
        """Take the place of the head's forward. [..., H] -> [..., V]"""
        if not self.active:
            with trusted():
                return type(self._head).forward(self._head, x)
        if self._shown:
            self._shard = scatter_sequence(x, self._region.group, self._region.seq_dim)
            return self._stand_in(x)
        hidden = self._hidden
        # A view of all rows passes: decoders slice the last hidden state by logits_to_keep.
        same = hidden is not None and x.shape == hidden.shape
        if same and hidden is not None and not torch.compiler.is_compiling():
            same = x.data_ptr() == hidden.data_ptr()
        if not same:
            raise RuntimeError(
                "loss_parallel: the head was not given the last hidden state as it left the final norm (a forward with "
                "labels must keep all rows: logits_to_keep=0)"
            )
        return self._stand_in(x)

    def _stand_in(self, x: Tensor) -> Tensor:
        """For the logits of x [..., H]. [..., V]"""
        features = self._head.out_features
        if torch.compiler.is_compiling():
            self._logits = x.new_full((), self._probe).expand(*x.shape[:-1], features)
        else:
            self._logits = StandInLogits.like(x, features)
        return self._logits

    @property
    def _probe(self) -> float:
        """A logit that the model's cap bends, and its scale moves."""
        scale, cap = self._configured
        return cap / scale if cap else 1.0

    def _change(self, logits: Tensor) -> LogitChange:
        """What the model did to the head's result on the way to the loss.

        Raises:
            RuntimeError: something else than scaling and capping.
        """
        ours = self._logits is not None
        if ours and isinstance(logits, StandInLogits) and logits.intact:
            return logits.change
        if (
            not ours
            or not torch.compiler.is_compiling()
            or (logits is not self._logits and self._configured == UNCHANGED)
        ):
            raise RuntimeError(
                "loss_parallel: the model changes its logits before the loss by more than a number and one tanh, and "
                "logits never exist"
            )
        change = UNCHANGED if logits is self._logits else self._configured
        seen = logits.flatten(0, -2)[:1].float()  # one row [1, V]: all of them would take the memory of logits
        expected = change.of(torch.full_like(seen, self._probe))
        same = ((seen - expected).abs() <= 0.02 * expected.abs()).all()  # a bf16 logit has 8 bits
        scale, cap = change
        torch._assert_async(same, f"loss_parallel: the logits changed otherwise than by scale {scale}, softcap {cap}")
        return change

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
        """Take the place of Transformers' ForCausalLMLoss."""
        if not self.active:
            return self._loss_function(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        change = self._change(logits)
        assert self._shard is not None
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if shift_labels.numel() != logits.shape[:-1].numel():
            raise RuntimeError(
                f"loss_parallel: expected one label for each of the {logits.shape[:-1].numel()} rows that the head was "
                f"given, got {shift_labels.numel()} (a forward with labels must keep all rows: logits_to_keep=0)"
            )
        target = shift_labels.reshape(logits.shape[:-1]).to(self._shard.device)
        reduction = "mean" if num_items_in_batch is None else "sum"
        with trusted():
            loss = self._head.loss(
                self._shard, target, ignore_index=ignore_index, reduction=reduction, **change._asdict()
            )
        self._changed, self._done = logits, True
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def finish(self, output: Any) -> Any:
        """The model's output without the stand-in for the logits."""
        if not self.active:
            return output
        if not self._done:
            raise RuntimeError("loss_parallel: the model was given labels and did not call its loss_function")
        if isinstance(output, Mapping):
            return type(output)(**{key: value for key, value in output.items() if not self._stands_in(value)})
        return tuple(None if self._stands_in(value) else value for value in output)

    def _stands_in(self, value: Any) -> bool:
        return value is self._changed or value is self._logits or isinstance(value, StandInLogits)
