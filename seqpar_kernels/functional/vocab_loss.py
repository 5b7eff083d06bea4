"""Losses of a language model whose vocabulary is cut over the ranks: of logits, and of a head and its input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from .. import ops
from ..checks import check_float, check_linear_bias, check_same_device, check_sequence, check_tensor, check_weight
from ..comm.coordination import checked_together
from ..layout import Group, resolve_group, shard_of
from ..ops.registry import group_name
from ..overlap.engines import settle_plan
from ..overlap.tuning import profile_of
from .linear import autocast
from .vocab import check_indices, check_vocabulary

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

REDUCTIONS = ("mean", "sum", "none")
SMOOTHED = ("all", "others")


class LossParts(NamedTuple):
    """What ``with_parts=True`` returns. Only ``loss`` has a gradient."""

    loss: Tensor
    z_loss: Tensor
    """What ``z_loss`` adds to the loss, reduced as the loss is."""
    accuracy: Tensor
    """The share of the rows that count in which no logit is above the target's (a tie is right), for "mean" and "sum"
    alike; without reduction one bool a row. Class weights do not matter."""


class LossArguments(TypedDict, total=False):
    """Keyword arguments of both losses."""

    group: Required[Group]
    vocab_size: int | None
    ignore_index: int
    label_smoothing: float
    label_smoothing_over: str
    z_loss: float
    logit_scale: float
    softcap: float
    class_weight: Tensor | None
    reduction: str


class HeadArguments(LossArguments, total=False):
    """Those of the head and loss in one."""

    seq_dim: int
    chunks: int | None
    engine: str
    logit_rows: int | None


@overload
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    with_parts: Literal[False] = False,
    **options: Unpack[LossArguments],
) -> Tensor: ...
@overload
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    with_parts: Literal[True],
    **options: Unpack[LossArguments],
) -> LossParts: ...
@overload
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    with_parts: bool = False,
    **options: Unpack[LossArguments],
) -> Tensor | LossParts: ...
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: Group,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    label_smoothing_over: str = "all",
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    with_parts: bool = False,
) -> Tensor | LossParts:
    """``torch.nn.functional.cross_entropy`` of logits that are cut over the ranks along the vocabulary.

    The ranks exchange four numbers a row. The loss has the same bits on every rank.

    Args:
        logits: [..., V/t], this rank's columns, cut as ``torch.chunk`` cuts.
        target: [...] int64, classes of the whole vocabulary, the same on every rank.
        group: ProcessGroup or 1-D DeviceMesh of t ranks; None computes locally.
        vocab_size: V; needed only where it is not a multiple of t.
        ignore_index: target of rows that do not count.
        label_smoothing: s in [0, 1).
        label_smoothing_over: the classes that share s. "all": the target distribution is (1 - s) * onehot + s / V, as
            in PyTorch. "others": the target has 1 - s, every other class s / (V - 1); s is then less than
            (V - 1) / V. This is Megatron's formula for a vocabulary that is not cut.
        z_loss: adds ``z_loss * logsumexp(l)^2`` to each row (Chowdhery et al. 2022, section 5), l as the next two make
            it. Class weights do not multiply it.
        logit_scale: factor of the logits (Cohere; Granite divides). It comes first.
        softcap: the loss is that of ``l = softcap * tanh(logit_scale * logits / softcap)``, as in Gemma 2; 0: of
            ``l = logit_scale * logits``.
        class_weight: [V] of the logits' dtype or float32, the same on every rank: ``weight`` of
            ``torch.nn.functional.cross_entropy``. It has no gradient.
        reduction: "mean", "sum" or "none". "mean" divides all, the z-loss too, by the number of rows that count, or by
            the sum of their class weights; it is NaN where no row counts.
        with_parts: return :class:`LossParts`: the loss, its z-loss, and the accuracy.

    Returns:
        float32 (float64 for float64 logits), a scalar, or [...] without reduction; :class:`LossParts` of such.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: a target outside the vocabulary; ranks that disagree, a peer that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> logits, target = torch.zeros(4, 8), torch.tensor([3, 1, 4, -100])
        >>> sp.vocab_parallel_cross_entropy(logits, target, group=None)  # log(8)
        tensor(2.0794)
    """
    pg = resolve_group(group)
    with checked_together(pg):
        check_tensor("logits", logits)
        check_float("logits", logits)
        if logits.dim() == 0:
            raise ValueError("logits: expected [..., V/t], got a scalar")
        _check_target(target, logits.shape[:-1], logits)
        vocab = check_vocabulary("logits", logits.shape[-1], vocab_size, pg)
        loss = _checked_loss(
            logits, vocab, ignore_index, label_smoothing, label_smoothing_over, z_loss, logit_scale, softcap,
            class_weight, reduction, with_parts,
        )  # fmt: skip
    results = ops.vocab_cross_entropy(logits, target.long(), class_weight, group_name(pg), vocab, *loss)
    return _reduced(results, target, class_weight, ignore_index, z_loss, reduction, with_parts)


@overload
def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    with_parts: Literal[False] = False,
    **options: Unpack[HeadArguments],
) -> Tensor: ...
@overload
def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    with_parts: Literal[True],
    **options: Unpack[HeadArguments],
) -> LossParts: ...
@overload
def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    with_parts: bool = False,
    **options: Unpack[HeadArguments],
) -> Tensor | LossParts: ...
def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    label_smoothing_over: str = "all",
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    with_parts: bool = False,
    chunks: int | None = None,
    engine: str = "auto",
    logit_rows: int | None = None,
) -> Tensor | LossParts:
    """``cross_entropy(linear(all_gather(x), weight, bias), target)`` that never holds the logits [S, V/t].

    Forward: x is gathered while the head's matmul runs. Each piece of logits is reduced to its statistics and freed.
    Backward: x is gathered again, the logits of each piece are computed again, and their gradient is written over them.
    From it follow dx, which is reduce-scattered chunk by chunk, and the gradients of weight and bias. The backward
    keeps the shard of x and one number a row.

    Args:
        x: [..., S/t, ..., H], this rank's shard of the last hidden state.
        weight: [V/t, H]; rank r holds rows r * ceil(V/t) and on, as ``torch.chunk`` cuts.
        target: [..., S, ...] int64, for the whole sequence, the same on every rank. Nothing is shifted here.
        bias: [V/t] or None.
        group, seq_dim: where the sequence of x is sharded, and the vocabulary.
        vocab_size, ignore_index, reduction, with_parts: as in :func:`vocab_parallel_cross_entropy`.
        label_smoothing, label_smoothing_over, z_loss, logit_scale, softcap, class_weight: as there.
        chunks, engine: as in :func:`seqpar_kernels.all_gather_linear`.
        logit_rows: the most rows of logits held at once; None: about 2^25 logits. The bound of
            :func:`seqpar_kernels.set_max_workspace_bytes` comes before it.

    Returns:
        float32 (float64 for float64 x), a scalar, or the shape of ``target`` without reduction; the same on every rank.
        :class:`LossParts` of such with ``with_parts``.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: a target outside the vocabulary; ranks that disagree, a peer that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, weight = torch.randn(2, 4, 16), torch.zeros(8, 16, requires_grad=True)
        >>> target = torch.tensor([[3, 1, 4, 1], [5, 2, 6, 5]])
        >>> loss = sp.vocab_parallel_linear_cross_entropy(x, weight, target, group=None)
        >>> loss.backward()
        >>> round(loss.item(), 4), weight.grad.shape  # log(8)
        (2.0794, torch.Size([8, 16]))
    """
    pg = resolve_group(group)
    profile = None if pg is None else profile_of(pg)
    with checked_together(pg):
        check_tensor("x", x)
        seq_dim = check_sequence("x", x, seq_dim)
        x, (weight,), (bias,) = autocast(x, [weight], [bias])
        check_weight("weight", weight, x.shape[-1], x)
        check_linear_bias("bias", bias, weight)
        vocab = check_vocabulary("weight", weight.shape[0], vocab_size, pg)
        check_tensor("target", target)
        shape = list(x.shape[:-1])
        if target.dim() == len(shape):
            shape[seq_dim] = target.shape[seq_dim]
        _check_target(target, torch.Size(shape), x)
        shard = shard_of("x", x.shape[seq_dim], pg, shape[seq_dim])
        loss = _checked_loss(
            x, vocab, ignore_index, label_smoothing, label_smoothing_over, z_loss, logit_scale, softcap,
            class_weight, reduction, with_parts,
        )  # fmt: skip
        if logit_rows is not None and (not isinstance(logit_rows, int) or logit_rows < 1):
            raise ValueError(f"logit_rows: expected a positive int or None, got {logit_rows!r}")
        largest = -(-vocab // shard.ranks) * x.shape[-1]
        settled = settle_plan(x, seq_dim, shard, x.shape[-1], largest, engine, chunks, profile, pg, fusible=False)
    where = (group_name(pg), vocab)
    place = (seq_dim, shard.length, settled.chunks, settled.engine, logit_rows or 0)
    results = ops.linear_cross_entropy(x, weight, bias, target.long(), class_weight, *where, *loss, *place)
    return _reduced(results, target, class_weight, ignore_index, z_loss, reduction, with_parts)


def _reduced(
    results: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    z_loss: float,
    reduction: str,
    with_parts: bool,
) -> Tensor | LossParts:
    """From loss, log-sum-exp and correctness of each row."""
    losses, lse, correct = results
    counted = target != ignore_index
    if reduction == "mean" and class_weight is not None:
        count = class_weight.to(losses.dtype)[target.where(counted, 0)].masked_fill(~counted, 0).sum()
    else:
        count = counted.sum()

    def reduce(rows: Tensor) -> Tensor:
        return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.sum() / count

    loss = reduce(losses)
    if not with_parts:
        return loss
    z = reduce((z_loss * lse.square()).masked_fill(~counted, 0))
    return LossParts(loss, z, correct if reduction == "none" else correct.sum() / counted.sum())


def _check_target(target: Tensor, shape: torch.Size, like: Tensor) -> None:
    check_indices("target", target)
    if target.shape != shape:
        raise ValueError(f"target: expected shape {tuple(shape)}, one class a row, got {tuple(target.shape)}")
    check_same_device("target", target, "the logits", like)


def _checked_loss(
    like: Tensor,
    vocab: int,
    ignore_index: int,
    label_smoothing: float,
    label_smoothing_over: str,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    class_weight: Tensor | None,
    reduction: str,
    with_parts: bool,
) -> tuple[int, float, float, float, float]:
    """The numbers among them as the ops take them. ``like``: the logits, or what has their dtype and device."""
    if not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index: expected an int, got {ignore_index!r}")
    for name, value, expected, fine in (
        ("label_smoothing", label_smoothing, "a number in [0, 1)", lambda v: 0.0 <= v < 1.0),
        ("z_loss", z_loss, "a finite number of at least 0", lambda v: 0.0 <= v < math.inf),
        ("logit_scale", logit_scale, "a finite number other than 0", lambda v: math.isfinite(v) and v != 0.0),
        ("softcap", softcap, "a finite number of at least 0", lambda v: 0.0 <= v < math.inf),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fine(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if label_smoothing_over not in SMOOTHED:
        raise ValueError(f"label_smoothing_over: expected one of {SMOOTHED}, got {label_smoothing_over!r}")
    if label_smoothing_over == "others" and label_smoothing:
        if label_smoothing * vocab >= vocab - 1:
            most = f"less than {vocab - 1}/{vocab}"
            raise ValueError(f"label_smoothing: expected {most} over the other classes, got {label_smoothing!r}")
        label_smoothing *= vocab / (vocab - 1)
    if class_weight is not None:
        check_tensor("class_weight", class_weight)
        if tuple(class_weight.shape) != (vocab,):
            raise ValueError(f"class_weight: expected [V] = [{vocab}], got shape {tuple(class_weight.shape)}")
        if class_weight.dtype not in (like.dtype, torch.float32):
            raise ValueError(f"class_weight: expected {like.dtype} or torch.float32, got {class_weight.dtype}")
        if class_weight.requires_grad:
            raise ValueError("class_weight: expected a tensor without gradient, got requires_grad=True")
        check_same_device("class_weight", class_weight, "the logits", like)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if not isinstance(with_parts, bool):
        raise ValueError(f"with_parts: expected True or False, got {with_parts!r}")
    return ignore_index, float(label_smoothing), float(z_loss), float(logit_scale), float(softcap)
