"""``seqpar::vocab_embedding``, ``vocab_cross_entropy`` and ``linear_cross_entropy``: both ends of a language model.

The vocabulary is cut over the ranks, :func:`seqpar_kernels.layout.vocabulary_range`. Each rank reduces its own logits
to four numbers a row (maximum, sum of exponentials, the target's logit, sum); one exchange of these, combined in rank
order, gives the loss on every rank (Shoeybi et al. 2019, section 3, with one exchange in place of three). Fused with
the head's matmul, logits exist for a few rows at a time only: the forward keeps the log-sum-exp of each row, the
backward computes the logits again beside their gradient (Wijmans et al. 2024, "Cut Your Losses").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..comm.steps import Compute, Transfer
from ..layout import SequenceShard, group_rank, group_size, vocabulary_range
from ..overlap import engines, pipeline
from ..overlap import schedule as schedules
from ..overlap.pipeline import Call, Partials, Sequence3D, run
from ..tensors import reshaped
from .mappings import all_reduce
from .registry import group_named, register, without_autocast

#: Logits held at once where the caller does not say how many rows: 64 MiB at 16 bit, 128 MiB while they are fp32.
_LOGITS = 1 << 25
_MIN_ROWS = 128


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Loss(NamedTuple):
    """What is asked of one row: with q = (1 - s) * onehot + s / V, loss = cross_entropy(q, softmax) + z * lse^2."""

    start: int  # of this rank's part of the vocabulary
    stop: int
    vocab: int
    ignore_index: int
    label_smoothing: float
    z_loss: float

    @staticmethod
    def on(group: str, vocab: int, ignore_index: int, label_smoothing: float, z_loss: float) -> Loss:
        pg = group_named(group)
        start, stop = vocabulary_range(vocab, group_size(pg), group_rank(pg))
        return Loss(start, stop, vocab, ignore_index, label_smoothing, z_loss)

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(column here, whether it is here) of each row's target. [rows, 1] each"""
        column = (target - self.start).unsqueeze(-1)
        owned = (column >= 0) & (column < self.stop - self.start)
        return column.where(owned, 0), owned

    def check(self, target: Tensor) -> None:
        """Raises where a target is outside the vocabulary (on CUDA: when the device comes to it)."""
        fine = ((target >= 0) & (target < self.vocab)) | (target == self.ignore_index)
        torch._assert_async(fine.all(), f"target: expected class indices in 0..{self.vocab - 1} or ignore_index")

    def statistics(self, logits: Tensor, target: Tensor, out: Tensor) -> None:
        """Maximum, sum of exponentials, the target's logit and the sum of logits [rows, V/t]. out [4, rows]"""
        if logits.shape[-1] == 0:
            out.zero_()
            out[0] = -math.inf
            return
        x = logits.to(out.dtype)
        torch.amax(x, -1, out=out[0])
        column, owned = self.local(target)
        out[2] = x.gather(-1, column).masked_fill_(~owned, 0).squeeze(-1)
        out[3] = x.sum(-1) if self.label_smoothing else 0
        # A row of -inf has no maximum to subtract: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
        peak = out[0].masked_fill(out[0] == -math.inf, 0).unsqueeze(-1)
        out[1] = (x - peak).exp_().sum(-1)

    def combine(self, statistics: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and log-sum-exp of each row from the statistics of all ranks [ranks, 4, rows]. [rows] each"""
        peaks = statistics[:, 0]
        peak = peaks.amax(0)
        finite = peak.masked_fill(peak == -math.inf, 0)
        total, picked, summed = (torch.zeros_like(peak) for _ in range(3))
        for part in statistics:  # in rank order
            total += part[1] * (part[0] - finite).exp_()
            picked += part[2]
            summed += part[3]
        lse = total.log_() + finite
        losses = lse - (1 - self.label_smoothing) * picked
        if self.label_smoothing:
            losses -= self.label_smoothing / self.vocab * summed
        if self.z_loss:
            losses += self.z_loss * lse.square()
        return losses.masked_fill_(target == self.ignore_index, 0), lse

    def gradient(self, logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor) -> Tensor:
        """Of the logits [rows, V/t], in their dtype. [rows, V/t]"""
        dloss = dloss.masked_fill(target == self.ignore_index, 0).unsqueeze(-1)
        lse = lse.unsqueeze(-1)
        d = (logits.to(lse.dtype) - lse).exp_()
        if self.z_loss:
            d *= 1 + 2 * self.z_loss * lse
        if self.label_smoothing:
            d -= self.label_smoothing / self.vocab
        if d.shape[-1]:
            column, owned = self.local(target)
            d.scatter_add_(-1, column, owned.to(d.dtype).mul_(self.label_smoothing - 1))
        # An ignored row may hold infinities; zero times infinity is not zero.
        return d.mul_(dloss).masked_fill_(dloss == 0, 0).to(logits.dtype)


def _all_statistics(statistics: Tensor, group: str) -> Tensor:
    """[4, rows] of this rank -> [ranks, 4, rows]"""
    pg = group_named(group)
    if pg is None:
        return statistics.unsqueeze(0)
    ranks = group_size(pg)
    parts = pipeline.gather(statistics.view(1, -1), 0, ranks, pg, "cross_entropy")
    return parts.view(ranks, *statistics.shape)


def _pieces(rows: int, most: int, columns: int) -> Iterator[slice]:
    """Slices of at most ``most`` rows; 0: as many as make a good matmul and not too many logits."""
    step = most or max(_MIN_ROWS, _LOGITS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


# --- embedding -------------------------------------------------------------------------------------------------------


def _local_rows(ids: Tensor, group: str, vocab: int) -> tuple[Tensor, Tensor, int]:
    """(row here, whether it is here, how many are)."""
    pg = group_named(group)
    start, stop = vocabulary_range(vocab, group_size(pg), group_rank(pg))
    fine = (ids >= 0) & (ids < vocab)
    torch._assert_async(fine.all(), f"ids: expected indices in 0..{vocab - 1}")
    owned = (ids >= start) & (ids < stop)
    return ids - start, owned, stop - start


def _embedding_kernel(
    ids: Tensor, weight: Tensor, group: str, vocab: int, padding_idx: int, seq_dim: int, whole: bool
) -> Tensor:
    rows, owned, count = _local_rows(ids, group, vocab)
    if count == 0:
        partial = weight.new_zeros(*ids.shape, weight.shape[1])
    else:
        partial = weight[rows.where(owned, 0)].masked_fill_(~owned.unsqueeze(-1), 0)
    pg = group_named(group)
    if pg is None:
        return partial
    if whole:
        return all_reduce.below_autograd(partial, group)
    return pipeline.reduce_scatter(partial, seq_dim, pg, "vocab_embedding")


def _embedding_fake(
    ids: Tensor, weight: Tensor, group: str, vocab: int, padding_idx: int, seq_dim: int, whole: bool
) -> Tensor:
    shape = [*ids.shape, weight.shape[1]]
    pg = group_named(group)
    if not whole:
        shape[seq_dim] = SequenceShard(shape[seq_dim], group_size(pg), group_rank(pg)).size
    return weight.new_empty(shape)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, *place: Any) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.dtype, ctx.place = weight.dtype, place
        return vocab_embedding.below_autograd(ids, weight, *place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, vocab_embedding_backward(dy, ids, *ctx.place), *(None,) * len(ctx.place)


def _embedding_backward_kernel(
    dy: Tensor, ids: Tensor, group: str, vocab: int, padding_idx: int, seq_dim: int, whole: bool
) -> Tensor:
    pg = group_named(group)
    if pg is not None and not whole:
        dy = pipeline.gather(dy, seq_dim, ids.shape[seq_dim], pg, "vocab_embedding backward")
    rows, owned, count = _local_rows(ids, group, vocab)
    # Rows of others, and the padding entry, go to a row of no use behind the last.
    rows = rows.where(owned & (ids != padding_idx), count)
    wide = dy.to(_wide(dy.dtype)).contiguous()
    dw = torch.ops.aten.embedding_dense_backward(wide, rows, count + 1, count, False)
    return dw[:count].to(dy.dtype, copy=True)


def _embedding_backward_fake(
    dy: Tensor, ids: Tensor, group: str, vocab: int, padding_idx: int, seq_dim: int, whole: bool
) -> Tensor:
    pg = group_named(group)
    start, stop = vocabulary_range(vocab, group_size(pg), group_rank(pg))
    return dy.new_empty(stop - start, dy.shape[-1])


# --- cross-entropy of logits -----------------------------------------------------------------------------------------

_LOSS = "str group, SymInt vocab, int ignore_index, float label_smoothing, float z_loss"


def _logits_kernel(
    logits: Tensor, target: Tensor, group: str, vocab: int, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    loss = Loss.on(group, vocab, ignore_index, label_smoothing, z_loss)
    matrix, classes = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1)
    loss.check(classes)
    statistics = matrix.new_empty(4, matrix.shape[0], dtype=_wide(logits.dtype))
    for rows in _pieces(matrix.shape[0], 0, matrix.shape[1]):
        loss.statistics(matrix[rows], classes[rows], statistics[:, rows])
    losses, lse = loss.combine(_all_statistics(statistics, group), classes)
    return reshaped(losses, target.shape), reshaped(lse, target.shape)


def _logits_fake(logits: Tensor, target: Tensor, *place: Any) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(target.shape, dtype=_wide(logits.dtype))
    return losses, torch.empty_like(losses)


class _LogitsCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *place: Any) -> tuple[Tensor, Tensor]:
        losses, lse = vocab_cross_entropy.below_autograd(logits, target, *place)
        ctx.save_for_backward(logits, target, lse)
        ctx.place = place
        ctx.mark_non_differentiable(lse)
        return losses, lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        dlogits = vocab_cross_entropy_backward(dloss, logits, target, lse, *ctx.place)
        return dlogits, None, *(None,) * len(ctx.place)


def _logits_backward_kernel(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    group: str,
    vocab: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    loss = Loss.on(group, vocab, ignore_index, label_smoothing, z_loss)
    matrix = logits.reshape(target.numel(), logits.shape[-1])
    classes, lses, dlosses = target.reshape(-1), lse.reshape(-1), dloss.reshape(-1)
    d = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for rows in _pieces(matrix.shape[0], 0, matrix.shape[1]):
        d[rows] = loss.gradient(matrix[rows], classes[rows], lses[rows], dlosses[rows])
    return reshaped(d, logits.shape)


def _logits_backward_fake(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *place: Any) -> Tensor:
    return logits.new_empty(logits.shape)


# --- head and cross-entropy in one -----------------------------------------------------------------------------------

_PLACE = f"{_LOSS}, int seq_dim, SymInt seq_len, int chunks, str engine, int rows"


def _details(weight: Tensor, bias: Tensor | None, vocab: int, *more: object) -> tuple[object, ...]:
    return (f"H={weight.shape[1]}", f"V={vocab}", f"bias={bias is not None}", *more)


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(rows, weight, bias)


@without_autocast
def _head_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    group: str,
    vocab: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    rows: int,
) -> tuple[Tensor, Tensor]:
    loss = Loss.on(group, vocab, ignore_index, label_smoothing, z_loss)
    loss.check(target)
    details = _details(weight, bias, vocab, f"chunks={chunks}", f"engine={engine}")
    call = Call("linear_cross_entropy", x, seq_dim, seq_len, group_named(group), *details)
    mine = call.mine(x)
    way = engines.named(engine)
    window = call.window(chunks, x.shape[-1], x) if way.chunked else None
    arrived: dict[int, Sequence3D] = {}  # within a window a chunk lives until it has been multiplied
    whole = mine if call.group is None or window is not None else call.around(mine)
    classes = call.whole(target.unsqueeze(-1))
    wide = _wide(x.dtype)
    statistics = x.new_empty(4, call.layout.outer, seq_len * call.layout.inner, dtype=wide)

    def compute(step: Compute) -> None:
        inner = call.layout.inner
        h = arrived.pop(step.start, whole).matrices(step.start, step.stop)
        y = classes.matrices(step.start, step.stop).squeeze(-1)
        out = statistics[:, :, step.start * inner : step.stop * inner]
        for o in range(call.layout.outer):
            for piece in _pieces(h.shape[1], rows, weight.shape[0]):
                loss.statistics(_logits(h[o, piece], weight, bias), y[o, piece], out[:, o, piece])

    def target_of(transfer: Transfer) -> Tensor:
        start, stop = transfer.rows.start, transfer.rows.stop
        if window is None:
            return whole.window(start, stop)
        arrived[start] = chunk = Sequence3D.empty(call.layout, start, stop, x.shape[-1], x)
        return chunk.data

    run(
        schedules.gather_matmul(call.shard, chunks, pipelined=way.chunked, window=window),
        call.exchange(x.shape[-1], x, way.transport),
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=target_of,
        compute=compute,
    )
    losses, lse = loss.combine(_all_statistics(statistics.view(4, -1), group), target.reshape(-1))
    return reshaped(losses, target.shape), reshaped(lse, target.shape)


def _head_fake(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *place: Any) -> tuple[Tensor, Tensor]:
    return _logits_fake(x, target)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *place: Any
    ) -> tuple[Tensor, Tensor]:
        losses, lse = linear_cross_entropy.below_autograd(x, weight, bias, target, *place)
        ctx.save_for_backward(x, weight, bias, target, lse)
        ctx.place = place
        ctx.mark_non_differentiable(lse)
        return losses, lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        out = iter(linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *needs, *ctx.place))
        return (*(next(out) if need else None for need in needs), *(None,) * (1 + len(ctx.place)))


@without_autocast
def _head_backward_kernel(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    group: str,
    vocab: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    rows: int,
) -> list[Tensor]:
    loss = Loss.on(group, vocab, ignore_index, label_smoothing, z_loss)
    details = _details(weight, bias, vocab, f"chunks={chunks}", f"dx={want_dx} dw={want_dw} db={want_db}")
    call = Call("linear_cross_entropy backward", x, seq_dim, seq_len, group_named(group), *details)
    shard, features = call.shard, x.shape[-1]
    mine = call.mine(x)
    way = engines.named(engine)
    chunks = chunks if way.chunked else 1
    window = call.window(chunks, features, x)
    whole = mine if call.group is None else call.around(mine)
    classes, lses, dlosses = (call.whole(t.reshape(target.shape).unsqueeze(-1)) for t in (target, lse, dloss))
    wide = _wide(x.dtype)
    partials = Partials(call, features, x) if want_dx else None
    exchange = call.exchange(features, x, way.transport)
    outgoing: dict[int, Sequence3D] = {}
    dw = torch.zeros_like(weight, dtype=wide) if want_dw else None
    db = weight.new_zeros(weight.shape[0], dtype=wide) if want_db else None

    def compute(step: Compute) -> None:
        if step.stage != "dgrad":
            return
        out: Tensor | None = None
        if partials is not None and (step.start, step.stop) == (shard.start, shard.stop):
            out = partials.own_matrices(step.start, step.stop)
        elif partials is not None:
            buffer = outgoing[step.start] = exchange.empty(step.start, step.stop, features, x)
            out = buffer.matrices(step.start, step.stop)
        h = whole.matrices(step.start, step.stop)
        y, z, g = (t.matrices(step.start, step.stop).squeeze(-1) for t in (classes, lses, dlosses))
        for o in range(call.layout.outer):
            for piece in _pieces(h.shape[1], rows, weight.shape[0]):
                logits = _logits(h[o, piece], weight, bias)
                d = loss.gradient(logits, y[o, piece], z[o, piece], g[o, piece])
                if out is not None:
                    torch.mm(d, weight, out=out[o, piece])
                if dw is not None and dw.dtype == d.dtype:
                    dw.addmm_(d.t(), h[o, piece])
                elif dw is not None:
                    dw.add_(d.t().mm(h[o, piece]))
                if db is not None:
                    db.add_(d.sum(0, dtype=wide))

    def source(transfer: Transfer) -> Tensor:
        at = transfer.rows
        return mine.window(at.start, at.stop) if transfer.buffer == schedules.SHARD else outgoing.pop(at.start).data

    def target_of(transfer: Transfer) -> Tensor:
        at = transfer.rows
        if transfer.buffer == schedules.SHARD:
            return whole.window(at.start, at.stop)
        assert partials is not None
        return partials.window(transfer.source, at.start, at.stop)

    steps = schedules.gather_matmul_scatter(shard, chunks, scatter=want_dx, window=window)
    run(steps, exchange, source, target_of, compute)
    results = [partials.reduce(None)] if partials is not None else []
    return results + [t.to(weight.dtype) for t in (dw, db) if t is not None]


def _head_backward_fake(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    *place: Any,
) -> list[Tensor]:
    out = [x.new_empty(x.shape)] if want_dx else []
    out += [weight.new_empty(weight.shape)] if want_dw else []
    return out + ([weight.new_empty(weight.shape[0])] if want_db else [])


_LOOKUP = "str group, SymInt vocab, int padding_idx, int seq_dim, bool whole"

vocab_embedding = register(
    f"vocab_embedding(Tensor ids, Tensor weight, {_LOOKUP}) -> Tensor",
    _embedding_kernel,
    _embedding_fake,
    _Embedding.apply,
)
vocab_embedding_backward = register(
    f"vocab_embedding_backward(Tensor dy, Tensor ids, {_LOOKUP}) -> Tensor",
    _embedding_backward_kernel,
    _embedding_backward_fake,
    None,
)

#: Returns the loss and the log-sum-exp of each row.
vocab_cross_entropy = register(
    f"vocab_cross_entropy(Tensor logits, Tensor target, {_LOSS}) -> (Tensor, Tensor)",
    _logits_kernel,
    _logits_fake,
    _LogitsCrossEntropy.apply,
)
vocab_cross_entropy_backward = register(
    f"vocab_cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor lse, {_LOSS}) -> Tensor",
    _logits_backward_kernel,
    _logits_backward_fake,
    None,
)
linear_cross_entropy = register(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, {_PLACE}) -> (Tensor, Tensor)",
    _head_kernel,
    _head_fake,
    _LinearCrossEntropy.apply,
)

#: Returns the wanted ones among dx, dweight, dbias.
linear_cross_entropy_backward = register(
    "linear_cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor lse, "
    f"bool want_dx, bool want_dw, bool want_db, {_PLACE}) -> Tensor[]",
    _head_backward_kernel,
    _head_backward_fake,
    None,
)
