"""All-gather -> matmul and matmul -> reduce-scatter in chunks that travel while others are multiplied."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from ..comm.steps import Compute, Transfer
from ..tensors import reshaped
from . import schedule as schedules
from .pipeline import Call, Partials, Sequence3D, TransportOf, matmul_into, run, weights_signature


def gather_matmul(
    engine: str,
    transport: TransportOf,
    group: ProcessGroup,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    seq_dim: int,
    seq_len: int,
    chunks: int,
    keep: bool,
) -> list[Tensor]:
    """linear(all_gather(x)) for each weight; last all rows of x, which are only there for sure if ``keep``.

    x [..., S/t, ..., K], weights [N, K], results [..., S, ..., N].
    """
    features = x.shape[-1]
    details = weights_signature(weights, f"chunks={chunks}", f"engine={engine}")
    call = Call("all_gather_linear", x, seq_dim, seq_len, group, *details)
    mine = call.mine(x)
    outs = [call.empty_whole(w.shape[0], x) for w in weights]
    window = call.window(chunks, features, x)
    arrived: dict[int, Sequence3D] = {}  # within a window a chunk lives until it has been multiplied
    # Without a bound, or to be kept, chunks lie where they belong in the whole.
    lasting = keep or window is None
    whole = call.around(mine) if keep else call.empty_whole(features, x) if lasting else mine

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
        arrived[start] = chunk = Sequence3D.empty(call.layout, start, stop, features, x)
        return chunk.data

    run(
        schedules.gather_matmul(call.shard, chunks, window=window),
        call.exchange(features, x, transport),
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=target,
        compute=matmul,
    )
    return [reshaped(out.data, call.shape(seq_len, out.features)) for out in outs] + [
        reshaped(whole.data, call.shape(seq_len, whole.features)) if keep else x
    ]


def matmul_scatter(
    engine: str,
    transport: TransportOf,
    name: str,
    group: ProcessGroup,
    x: Tensor,
    weight: Tensor,
    seq_dim: int,
    chunks: int,
) -> Partials:
    """The partial results of every rank's linear(x, weight) for our rows. x [..., S, ..., K/t], weight [N, K/t]."""
    details = weights_signature([weight], f"chunks={chunks}", f"engine={engine}")
    call = Call(name, x, seq_dim, x.shape[seq_dim], group, *details)
    shard, features = call.shard, weight.shape[0]
    whole = call.whole(x)
    outgoing: dict[int, Sequence3D] = {}
    exchange = call.exchange(features, x, transport)
    partials = Partials(call, features, x)

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
