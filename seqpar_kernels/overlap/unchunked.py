"""Calls below the size floor: all rows travel at once, around one matmul.

What depends on sizes alone (who gets which rows, in how many messages, under which signature) is worked out when a kind
of call is first met and then looked up: here the host's time is the op's. The bytes go through the same sessions as
those of :mod:`.pipeline`, with the same errors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import Remembered, per_group
from ..comm import select
from ..comm.steps import Compute, Post, Rows, Transfer, Wait
from ..comm.transport import Message, Room, end, in_blocks
from ..layout import SequenceShard
from .pipeline import Kind, Partials
from .planner import max_workspace_bytes
from .profiling import describe, listening, span
from .schedule import Stage, partial_sums, sequence_buffers, shard_rows

_UNLABELLED = contextlib.nullcontext()

#: (x, weights, biases) -> linear(all_gather(x)) for each weight, and last all rows of x where they are to be kept.
GatherMatmulReady = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], list[Tensor]]
#: (x, weight) -> the partial results of every rank's linear(x, weight) for our rows.
MatmulScatterReady = Callable[[Tensor, Tensor], Partials]


class _Peer(NamedTuple):
    """What travels between us and one other rank, in one message or in one for each block of memory."""

    rank: int
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


class UnchunkedKind(Kind):
    """Unchunked calls of one op on tensors of the same sizes: ``features`` of each row travel."""

    def __init__(
        self,
        name: str,
        x: Tensor,
        seq_dim: int,
        length: int,
        group: ProcessGroup,
        features: int,
        details: dict[str, object],
    ):
        agreed = {"features": features, **details}
        super().__init__(name, x, seq_dim, length, group, *(f"{k}={v}" for k, v in agreed.items()), "unchunked")
        shard, outer = self.shard, self.layout.outer
        self.transport = select.messages(group)
        self.features, self.seq_dim = features, seq_dim
        self.whole_shape = self.shape(length, features)
        self.sizes = [shard.of(rank).size for rank in range(shard.ranks)]
        self.even = length > 0 and length % shard.ranks == 0
        row_bytes = outer * self.layout.inner * features * x.element_size()
        self._block_row = row_bytes // max(1, outer)
        buffers = sequence_buffers(shard)
        self.room = Room(buffers, (row_bytes,) * len(buffers), outer)
        # Each rank begins with its right neighbour, so that no rank is everybody's first.
        others = [(shard.rank + k) % shard.ranks for k in range(1, shard.ranks)]
        self.gathers = [
            _Peer(r, self._parts(shard_rows, shard, r), self._parts(shard_rows, shard.of(r), shard.rank))
            for r in others
        ]
        self.scatters = [
            _Peer(r, self._parts(partial_sums, shard.of(r), shard.rank), self._parts(partial_sums, shard, r))
            for r in others
        ]

    def in_blocks(self, rows: int) -> bool:
        """Whether a message of so many rows goes block by block, from and to where they lie."""
        return in_blocks(self.layout.outer, rows * self._block_row)

    def _parts(
        self, transfer: Callable[[SequenceShard, Rows, int], Transfer], owner: SequenceShard, other: int
    ) -> tuple[Transfer, ...]:
        """The whole shard of ``owner``."""
        if not owner.size:
            return ()
        whole = transfer(owner, Rows(owner.rank, 0, owner.start, owner.stop), other)
        if not self.in_blocks(owner.size):
            return (whole,)
        return tuple(whole._replace(part=part) for part in range(self.layout.outer))


@per_group
def _kinds_of(group: ProcessGroup) -> Remembered[tuple[object, ...], UnchunkedKind]:
    return Remembered()


def unchunked_kind(
    name: str, x: Tensor, seq_dim: int, length: int, group: ProcessGroup, features: int, **details: object
) -> UnchunkedKind:
    """The one kind of these arguments: ``details`` are what the ranks have to agree on beside the sizes of x."""
    kinds = _kinds_of(group)
    key = (name, x.shape, x.dtype, x.device, seq_dim, length, features, max_workspace_bytes(), *details.values())
    found = kinds.get(key)
    if found is None:
        found = kinds[key] = UnchunkedKind(name, x, seq_dim, length, group, features, details)
    return found


class Unchunked:
    """One unchunked call. In ``with``: the op is finished at its end, or aborted where anything raised."""

    def __init__(self, kind: UnchunkedKind):
        self._kind = kind
        self._session = kind.transport.session(kind.signature, kind.room)
        self._received: list[tuple[Tensor, Tensor]] = []  # window, and the packed message that belongs there
        self._at_once = False  # what is gathered comes by the backend's own all-gather
        #: Whether somebody traces, and the call's work carries labels.
        self.traced = listening()

    def __enter__(self) -> Unchunked:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        end(self._session, error)

    def gather(self, x: Tensor) -> Tensor:
        """Start gathering our [..., S/t, ..., H]. Returns where it goes: [..., S, ..., H], ours in its place."""
        kind = self._kind
        whole = x.new_empty(kind.whole_shape)
        rows = x.contiguous()
        if kind.even and self._session.gathers_itself(kind.device_type):
            self._gather_at_once(whole, rows)
            return whole
        windows = whole.split_with_sizes(kind.sizes, kind.seq_dim)
        sends: list[Message] = []
        receives: list[Message] = []
        for peer in kind.gathers:
            window = windows[peer.rank]
            if len(peer.receives) == 1 and not window.is_contiguous():
                buffer = torch.empty_like(window, memory_format=torch.contiguous_format)
                self._received.append((window, buffer))
                window = buffer
            sends += self._messages(peer.sends, rows)
            receives += self._messages(peer.receives, window)
        self._post(sends, receives)
        windows[kind.shard.rank].copy_(rows)
        return whole

    def _gather_at_once(self, whole: Tensor, rows: Tensor) -> None:
        """By the backend's own all-gather."""
        kind = self._kind
        lies_apart = kind.layout.outer > 1  # a rank's rows are several blocks of ``whole``
        buffer = whole.new_empty((kind.shard.ranks, *rows.shape)) if lies_apart else whole
        self._session.all_gather(buffer.view(-1), rows.view(-1))
        self._at_once = True
        if lies_apart:
            window = whole.unflatten(kind.seq_dim, (kind.shard.ranks, kind.sizes[0]))
            self._received.append((window, buffer.movedim(0, kind.seq_dim)))

    def gathered(self) -> None:
        """Wait for what :meth:`gather` has started."""
        if self._at_once:
            with span(self._kind.name, "wait for the rows of all ranks"):
                self._session.all_gathered()
        else:
            self._wait(self._kind.gathers)
        for window, buffer in self._received:
            window.copy_(buffer)
        self._received.clear()

    def scatter(self, whole: Tensor) -> Partials:
        """Start sending the rows of our contiguous [..., S, ..., features] to their owners, and receiving ours."""
        kind = self._kind
        partials = Partials(kind, whole.shape[-1], whole)
        windows = whole.split_with_sizes(kind.sizes, kind.seq_dim)
        parts = partials.data.unbind(0)
        sends: list[Message] = []
        receives: list[Message] = []
        for peer in kind.scatters:
            sends += self._messages(peer.sends, windows[peer.rank])
            receives += self._messages(peer.receives, parts[peer.rank])
        self._post(sends, receives)
        parts[kind.shard.rank].copy_(windows[kind.shard.rank])
        return partials

    def scattered(self) -> None:
        """Wait for what :meth:`scatter` has started."""
        self._wait(self._kind.scatters)

    def _messages(self, transfers: tuple[Transfer, ...], rows: Tensor) -> list[Message]:
        """[..., rows, ..., features] as one message, or its blocks as one each."""
        if len(transfers) == 1:
            return [Message(transfers[0], rows.contiguous())]
        if not transfers:
            return []
        return list(map(Message, transfers, rows.flatten(0, self._kind.seq_dim - 1).unbind(0)))

    def label(self, stage: Stage) -> contextlib.AbstractContextManager[None]:
        """For traces: the work of ``stage``, on all rows."""
        if not self.traced:
            return _UNLABELLED
        return span(self._kind.name, describe(Compute(stage, 0, self._kind.shard.length)))

    def linears(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
        """The forward's matmuls: linear(x, weight, bias) for each weight."""
        if self.traced:
            with span(self._kind.name, describe(Compute("matmul", 0, self._kind.shard.length))):
                return list(map(torch.nn.functional.linear, [x] * len(weights), weights, biases))
        return list(map(torch.nn.functional.linear, [x] * len(weights), weights, biases))

    def _post(self, sends: list[Message], receives: list[Message]) -> None:
        if not self.traced:
            self._session.post(sends, receives)
            return
        step = Post(tuple(m.transfer for m in sends), tuple(m.transfer for m in receives))
        with span(self._kind.name, describe(step)):
            self._session.post(sends, receives)

    def _wait(self, peers: list[_Peer]) -> None:
        for peer in peers:
            for transfer in peer.receives:
                if not self.traced:
                    self._session.wait(transfer)
                    continue
                with span(self._kind.name, describe(Wait(transfer))):
                    self._session.wait(transfer)


def gather_matmul(
    group: ProcessGroup,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    seq_dim: int,
    seq_len: int,
    chunks: int = 1,
    keep: bool = False,
) -> list[Tensor]:
    """linear(all_gather(x)) for each weight, and last all rows of x. x [..., S/t, ..., K]

    ``chunks`` and ``keep`` make no difference here.
    """
    return ready_gather_matmul(group, x, weights, seq_dim, seq_len, True)(x, weights, biases)


def ready_gather_matmul(
    group: ProcessGroup, x: Tensor, weights: Sequence[Tensor], seq_dim: int, seq_len: int, keep: bool
) -> GatherMatmulReady:
    """:func:`gather_matmul` for operands of these sizes; all rows of x only where they are to be kept."""
    n = outputs_of(weights)
    kind = unchunked_kind("all_gather_linear", x, seq_dim, seq_len, group, x.shape[-1], N=n)
    return functools.partial(_gather_matmul, kind, keep)


def _gather_matmul(
    kind: UnchunkedKind, keep: bool, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    with Unchunked(kind) as call:
        whole = call.gather(x)
        call.gathered()
        outs = call.linears(whole, weights, biases)
    if keep:
        outs.append(whole)
    return outs


def matmul_scatter(
    name: str, group: ProcessGroup, x: Tensor, weight: Tensor, seq_dim: int, chunks: int = 1
) -> Partials:
    """The partial results of every rank's linear(x, weight) for our rows. x [..., S, ..., K/t]"""
    return ready_matmul_scatter(name, group, x, weight, seq_dim)(x, weight)


def ready_matmul_scatter(name: str, group: ProcessGroup, x: Tensor, weight: Tensor, seq_dim: int) -> MatmulScatterReady:
    """:func:`matmul_scatter` for operands of these sizes."""
    kind = unchunked_kind(name, x, seq_dim, x.shape[seq_dim], group, weight.shape[0], K=weight.shape[1])
    return functools.partial(_matmul_scatter, kind)


def _matmul_scatter(kind: UnchunkedKind, x: Tensor, weight: Tensor) -> Partials:
    with Unchunked(kind) as call:
        (product,) = call.linears(x, [weight], [None])
        partials = call.scatter(product.contiguous())
        call.scattered()
        return partials


def outputs_of(weights: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(w.shape[0] for w in weights)
