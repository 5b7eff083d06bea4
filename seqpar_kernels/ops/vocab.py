"""``seqpar::vocab_embedding``, ``vocab_cross_entropy`` and ``linear_cross_entropy``: a vocabulary cut over t ranks.

The cut is that of :func:`seqpar_kernels.layout.vocabulary_range`. Each rank reduces its own logits to four numbers a
row (maximum, sum of exponentials, the target's logit, sum). One all-gather of these, combined in rank order, gives the
loss on every rank (Shoeybi et al. 2019, section 3, with one exchange in place of three). In ``linear_cross_entropy``
logits exist for a few rows at a time only: the forward keeps the log-sum-exp of each row, and the backward computes the
logits again together with their gradient (Wijmans et al. 2024, "Cut Your Losses").

| op | result | shape | communication |
|---|---|---|---|
| vocab_embedding | out | [..., S/t, ..., H] | reduce-scatter of [..., S, ..., H] |
| | dweight | [V/t, H] | all-gather of dy [..., S/t, ..., H] |
| vocab_embedding, whole | out | [..., S, ..., H] | all-reduce |
| | dweight | [V/t, H] | none |
| vocab_cross_entropy | loss, lse, correct | [...] | all-gather of 4 numbers a row |
| | dlogits | [..., V/t] | none |
| linear_cross_entropy | loss, lse, correct | [..., S, ...] | all-gather of x [..., S/t, ..., H]; 4 numbers a row |
| | dx | [..., S/t, ..., H] | all-gather of x, reduce-scatter of dx |
| | dweight, dbias | [V/t, H], [V/t] | that of dx; without dx the all-gather of x |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm.steps import Compute, Transfer
from ..layout import SequenceShard, group_rank, group_size, vocabulary_range
from ..overlap import engines, pipeline
from ..overlap import schedule as schedules
from ..overlap.pipeline import Call, Partials, Sequence3D, run
from ..tensors import reshaped
from .cross_entropy import Loss, all_statistics, pieces, wide_dtype
from .mappings import all_reduce
from .registry import group_named, register, without_autocast

# --- embedding -------------------------------------------------------------------------------------------------------


def _local_rows(ids: Tensor, group: str, vocab: int) -> tuple[Tensor, Tensor, int]:
    """(the row of each id in this rank's weight, whether this rank has it, the number of its rows)."""
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
    # Gradients of other ranks' rows, and of the padding entry, go to an extra row that is dropped.
    rows = rows.where(owned & (ids != padding_idx), count)
    wide = dy.to(wide_dtype(dy.dtype)).contiguous()
    dw = torch.ops.aten.embedding_dense_backward(wide, rows, count + 1, count, False)
    return dw[:count].to(dy.dtype, copy=True)


def _embedding_backward_fake(
    dy: Tensor, ids: Tensor, group: str, vocab: int, padding_idx: int, seq_dim: int, whole: bool
) -> Tensor:
    pg = group_named(group)
    start, stop = vocabulary_range(vocab, group_size(pg), group_rank(pg))
    return dy.new_empty(stop - start, dy.shape[-1])


# --- cross-entropy of logits -----------------------------------------------------------------------------------------

_LOSS = (
    "Tensor? class_weight, str group, SymInt vocab, int ignore_index, float label_smoothing, float z_loss, "
    "float logit_scale, float softcap"
)
#: How many arguments of an op those are.
_LOSS_ARGUMENTS = 8

Losses = tuple[Tensor, Tensor, Tensor]  # loss, log-sum-exp, whether no logit is above the target's


def _loss(class_weight: Tensor | None, *options: Any) -> Loss:
    return Loss.on(*options, class_weight)


def _logits_kernel(logits: Tensor, target: Tensor, *options: Any) -> Losses:
    loss = _loss(*options)
    matrix, classes = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1)
    loss.check(classes)
    statistics = matrix.new_empty(4, matrix.shape[0], dtype=wide_dtype(logits.dtype))
    for rows in pieces(matrix.shape[0], 0, matrix.shape[1], wide_dtype(logits.dtype)):
        loss.statistics(matrix[rows], classes[rows], statistics[:, rows])
    return _combined(loss, statistics, options, target)


def _combined(loss: Loss, statistics: Tensor, options: tuple[Any, ...], target: Tensor) -> Losses:
    """From this rank's statistics [4, rows]."""
    _, group, *_ = options
    losses, lse, correct = loss.combine(all_statistics(statistics, group), target.reshape(-1))
    return reshaped(losses, target.shape), reshaped(lse, target.shape), reshaped(correct, target.shape)


def _logits_fake(logits: Tensor, target: Tensor, *options: Any) -> Losses:
    losses = logits.new_empty(target.shape, dtype=wide_dtype(logits.dtype))
    return losses, torch.empty_like(losses), torch.empty_like(losses, dtype=torch.bool)


class _LogitsCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any) -> Losses:
        losses, lse, correct = vocab_cross_entropy.below_autograd(logits, target, class_weight, *options)
        ctx.save_for_backward(logits, target, class_weight, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse, correct)
        return losses, lse, correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, target, class_weight, lse = ctx.saved_tensors
        dlogits = vocab_cross_entropy_backward(dloss, logits, target, lse, class_weight, *ctx.options)
        return dlogits, None, None, *(None,) * len(ctx.options)


def _logits_backward_kernel(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> Tensor:
    loss = _loss(*options)
    matrix = logits.reshape(target.numel(), logits.shape[-1])
    classes, lses, dlosses = target.reshape(-1), lse.reshape(-1), dloss.reshape(-1)
    d = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for rows in pieces(matrix.shape[0], 0, matrix.shape[1], wide_dtype(logits.dtype)):
        d[rows] = loss.gradient(matrix[rows], classes[rows], lses[rows], dlosses[rows])
    return reshaped(d, logits.shape)


def _logits_backward_fake(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> Tensor:
    return logits.new_empty(logits.shape)


# --- head and cross-entropy in one -----------------------------------------------------------------------------------

_PLACE = f"{_LOSS}, int seq_dim, SymInt seq_len, int chunks, str engine, int rows"


def _details(weight: Tensor, bias: Tensor | None, vocab: int, *more: object) -> tuple[object, ...]:
    return (f"H={weight.shape[1]}", f"V={vocab}", f"bias={bias is not None}", *more)


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of the loss, and where and how it is computed."""
    return arguments[:_LOSS_ARGUMENTS], arguments[_LOSS_ARGUMENTS:]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(rows, weight, bias)


@without_autocast
def _head_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *arguments: Any) -> Losses:
    options, (seq_dim, seq_len, chunks, engine, rows) = _split(arguments)
    _, group, vocab, *_ = options
    loss = _loss(*options)
    loss.check(target)
    details = _details(weight, bias, vocab, f"chunks={chunks}", f"engine={engine}")
    call = Call("linear_cross_entropy", x, seq_dim, seq_len, group_named(group), *details)
    mine = call.mine(x)
    way = engines.named(engine)
    window = call.window(chunks, x.shape[-1], x) if way.chunked else None
    arrived: dict[int, Sequence3D] = {}  # with a window a chunk is freed once it has been multiplied
    whole = mine if call.group is None or window is not None else call.around(mine)
    classes = call.whole(target.unsqueeze(-1))
    wide = wide_dtype(x.dtype)
    statistics = x.new_empty(4, call.layout.outer, seq_len * call.layout.inner, dtype=wide)

    def compute(step: Compute) -> None:
        inner = call.layout.inner
        h = arrived.pop(step.start, whole).matrices(step.start, step.stop)
        y = classes.matrices(step.start, step.stop).squeeze(-1)
        out = statistics[:, :, step.start * inner : step.stop * inner]
        for o in range(call.layout.outer):
            for piece in pieces(h.shape[1], rows, weight.shape[0], wide):
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
    return _combined(loss, statistics.view(4, -1), options, target)


def _head_fake(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *arguments: Any) -> Losses:
    return _logits_fake(x, target)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        *arguments: Any,
    ) -> Losses:
        losses, lse, correct = linear_cross_entropy.below_autograd(x, weight, bias, target, class_weight, *arguments)
        ctx.save_for_backward(x, weight, bias, target, lse, class_weight)
        ctx.arguments = arguments
        ctx.mark_non_differentiable(lse, correct)
        return losses, lse, correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        *tensors, class_weight = ctx.saved_tensors
        out = iter(linear_cross_entropy_backward(dloss, *tensors, *needs, class_weight, *ctx.arguments))
        return (*(next(out) if need else None for need in needs), None, None, *(None,) * len(ctx.arguments))


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
    *arguments: Any,
) -> list[Tensor]:
    options, (seq_dim, seq_len, chunks, engine, rows) = _split(arguments)
    _, group, vocab, *_ = options
    loss = _loss(*options)
    details = _details(weight, bias, vocab, f"chunks={chunks}", f"dx={want_dx} dw={want_dw} db={want_db}")
    call = Call("linear_cross_entropy backward", x, seq_dim, seq_len, group_named(group), *details)
    shard, features = call.shard, x.shape[-1]
    mine = call.mine(x)
    way = engines.named(engine)
    chunks = chunks if way.chunked else 1
    window = call.window(chunks, features, x)
    whole = mine if call.group is None else call.around(mine)
    classes, lses, dlosses = (call.whole(t.reshape(target.shape).unsqueeze(-1)) for t in (target, lse, dloss))
    wide = wide_dtype(x.dtype)
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
            for piece in pieces(h.shape[1], rows, weight.shape[0], wide):
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

#: Returns the loss and the log-sum-exp of each row, and whether no logit is above the target's.
vocab_cross_entropy = register(
    f"vocab_cross_entropy(Tensor logits, Tensor target, {_LOSS}) -> (Tensor, Tensor, Tensor)",
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
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, {_PLACE}) -> (Tensor, Tensor, Tensor)",
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
