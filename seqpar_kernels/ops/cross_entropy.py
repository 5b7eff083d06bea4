"""The loss of rows of logits whose vocabulary is cut over ranks: statistics, their combination, the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import group_rank, group_size, vocabulary_range
from ..overlap import pipeline
from ..overlap.planner import max_workspace_bytes
from .registry import group_named

#: The most logits held at one time where the caller sets no number of rows: 64 MiB at 16 bit, 128 MiB in fp32.
_LOGITS = 1 << 25
_MIN_ROWS = 128
_SLICES = 4  # logits, scaled and capped ones, their gradient, and a factor of it


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Loss(NamedTuple):
    """The loss of one row of logits l: w_y * cross_entropy((1 - s) * onehot + s / V, softmax) + z * lse^2.

    Of l = softcap * tanh(logit_scale * logits / softcap), or logit_scale * logits without a softcap. With class weights
    each class's share of the cross-entropy counts as often as its weight says.
    """

    start: int  # this rank has the entries start .. stop of the vocabulary
    stop: int
    vocab: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float
    class_weight: Tensor | None  # [V], of all classes

    @staticmethod
    def on(group: str, vocab: int, *options: Any) -> Loss:
        """The arguments of the op from its group on, and the class weights."""
        pg = group_named(group)
        start, stop = vocabulary_range(vocab, group_size(pg), group_rank(pg))
        return Loss(start, stop, vocab, *options)

    def changed(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Scaled and capped logits [rows, V/t] in ``dtype``: the given tensor where that changes nothing."""
        x = logits.to(dtype)
        if self.softcap:
            return (x * (self.logit_scale / self.softcap)).tanh_().mul_(self.softcap)
        return x if self.logit_scale == 1.0 else x * self.logit_scale

    def weights(self, target: Tensor, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
        """What a row's target counts, and what its log-sum-exp does. [rows] each, or numbers alike for all rows"""
        if self.class_weight is None:
            return 1 - self.label_smoothing, 1.0
        weight = self.class_weight.to(dtype)
        own = weight[target.where(target != self.ignore_index, 0)] * (1 - self.label_smoothing)
        return own, own + self.label_smoothing / self.vocab * weight.sum()

    def smoothed(self, dtype: torch.dtype) -> Tensor | float:
        """What the logits of this rank count by label smoothing: [V/t], or a number alike for all of them."""
        share = self.label_smoothing / self.vocab
        if self.class_weight is None:
            return share
        return self.class_weight[self.start : self.stop].to(dtype) * share

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's target as a column of this rank, and whether this rank has it. [rows, 1] each"""
        column = (target - self.start).unsqueeze(-1)
        owned = (column >= 0) & (column < self.stop - self.start)
        return column.where(owned, 0), owned

    def check(self, target: Tensor) -> None:
        """Raise where a target is outside the vocabulary (on CUDA: when the device runs the check)."""
        fine = ((target >= 0) & (target < self.vocab)) | (target == self.ignore_index)
        torch._assert_async(fine.all(), f"target: expected class indices in 0..{self.vocab - 1} or ignore_index")

    def statistics(self, logits: Tensor, target: Tensor, out: Tensor) -> None:
        """Write maximum, sum of exponentials, the target's logit and what smoothing sums to ``out`` [4, rows].

        Of logits [rows, V/t].
        """
        if logits.shape[-1] == 0:
            out.zero_()
            out[0] = -math.inf
            return
        x = self.changed(logits, out.dtype)
        torch.amax(x, -1, out=out[0])
        column, owned = self.local(target)
        out[2] = x.gather(-1, column).masked_fill_(~owned, 0).squeeze(-1)
        share = self.smoothed(out.dtype)
        if isinstance(share, Tensor):
            out[3] = (x * share).sum(-1) if self.label_smoothing else 0
        else:
            out[3] = x.sum(-1).mul_(share) if self.label_smoothing else 0
        # For a row of -inf subtract 0, not the maximum: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
        peak = out[0].masked_fill(out[0] == -math.inf, 0).unsqueeze(-1)
        out[1] = (x - peak).exp_().sum(-1)

    def combine(self, statistics: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log-sum-exp, and whether no logit is above the target's; from all ranks' statistics [ranks, 4, rows].

        [rows] each.
        """
        peaks = statistics[:, 0]
        peak = peaks.amax(0)
        finite = peak.masked_fill(peak == -math.inf, 0)
        total, picked, summed = (torch.zeros_like(peak) for _ in range(3))
        for part in statistics:  # in rank order
            total += part[1] * (part[0] - finite).exp_()
            picked += part[2]
            summed += part[3]
        lse = total.log_() + finite
        ignored = target == self.ignore_index
        of_target, of_lse = self.weights(target, lse.dtype)
        losses = lse * of_lse - of_target * picked
        if self.label_smoothing:
            losses -= summed
        if self.z_loss:
            losses += self.z_loss * lse.square()
        return losses.masked_fill_(ignored, 0), lse, (picked >= peak).logical_and_(~ignored)

    def gradient(self, logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor) -> Tensor:
        """The gradient of the logits [rows, V/t], in their shape and dtype."""
        dloss = dloss.masked_fill(target == self.ignore_index, 0).unsqueeze(-1)
        lse = lse.unsqueeze(-1)
        of_target, of_lse = self.weights(target, lse.dtype)
        x = self.changed(logits, lse.dtype)
        d = (x - lse).exp_()
        if isinstance(of_lse, Tensor):
            d *= of_lse.unsqueeze(-1) + 2 * self.z_loss * lse
        elif self.z_loss:
            d *= 1 + 2 * self.z_loss * lse
        if self.label_smoothing:
            d -= self.smoothed(lse.dtype)
        if d.shape[-1]:
            column, owned = self.local(target)
            hit = owned.to(d.dtype) * -(of_target.unsqueeze(-1) if isinstance(of_target, Tensor) else of_target)
            d.scatter_add_(-1, column, hit)
        if self.softcap:  # tanh' = 1 - tanh^2
            d *= (x / self.softcap).square_().neg_().add_(1)
        if self.logit_scale != 1.0:
            d *= self.logit_scale
        # An ignored row may hold infinities, and zero times infinity is NaN.
        return d.mul_(dloss).masked_fill_(dloss == 0, 0).to(logits.dtype)


def all_statistics(statistics: Tensor, group: str) -> Tensor:
    """[4, rows] of this rank -> [ranks, 4, rows]"""
    pg = group_named(group)
    if pg is None:
        return statistics.unsqueeze(0)
    ranks = group_size(pg)
    parts = pipeline.gather(statistics.view(1, -1), 0, ranks, pg, "cross_entropy")
    return parts.view(ranks, *statistics.shape)


def pieces(rows: int, most: int, columns: int, wide: torch.dtype) -> Iterator[slice]:
    """Slices of at most ``most`` rows; 0: about 2^25 logits a slice, and no fewer rows than a matmul needs.

    The bound of ``set_max_workspace_bytes`` comes before both: the logits of a slice and what is computed from them, up
    to four tensors in the ``wide`` dtype at one time, stay below it, down to a single row.
    """
    columns = max(1, columns)
    step = most or max(_MIN_ROWS, _LOGITS // columns)
    bound = max_workspace_bytes()
    if bound is not None:
        step = max(1, min(step, bound // (_SLICES * wide.itemsize * columns)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
