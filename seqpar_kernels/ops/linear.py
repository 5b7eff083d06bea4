"""``seqpar::all_gather_linear`` and ``seqpar::linear_reduce_scatter``: schemas, fakes, autograd.

Column-parallel keeps its local shard of x and gathers again in the backward; row-parallel keeps its input and gathers
dy (Korthikanti et al. 2022, section 4.2.2). Bias gradients are complete on every rank: of a column-parallel bias
because dy is whole there, of a row-parallel one because dy has been gathered anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..layout import SequenceShard, group_rank, group_size
from ..overlap import schedule as schedules
from ..overlap import waiting
from ..overlap.pipeline import Call, Partials, Sequence3D, matmul_into, reshaped, rows_of, run
from ..overlap.planner import Work, spreads_weight_gradient
from ..overlap.schedule import Compute, Transfer
from ..overlap.tuning import figures_of
from . import linear_uncut
from .library import apply, group_named, register, without_autocast
from .main_grad import weight_gradient

#: Where an op runs, in every schema.
PLACE = "str group, int seq_dim, SymInt seq_len, int chunks, str engine"


def _sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums of [rows, N], accumulated in fp32 (fp64) and rounded once. [N]"""
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.sum(0, dtype=acc).to(dtype)


def _weights_signature(weights: list[Tensor], *more: object) -> tuple[object, ...]:
    return (f"K={weights[0].shape[1]}", f"N={[w.shape[0] for w in weights]}", *more)


def _shape_with(x: Tensor, seq_dim: int, length: int, features: int) -> list[int]:
    shape = list(x.shape)
    shape[seq_dim], shape[-1] = length, features
    return shape


def _rows_here(group: str, seq_len: int) -> int:
    pg = group_named(group)
    return SequenceShard(seq_len, group_size(pg), group_rank(pg)).size


# --- all_gather_linear -----------------------------------------------------------------------------------------------


@without_autocast
def _gather_kernel(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
) -> list[Tensor]:
    return _gather_linear(x, weights, biases, group, seq_dim, seq_len, chunks, engine, keep=False)[:-1]


@without_autocast
def _gather_keeping_kernel(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *place: Any) -> list[Tensor]:
    return _gather_linear(x, weights, biases, *place, keep=True)


def _gather_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    *,
    keep: bool,
) -> list[Tensor]:
    """linear(all_gather(x)) for each weight; last all rows of x, which are only there for sure if ``keep``."""
    pg = group_named(group)
    if pg is None:
        whole_x = x.clone() if keep else x
        return [*(torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)), whole_x]
    if engine == "single":
        return linear_uncut.gather_linear(pg, x, weights, biases, seq_dim, seq_len)
    details = _weights_signature(weights, f"chunks={chunks}", f"engine={engine}")
    call = Call("all_gather_linear", x, seq_dim, seq_len, pg, *details)
    mine = call.mine(x)
    outs = [call.empty_whole(w.shape[0], x) for w in weights]
    exchange = call.exchange(x.shape[-1], x, engine)
    if engine == "fused":
        whole = waiting.gather_matmul(call, exchange, chunks, mine, weights, biases, outs)
        return [reshaped(out.data, call.shape(seq_len, out.features)) for out in (*outs, whole)]
    window = call.window(chunks, x.shape[-1], x)
    arrived: dict[int, Sequence3D] = {}  # within a window a chunk lives until it has been multiplied
    # Without a bound, or to be kept, chunks lie where they belong in the whole.
    lasting = keep or window is None
    whole = call.around(mine) if keep else call.empty_whole(x.shape[-1], x) if lasting else mine

    def matmul(step: Compute) -> None:
        if step.start == call.shard.start and step.stop == call.shard.stop:
            source = mine
        else:
            source = whole if lasting else arrived.pop(step.start)
        rows = source.matrices(step.start, step.stop)
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            matmul_into(out.matrices(step.start, step.stop), rows, weight.t(), bias)

    def target(transfer: Transfer) -> Tensor:
        start, stop = transfer.rows.start, transfer.rows.stop
        if lasting:
            return whole.window(start, stop)
        arrived[start] = chunk = Sequence3D.empty(call.layout, start, stop, x.shape[-1], x)
        return chunk.data

    run(
        schedules.gather_matmul(call.shard, chunks, window=window),
        exchange,
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=target,
        compute=matmul,
    )
    return [reshaped(out.data, call.shape(seq_len, out.features)) for out in outs] + [
        reshaped(whole.data, call.shape(seq_len, whole.features)) if keep else x
    ]


def _gather_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], group: str, seq_dim: int, seq_len: int, *plan: Any
) -> list[Tensor]:
    return [x.new_empty(_shape_with(x, seq_dim, seq_len, w.shape[0])) for w in weights]


def _gather_keeping_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], group: str, seq_dim: int, seq_len: int, *plan: Any
) -> list[Tensor]:
    outs = _gather_fake(x, weights, biases, group, seq_dim, seq_len, *plan)
    return [*outs, x.new_empty(_shape_with(x, seq_dim, seq_len, x.shape[-1]))]


class _AllGatherLinear(torch.autograd.Function):
    """``keep``: all rows of x are kept for the backward, and come back as one more output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, main_grads: list[Tensor | None], keep: bool, place: tuple[Any, ...], *args: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(main_grads)
        weights, biases = list(args[:count]), list(args[count:])
        ctx.set_materialize_grads(False)
        ctx.main_grads, ctx.place = main_grads, place  # not saved: other micro-batches may add to them first
        ctx.keep = keep
        if keep:
            outs = all_gather_linear_keeping.below_autograd(x, weights, biases, *place)
            ctx.mark_non_differentiable(outs[-1])
            ctx.save_for_backward(outs[-1], *weights)
            return tuple(outs)
        ctx.save_for_backward(x, *weights)
        return tuple(all_gather_linear.below_autograd(x, weights, biases, *place))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        main_grads, needs = ctx.main_grads, ctx.needs_input_grad
        count = len(main_grads)
        grads = grads[:count]
        reached = [grad is not None for grad in grads]
        if not any(reached):
            return (None,) * len(needs)
        want_dw = [need and hit for need, hit in zip(needs[4 : 4 + count], reached, strict=True)]
        want_db = [need and hit for need, hit in zip(needs[4 + count :], reached, strict=True)]
        args = (x, list(grads), weights, needs[0], want_dw, want_db, ctx.keep, *ctx.place)
        if any(main_grad is not None for main_grad in main_grads):
            out = iter(all_gather_linear_backward_into(*args, main_grads))
        else:
            out = iter(all_gather_linear_backward(*args))
        dx = next(out) if needs[0] else None
        dws = [next(out) if want else None for want in returned(want_dw, main_grads)]
        dbs = [next(out) if want else None for want in want_db]
        return (dx, None, None, None, *dws, *dbs)


def returned(want_dw: list[bool], main_grads: list[Tensor | None] | None) -> list[bool]:
    """Which weight gradients come back: the others are added to their main_grad."""
    if main_grads is None:
        return want_dw
    return [want and main_grad is None for want, main_grad in zip(want_dw, main_grads, strict=True)]


def _gather_autograd(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *place: Any) -> list[Tensor]:
    return all_gather_linear_into([None] * len(weights), x, weights, biases, *place)


def _gather_keeping_autograd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *place: Any
) -> list[Tensor]:
    return all_gather_linear_into([None] * len(weights), x, weights, biases, *place, keep=True)


def all_gather_linear_into(
    main_grads: list[Tensor | None],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    *place: Any,
    keep: bool = False,
) -> list[Tensor]:
    """all_gather_linear with gradients of weights added to ``main_grads``; not traceable where there are any.

    With ``keep`` it is all_gather_linear_keeping.
    """
    # Spreads the lists: autograd sees only tensors that are arguments of their own.
    return list(apply(_AllGatherLinear, x, main_grads, keep, place, *weights, *biases))


@without_autocast
def _gather_backward_kernel(
    x: Tensor,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    gathered: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grads: list[Tensor | None] | None = None,
) -> list[Tensor]:
    pg = group_named(group)
    if pg is not None and engine == "single":
        dx, gradients = linear_uncut.gather_linear_backward(
            pg, x, grads, weights, want_dx, want_dw, main_grads, gathered, seq_dim, seq_len
        )
        return _gradients(dx, gradients, grads, weights, want_db)
    wants = f"dx={want_dx} dw={want_dw} gathered={gathered}"
    details = _weights_signature(weights, f"chunks={chunks}", wants)
    call = Call("all_gather_linear backward", x, seq_dim, seq_len, pg, *details)
    shard, features = call.shard, x.shape[-1]
    # A weight whose output nobody used has no gradient and adds nothing to dx.
    used = [(i, call.whole(g.contiguous())) for i, g in enumerate(grads) if g is not None]
    if gathered:
        mine = whole = call.whole(x)
    else:
        mine = call.mine(x)
        whole = call.around(mine) if pg is not None and any(want_dw) else mine
    outgoing: dict[int, Sequence3D] = {}
    exchange = call.exchange(features, x, engine)
    partials = Partials(call, features, x) if want_dx else None
    dws: list[Tensor | None] = []

    def compute(step: Compute) -> None:
        if step.stage == "dgrad":
            assert partials is not None
            if (step.start, step.stop) == (shard.start, shard.stop):
                out = partials.own_matrices(step.start, step.stop)
            else:
                buffer = outgoing[step.start] = exchange.empty(step.start, step.stop, features, x)
                out = buffer.matrices(step.start, step.stop)
            for position, (i, dy) in enumerate(used):
                matmul_into(out, dy.matrices(step.start, step.stop), weights[i], add=position > 0)
        elif step.stage == "wgrad":
            rows = whole.data.reshape(-1, features)
            for i, dy in used:
                if want_dw[i]:
                    dy_rows = dy.data.reshape(-1, dy.features)
                    dws.append(weight_gradient(main_grads[i] if main_grads else None, dy_rows, rows))

    def source(transfer: Transfer) -> Tensor:
        rows = transfer.rows
        if transfer.kind == "gather":
            return mine.window(rows.start, rows.stop)
        return outgoing.pop(rows.start).data  # the session keeps it until it has left

    def target(transfer: Transfer) -> Tensor:
        rows = transfer.rows
        if transfer.kind == "gather":
            return whole.window(rows.start, rows.stop)
        assert partials is not None
        return partials.window(transfer.source, rows.start, rows.stop)

    window = call.window(chunks, features, x)
    steps = schedules.column_backward(
        shard, chunks, dgrad=want_dx, wgrad=any(want_dw), gather=not gathered, window=window
    )
    run(steps, exchange, source, target, compute)
    dx = partials.reduce(None) if partials is not None else None
    return _gradients(dx, dws, grads, weights, want_db)


def _gradients(
    dx: Tensor | None,
    dws: list[Tensor | None],
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_db: list[bool],
) -> list[Tensor]:
    """What the op returns: dx, the weights' gradients that go nowhere else, the biases'."""
    out = [] if dx is None else [dx]
    out += [dw for dw in dws if dw is not None]
    for weight, grad, want in zip(weights, grads, want_db, strict=True):
        if want:
            assert grad is not None
            out.append(_sum_rows(rows_of(grad), weight.dtype))
    return out


def _gather_backward_fake(
    x: Tensor,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    gathered: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grads: list[Tensor | None] | None = None,
) -> list[Tensor]:
    rows = _rows_here(group, seq_len) if gathered else x.shape[seq_dim]
    out = [x.new_empty(_shape_with(x, seq_dim, rows, x.shape[-1]))] if want_dx else []
    out += [w.new_empty(w.shape) for w, want in zip(weights, returned(want_dw, main_grads), strict=True) if want]
    return out + [w.new_empty(w.shape[0]) for w, want in zip(weights, want_db, strict=True) if want]


# --- linear_reduce_scatter -------------------------------------------------------------------------------------------


@without_autocast
def _scatter_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, seq_dim: int, seq_len: int, chunks: int, engine: str
) -> Tensor:
    pg = group_named(group)
    if pg is None:
        return torch.nn.functional.linear(x, weight, bias)
    return partial_results("linear_reduce_scatter", x, weight, pg, seq_dim, chunks, engine).reduce(bias)


def partial_results(
    name: str, x: Tensor, weight: Tensor, group: ProcessGroup, seq_dim: int, chunks: int, engine: str
) -> Partials:
    """What every rank's part of ``linear(x, weight)`` is for our rows, the exchange hidden behind the matmul."""
    if engine == "single":
        return linear_uncut.partial_results(name, group, x, weight, seq_dim)
    seq_len = x.shape[seq_dim]
    details = _weights_signature([weight], f"chunks={chunks}", f"engine={engine}")
    call = Call(name, x, seq_dim, seq_len, group, *details)
    shard, features = call.shard, weight.shape[0]
    whole = call.whole(x)
    outgoing: dict[int, Sequence3D] = {}
    exchange = call.exchange(features, x, engine)
    partials = Partials(call, features, x)
    if engine == "fused":
        waiting.matmul_scatter(call, exchange, chunks, whole, weight, partials)
        return partials

    def compute(step: Compute) -> None:
        if step.stage != "matmul":
            return
        if (step.start, step.stop) == (shard.start, shard.stop):
            out = partials.own_matrices(step.start, step.stop)
        else:
            buffer = outgoing[step.start] = exchange.empty(step.start, step.stop, features, x)
            out = buffer.matrices(step.start, step.stop)
        matmul_into(out, whole.matrices(step.start, step.stop), weight.t())

    def source(transfer: Transfer) -> Tensor:
        return outgoing.pop(transfer.rows.start).data  # the session keeps it until it has left

    window = call.window(chunks, features, x)
    run(
        schedules.matmul_scatter(shard, chunks, window=window),
        exchange,
        source=source,
        target=lambda t: partials.window(t.source, t.rows.start, t.rows.stop),
        compute=compute,
    )
    return partials


def _scatter_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, seq_dim: int, seq_len: int, chunks: int, engine: str
) -> Tensor:
    return x.new_empty(scattered_shape(x, weight, group, seq_dim, seq_len))


def scattered_shape(x: Tensor, weight: Tensor, group: str, seq_dim: int, seq_len: int) -> list[int]:
    """[..., S/t, ..., N], our shard of ``linear(x, weight)``."""
    return _shape_with(x, seq_dim, _rows_here(group, seq_len), weight.shape[0])


class _LinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, place: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad, ctx.place = main_grad, place  # not saved: other micro-batches may add to it first
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear_reduce_scatter.below_autograd(x, weight, bias, *place)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dx, dweight, dbias = scatter_gradients(ctx.main_grad, dy, x, weight, ctx.bias_dtype, *needs, *ctx.place)
        return dx, dweight, dbias, None, None


def scatter_gradients(
    main_grad: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    *place: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight (None where it goes to ``main_grad``), dbias: those wanted."""
    args = (dy, x, weight, bias_dtype, want_dx, want_dw, want_db, *place)
    if main_grad is not None and want_dw:
        out = iter(linear_reduce_scatter_backward_into(*args, main_grad))
    else:
        out = iter(linear_reduce_scatter_backward(*args))
    dx, dw, db = (next(out) if want else None for want in (want_dx, want_dw and main_grad is None, want_db))
    return dx, dw, db


def _scatter_autograd(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    return linear_reduce_scatter_into(None, x, weight, bias, *place)


def linear_reduce_scatter_into(
    main_grad: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any
) -> Tensor:
    """linear_reduce_scatter with the gradient of its weight added to ``main_grad``; not traceable if there is one."""
    return apply(_LinearReduceScatter, x, weight, bias, main_grad, place)  # type: ignore[no-any-return]


@without_autocast
def _scatter_backward_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grad: Tensor | None = None,
) -> list[Tensor]:
    pg = group_named(group)
    features_out, features_in = weight.shape
    if pg is not None and engine == "single":
        dx, dweight, rows = linear_uncut.linear_scatter_backward(
            pg, dy, x, weight, want_dx, want_dw, want_db, main_grad, seq_dim, seq_len
        )
        db = _sum_rows(rows_of(rows), bias_dtype) if want_db and bias_dtype is not None else None
        return [gradient for gradient in (dx, dweight, db) if gradient is not None]
    details = _weights_signature([weight], f"chunks={chunks}", f"dx={want_dx} dw={want_dw} db={want_db}")
    call = Call("linear_reduce_scatter backward", dy, seq_dim, seq_len, pg, *details)
    shard = call.shard
    mine = call.mine(dy.contiguous())
    whole = mine if pg is None else call.around(mine)
    whole_dx = call.empty_whole(features_in, x) if want_dx else None
    whole_x = call.whole(x) if want_dw else whole
    dw: Tensor | None = None

    def compute(step: Compute) -> None:
        nonlocal dw
        if step.stage == "dgrad":
            assert whole_dx is not None
            matmul_into(whole_dx.matrices(step.start, step.stop), whole.matrices(step.start, step.stop), weight)
        elif step.stage == "wgrad":
            dy_rows, x_rows = (rows_of(of.matrices(step.start, step.stop)) for of in (whole, whole_x))
            made = weight_gradient(main_grad if dw is None else dw, dy_rows, x_rows)
            dw = dw if made is None else made

    window = call.window(chunks, features_out, dy)
    spread = want_dw and _spreads(pg, call, dy, seq_dim, weight, main_grad, chunks, want_dx)
    steps = schedules.row_backward(shard, chunks, dgrad=want_dx, wgrad=want_dw, spread=spread, window=window)
    run(
        steps,
        call.exchange(features_out, dy, engine),
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=lambda t: whole.window(t.rows.start, t.rows.stop),
        compute=compute,
    )
    out = [reshaped(whole_dx.data, call.shape(seq_len, features_in))] if whole_dx is not None else []
    out += [] if dw is None else [dw]
    if want_db:
        assert bias_dtype is not None
        out.append(_sum_rows(whole.data.reshape(-1, features_out), bias_dtype))
    return out


def _spreads(
    group: ProcessGroup | None,
    call: Call,
    dy: Tensor,
    seq_dim: int,
    weight: Tensor,
    main_grad: Tensor | None,
    chunks: int,
    want_dx: bool,
) -> bool:
    """Whether wgrad runs chunk by chunk. What is sent, and when, is the same: each rank may decide for itself."""
    summed_in = weight if main_grad is None else main_grad
    if group is None or summed_in.dtype.itemsize < 4:  # every chunk's sum would be rounded to 16 bits
        return False
    figures = figures_of(group)["cpu" if dy.device.type == "cpu" else "cuda"]
    work = Work.of(dy, seq_dim, call.shard, weight.shape[0], weight.numel())
    return spreads_weight_gradient(chunks, work, figures, want_dx)


def _scatter_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grad: Tensor | None = None,
) -> list[Tensor]:
    out = [x.new_empty(x.shape)] if want_dx else []
    if want_dw and main_grad is None:
        out.append(weight.new_empty(weight.shape))
    if want_db:
        out.append(weight.new_empty(weight.shape[0], dtype=bias_dtype))
    return out


all_gather_linear = register(
    f"all_gather_linear(Tensor x, Tensor[] weights, Tensor?[] biases, {PLACE}) -> Tensor[]",
    _gather_kernel,
    _gather_fake,
    _gather_autograd,
)

#: The same for a backward that does not gather again: returns all rows of x too, last, and keeps them.
all_gather_linear_keeping = register(
    f"all_gather_linear_keeping(Tensor x, Tensor[] weights, Tensor?[] biases, {PLACE}) -> Tensor[]",
    _gather_keeping_kernel,
    _gather_keeping_fake,
    _gather_keeping_autograd,
)

_GATHER_BACKWARD = (
    f"Tensor x, Tensor?[] grads, Tensor[] weights, bool want_dx, bool[] want_dw, bool[] want_db, bool gathered, {PLACE}"
)

#: Returns dx if wanted, then the wanted weight gradients, then the wanted bias gradients. ``gathered``: x is all rows.
all_gather_linear_backward = register(
    f"all_gather_linear_backward({_GATHER_BACKWARD}) -> Tensor[]", _gather_backward_kernel, _gather_backward_fake, None
)

#: The same, but a weight gradient that has a main_grad is added to it and not returned. An op of its own, since
#: torch.compile takes no op that both changes an argument and returns a list.
all_gather_linear_backward_into = register(
    f"all_gather_linear_backward_into({_GATHER_BACKWARD}, Tensor(a!)?[] main_grads) -> Tensor[]",
    _gather_backward_kernel,
    _gather_backward_fake,
    None,
)

linear_reduce_scatter = register(
    f"linear_reduce_scatter(Tensor x, Tensor weight, Tensor? bias, {PLACE}) -> Tensor",
    _scatter_kernel,
    _scatter_fake,
    _scatter_autograd,
)

_SCATTER_BACKWARD = (
    "Tensor dy, Tensor x, Tensor weight, ScalarType? bias_dtype, bool want_dx, bool want_dw, bool want_db, " + PLACE
)

#: Returns the wanted ones among dx, dweight, dbias.
linear_reduce_scatter_backward = register(
    f"linear_reduce_scatter_backward({_SCATTER_BACKWARD}) -> Tensor[]",
    _scatter_backward_kernel,
    _scatter_backward_fake,
    None,
)

#: The same with dweight, if wanted, added to main_grad.
linear_reduce_scatter_backward_into = register(
    f"linear_reduce_scatter_backward_into({_SCATTER_BACKWARD}, Tensor(a!) main_grad) -> Tensor[]",
    _scatter_backward_kernel,
    _scatter_backward_fake,
    None,
)
