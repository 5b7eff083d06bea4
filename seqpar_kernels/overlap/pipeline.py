"""Runs a schedule over a transport with matmuls: the tensors behind :mod:`.schedule`.

Sequences are handled as [outer, S, inner * H] views of whatever layout came: [B, S, H] has outer = B and inner = 1,
[S, B, H] has outer = 1 and inner = B. A chunk of rows is ``outer`` blocks of memory, and each is sent, received and
multiplied in place; small ones are packed into one message.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..comm import select
from ..comm.steps import Compute, Drain, Post, Transfer, Wait
from ..comm.transport import Message, Room, Session, Transport, end, in_blocks
from ..kernels import select as select_kernels
from ..layout import SequenceShard, group_rank, group_size
from ..tensors import reshaped
from . import planner
from . import schedule as schedules
from .profiling import listening, span, traced
from .schedule import Schedule

# A matmul of fewer rows than this per outer index wastes the machine: rather one matmul and a copy into place.
_MIN_ROWS_IN_PLACE = 128


#: Makes the transport of a group.
TransportOf = Callable[[ProcessGroup], Transport]


class Layout(NamedTuple):
    """Where the sequence dimension lies: a tensor is [outer, S, inner, features]."""

    outer: int
    inner: int
    lead: tuple[int, ...]  # sizes before the sequence
    tail: tuple[int, ...]  # sizes between the sequence and the features

    def shape(self, length: int, features: int) -> tuple[int, ...]:
        return (*self.lead, length, *self.tail, features)


def layout_of(x: Tensor, seq_dim: int) -> Layout:
    lead, tail = tuple(x.shape[:seq_dim]), tuple(x.shape[seq_dim + 1 : -1])
    return Layout(math.prod(lead), math.prod(tail), lead, tail)


class Sequence3D:
    """A tensor over rows ``start..stop`` of the sequence, seen as [outer, rows, inner * features]."""

    def __init__(self, data: Tensor, layout: Layout, start: int, stop: int):
        self.features = data.shape[-1]
        self.inner = layout.inner
        self.start = start
        # [outer, rows, inner * features]
        self.data = data.reshape(layout.outer, stop - start, layout.inner * self.features)

    @staticmethod
    def empty(layout: Layout, start: int, stop: int, features: int, like: Tensor) -> Sequence3D:
        return Sequence3D(like.new_empty(layout.shape(stop - start, features)), layout, start, stop)

    def window(self, start: int, stop: int) -> Tensor:
        """[outer, stop - start, inner * features], a view."""
        return self.data[:, start - self.start : stop - self.start]

    def matrices(self, start: int, stop: int) -> Tensor:
        """[outer, (stop - start) * inner, features], a view."""
        rows = self.window(start, stop)
        return rows.reshape(rows.shape[0], (stop - start) * self.inner, self.features)


class Exchange:
    """Posts and waits of one op: which buffer each transfer reads or fills."""

    def __init__(self, call: Call, transport: Transport | None, row_bytes: int | Mapping[str, int]):
        """``row_bytes``: of a row in each buffer of the schedule, or in all of them."""
        self.name = call.name
        self._call, self._transport, self._row_bytes = call, transport, row_bytes
        self._session: Session | None = None
        self._staged: dict[Transfer, tuple[Tensor, Tensor]] = {}
        self._outgoing: dict[int, Transfer] = {}

    def open(self, steps: Schedule) -> Exchange:
        """All ranks are about to run ``steps``."""
        if self._transport is not None:
            self._outgoing = steps.outgoing
            known, buffers = self._row_bytes, steps.buffers
            if isinstance(known, int):
                row_bytes: tuple[int, ...] = (known,) * len(buffers)
            else:
                row_bytes = tuple(known[buffer.name] for buffer in buffers)
            room = Room(buffers, row_bytes, self._call.layout.outer)
            self._session = self._transport.session(self._call.signature, room)
        return self

    @property
    def takes_receives_early(self) -> bool:
        return self._session is not None and self._session.takes_receives_early(self._call.device_type)

    def empty(self, start: int, stop: int, features: int, like: Tensor) -> Sequence3D:
        """Room for partial results of rows that another rank owns, where they can be sent from."""
        assert self._session is not None
        layout = self._call.layout
        data = self._session.empty(self._outgoing[start], layout.shape(stop - start, features), like)
        return Sequence3D(data, layout, start, stop)

    def post(self, step: Post, source: Callable[[Transfer], Tensor], target: Callable[[Transfer], Tensor]) -> None:
        assert self._session is not None
        sends = [message for t in step.sends for message in self._messages(t, source(t))]
        receives = []
        for transfer in step.receives:
            window = target(transfer)
            if not self._in_blocks(transfer) and not window.is_contiguous():
                buffer = torch.empty_like(window, memory_format=torch.contiguous_format)
                self._staged[transfer] = (window, buffer)
                window = buffer
            receives += self._messages(transfer, window)
        self._session.post(sends, receives)

    def _messages(self, transfer: Transfer, window: Tensor) -> list[Message]:
        """``window`` [outer, rows, ...] as one message, or each of its blocks as one, where it lies."""
        if not self._in_blocks(transfer):
            return [Message(transfer, window.contiguous())]
        return [Message(transfer._replace(part=part), block) for part, block in enumerate(window)]

    def _in_blocks(self, transfer: Transfer) -> bool:
        outer, known = self._call.layout.outer, self._row_bytes
        if outer <= 1:
            return False
        row_bytes = known if isinstance(known, int) else known[transfer.buffer]
        return in_blocks(outer, transfer.size * row_bytes // outer)

    def wait(self, transfer: Transfer) -> None:
        assert self._session is not None
        if self._in_blocks(transfer):
            for part in range(self._call.layout.outer):
                self._session.wait(transfer._replace(part=part))
        else:
            self._session.wait(transfer)
        if transfer in self._staged:
            window, buffer = self._staged.pop(transfer)
            window.copy_(buffer)

    def drain(self) -> None:
        assert self._session is not None
        self._session.drain()

    def __enter__(self) -> None:
        """From here on the op is finished, or aborted where anything raises."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._session is not None:
            end(self._session, error)


def run(
    steps: Schedule,
    exchange: Exchange,
    source: Callable[[Transfer], Tensor],
    target: Callable[[Transfer], Tensor],
    compute: Callable[[Compute], None],
) -> None:
    """Execute a schedule. ``source``/``target`` give the [outer, rows, ...] window of a transfer at either end."""
    with exchange.open(steps):
        if exchange.takes_receives_early:
            steps = steps.receives_first
        for step in traced(exchange.name, steps):
            match step:
                case Post():
                    exchange.post(step, source, target)
                case Wait(transfer):
                    exchange.wait(transfer)
                case Drain():
                    exchange.drain()
                case Compute():
                    compute(step)


def matmul_into(out: Tensor, x: Tensor, weight_t: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
    """out (+)= x @ weight_t + bias for x [outer, rows, K], weight_t [K, N], out [outer, rows, N]; any may be a view."""
    if x.shape[0] == 1 or x.shape[1] >= _MIN_ROWS_IN_PLACE:
        for x_matrix, out_matrix in zip(x, out, strict=True):
            if add:
                out_matrix.addmm_(x_matrix, weight_t)
            elif bias is None:
                torch.mm(x_matrix, weight_t, out=out_matrix)
            else:
                torch.addmm(bias, x_matrix, weight_t, out=out_matrix)
        return
    product = torch.matmul(x.reshape(-1, x.shape[-1]), weight_t).view(out.shape)
    if add:
        out.add_(product)
    elif bias is None:
        out.copy_(product)
    else:
        torch.add(product, bias, out=out)


class Kind:
    """What calls of an op on tensors of the same sizes share: how the sequence lies, and what the ranks agree on."""

    def __init__(self, name: str, x: Tensor, seq_dim: int, length: int, group: ProcessGroup | None, *details: object):
        self.name = name
        self.shard = SequenceShard(length, group_size(group), group_rank(group))
        self.own_rows = self.shard.size
        self.layout = layout_of(x, seq_dim)
        self.device_type = x.device.type
        bound = planner.max_workspace_bytes()
        if bound is not None:  # what waits for what, and where chunks are cut, depends on it
            details = (*details, f"max_workspace_bytes={bound}")
        self.signature = (
            f"{name}(S={length} at dim {seq_dim}, other sizes {(*self.layout.lead, *self.layout.tail)}, "
            f"{x.dtype}, {self.device_type}, {', '.join(map(str, details))})"
        )

    def mine(self, x: Tensor) -> Sequence3D:
        """The local shard."""
        return Sequence3D(x, self.layout, self.shard.start, self.shard.stop)

    def whole(self, x: Tensor) -> Sequence3D:
        """Something over the unsharded sequence."""
        return Sequence3D(x, self.layout, 0, self.shard.length)

    def empty_whole(self, features: int, like: Tensor) -> Sequence3D:
        return Sequence3D.empty(self.layout, 0, self.shard.length, features, like)

    def around(self, mine: Sequence3D) -> Sequence3D:
        """Room for everybody's rows, ours in their place: what a gather fills."""
        whole = self.empty_whole(mine.features, mine.data)
        whole.window(self.shard.start, self.shard.stop).copy_(mine.data)
        return whole

    def shape(self, length: int, features: int) -> tuple[int, ...]:
        return self.layout.shape(length, features)


class Call(Kind):
    """One op on one rank of a group."""

    def __init__(self, name: str, x: Tensor, seq_dim: int, length: int, group: ProcessGroup | None, *details: object):
        super().__init__(name, x, seq_dim, length, group, *details)
        self.group = group

    def exchange(
        self, features: int | Mapping[str, int], like: Tensor, transport: TransportOf = select.messages
    ) -> Exchange:
        """Messages are rows of ``features`` elements like those of ``like``; or the bytes of a row in each buffer."""
        row_bytes: int | Mapping[str, int]
        if isinstance(features, int):
            row_bytes = self.layout.outer * self.layout.inner * features * like.element_size()
        else:
            row_bytes = features
        return Exchange(self, None if self.group is None else transport(self.group), row_bytes)

    def window(self, chunks: int, features: int, like: Tensor) -> int | None:
        """How many chunks of a shard with ``features`` may be under way at once; None: any number."""
        rows = -(-self.shard.of(0).size // chunks)
        outer, block_row = self.layout.outer, self.layout.inner * features * like.element_size()
        smallest = self.shard.length // self.shard.ranks // chunks
        return planner.window(rows * outer * block_row, outer > 1 and not in_blocks(outer, smallest * block_row))


class Partials:
    """All ranks' partial results for this rank's rows, [ranks, outer, S/t, inner * features], and their sum."""

    def __init__(self, call: Kind, features: int, like: Tensor):
        self._call = call
        self._features = features
        shape = (call.shard.ranks, *call.layout.shape(call.own_rows, features))
        self.data = like.new_empty(shape)

    @functools.cached_property
    def _views(self) -> list[Sequence3D]:
        return [self._call.mine(part) for part in self.data]

    def window(self, rank: int, start: int, stop: int) -> Tensor:
        return self._views[rank].window(start, stop)

    def own_matrices(self, start: int, stop: int) -> Tensor:
        return self._views[self._call.shard.rank].matrices(start, stop)

    def matrices(self) -> Tensor:
        """Row by row, for kernels that sum by themselves. [ranks, rows, features]"""
        return self.data.view(self.data.shape[0], -1, self._features)

    def reduce(self, bias: Tensor | None) -> Tensor:
        """Sum over ranks in fp32 in rank order, plus bias. [..., S/t, ..., features]"""
        cols = self._features
        if bias is None:  # rows may be cut anywhere: long ones keep the kernel busy
            cols *= self._call.layout.inner
            cols = cols if cols >= 64 else max(1, self.data[0].numel())
        parts = self.data.view(self.data.shape[0], -1, cols)
        kernels = select_kernels(None, parts.device)
        if listening():
            with span(self._call.name, f"sum {parts.shape[0]} partial results"):
                total = kernels.reduce_shards(parts, bias)
        else:
            total = kernels.reduce_shards(parts, bias)
        return reshaped(total, self.data.shape[1:])


def weights_signature(weights: list[Tensor], *more: object) -> tuple[object, ...]:
    """What the ranks have to agree on of the weights of a linear."""
    return (f"K={weights[0].shape[1]}", f"N={[w.shape[0] for w in weights]}", *more)


def gather(x: Tensor, seq_dim: int, length: int, group: ProcessGroup | None, name: str = "all_gather") -> Tensor:
    """[..., S/t, ..., H] -> [..., S, ..., H]"""
    call = Call(name, x, seq_dim, length, group, f"H={x.shape[-1]}")
    mine = call.mine(x)
    whole = call.around(mine)
    run(
        schedules.gather_only(call.shard),
        call.exchange(x.shape[-1], x),
        source=lambda t: mine.window(t.rows.start, t.rows.stop),
        target=lambda t: whole.window(t.rows.start, t.rows.stop),
        compute=lambda step: None,
    )
    return reshaped(whole.data, call.shape(length, x.shape[-1]))


def reduce_scatter(x: Tensor, seq_dim: int, group: ProcessGroup | None, name: str = "reduce_scatter") -> Tensor:
    """[..., S, ..., H] -> [..., S/t, ..., H], summed over ranks in rank order in fp32."""
    call = Call(name, x, seq_dim, x.shape[seq_dim], group, f"H={x.shape[-1]}")
    whole = call.whole(x)
    partials = Partials(call, x.shape[-1], x)
    shard = call.shard
    partials.window(shard.rank, shard.start, shard.stop).copy_(whole.window(shard.start, shard.stop))
    run(
        schedules.scatter_only(shard),
        call.exchange(x.shape[-1], x),
        source=lambda t: whole.window(t.rows.start, t.rows.stop),
        target=lambda t: partials.window(t.source, t.rows.start, t.rows.stop),
        compute=lambda step: None,
    )
    return partials.reduce(None)
