"""Calls below the size floor: all rows travel at once, around one matmul.

What depends on sizes alone (who gets which rows, in how many messages, under which signature) is worked out when a kind
of call is first met and then looked up: here the host's time is the op's. The bytes go through the same sessions as
those of :mod:`.pipeline`, with the same errors.
"""

from __future__ import annotations

import contextlib
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
        super().__init__(name, x, seq_dim, length, group, *(f"{k}={v}" for k, v in agreed.items()), "uncut")
        shard, outer = self.shard, self.layout.outer
        self.features, self.seq_dim = features, seq_dim
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
    """One uncut call. In ``with``: the op is finished at its end, or aborted where anything raised."""

    def __init__(self, kind: UnchunkedKind, group: ProcessGroup):
        self._kind = kind
        self._session = select.messages(group).session(kind.signature, kind.room)
        self._received: list[tuple[Tensor, Tensor]] = []  # window, and the packed message that belongs there
        self._at_once = False  # what is gathered comes by the backend's own all-gather

    def __enter__(self) -> Unchunked:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        end(self._session, error)

    def gather(self, x: Tensor) -> Tensor:
        """Start gathering our [..., S/t, ..., H]. Returns where it goes: [..., S, ..., H], ours in its place."""
        kind = self._kind
        whole = x.new_empty(kind.shape(kind.shard.length, kind.features))
        rows = x.contiguous()
        if kind.even and self._gather_at_once(whole, rows):
            return whole
        windows = whole.split_with_sizes(kind.sizes, kind.seq_dim)
        sends = self._messages([(peer.sends, rows) for peer in kind.gathers])
        receives = []
        for peer in kind.gathers:
            window = windows[peer.rank]
            if len(peer.receives) == 1 and not window.is_contiguous():
                buffer = torch.empty_like(window, memory_format=torch.contiguous_format)
                self._received.append((window, buffer))
                window = buffer
            receives.append((peer.receives, window))
        self._post(sends, self._messages(receives))
        windows[kind.shard.rank].copy_(rows)
        return whole

    def _gather_at_once(self, whole: Tensor, rows: Tensor) -> bool:
        """By the backend's own all-gather, if it has one."""
        kind = self._kind
        lies_apart = kind.layout.outer > 1  # a rank's rows are several blocks of ``whole``
        buffer = whole.new_empty((kind.shard.ranks, *rows.shape)) if lies_apart else whole
        self._at_once = self._session.all_gather(buffer.view(-1), rows.view(-1))
        if self._at_once and lies_apart:
            window = whole.unflatten(kind.seq_dim, (kind.shard.ranks, kind.sizes[0]))
            self._received.append((window, buffer.movedim(0, kind.seq_dim)))
        return self._at_once

    def gathered(self) -> None:
        """Wait for what :meth:`gather` has started."""
        if self._at_once:
            with span(self._kind.name, "wait for the rows of all ranks") if listening() else _UNLABELLED:
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
        sends = self._messages([(peer.sends, windows[peer.rank]) for peer in kind.scatters])
        receives = self._messages([(peer.receives, parts[peer.rank]) for peer in kind.scatters])
        self._post(sends, receives)
        parts[kind.shard.rank].copy_(windows[kind.shard.rank])
        return partials

    def scattered(self) -> None:
        """Wait for what :meth:`scatter` has started."""
        self._wait(self._kind.scatters)

    def _messages(self, moves: Sequence[tuple[tuple[Transfer, ...], Tensor]]) -> list[Message]:
        """Each [..., rows, ..., features] as one message, or its blocks as one each."""
        out = []
        for transfers, rows in moves:
            if len(transfers) == 1:
                out.append(Message(transfers[0], rows.contiguous()))
            elif transfers:
                out += map(Message, transfers, rows.flatten(0, self._kind.seq_dim - 1).unbind(0))
        return out

    def label(self, stage: Stage) -> contextlib.AbstractContextManager[None]:
        """For traces: the work of ``stage``, on all rows."""
        if not listening():
            return _UNLABELLED
        return span(self._kind.name, describe(Compute(stage, 0, self._kind.shard.length)))

    def _post(self, sends: list[Message], receives: list[Message]) -> None:
        if not listening():
            self._session.post(sends, receives)
            return
        step = Post(tuple(m.transfer for m in sends), tuple(m.transfer for m in receives))
        with span(self._kind.name, describe(step)):
            self._session.post(sends, receives)

    def _wait(self, peers: list[_Peer]) -> None:
        for peer in peers:
            for transfer in peer.receives:
                with span(self._kind.name, describe(Wait(transfer))) if listening() else _UNLABELLED:
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
    features = x.shape[-1]
    kind = unchunked_kind("all_gather_linear", x, seq_dim, seq_len, group, features, N=outputs_of(weights))
    with Unchunked(kind, group) as call:
        whole = call.gather(x)
        call.gathered()
        with call.label("matmul"):
            linear = torch.nn.functional.linear
            return [*(linear(whole, w, b) for w, b in zip(weights, biases, strict=True)), whole]


def matmul_scatter(
    name: str, group: ProcessGroup, x: Tensor, weight: Tensor, seq_dim: int, chunks: int = 1
) -> Partials:
    """The partial results of every rank's linear(x, weight) for our rows. x [..., S, ..., K/t]"""
    kind = unchunked_kind(name, x, seq_dim, x.shape[seq_dim], group, weight.shape[0], K=weight.shape[1])
    with Unchunked(kind, group) as call:
        with call.label("matmul"):
            product = torch.nn.functional.linear(x, weight)
        partials = call.scatter(product.contiguous())
        call.scattered()
        return partials


def outputs_of(weights: list[Tensor]) -> tuple[int, ...]:
    return tuple(w.shape[0] for w in weights)
