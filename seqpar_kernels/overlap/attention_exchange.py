"""Messages of attention over a sharded sequence: any tensors to any peer, and heads exchanged for rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..comm import select
from ..comm.coordination import agreement_of
from ..comm.steps import Buffer, Rows, Transfer
from ..comm.transport import Message, Room, Session, end
from ..kernels.spec import accumulation_dtype
from ..sequence_layout import Intervals, common, count, places

_ALIGNMENT = 16  # of each tensor in a message


class Messages:
    """The communication of one step of an op, from its agreement to its end.

    A context manager: an error inside reaches the peers. Messages between two ranks must be sent in the order in which
    they are expected there; ``index`` tells them apart.
    """

    def __init__(self, group: ProcessGroup, signature: str, kind: str = "gather"):
        room = Room((Buffer(kind, 0),), (1,))  # messages between pairs of ranks lie wherever they were made
        self._session: Session = select.messages(group).session(signature, room)
        self._rank, self._kind = group.rank(), kind

    def post(self, sends: Sequence[tuple[int, int, Tensor]], receives: Sequence[tuple[int, int, Tensor]]) -> None:
        """Start (peer, index, contiguous buffer) on their way; empty ones do not travel. No buffer is copied."""
        out = [Message(self._transfer(index, self._rank, peer), b) for peer, index, b in sends if b.numel()]
        into = [Message(self._transfer(index, peer, self._rank), b) for peer, index, b in receives if b.numel()]
        if out or into:
            self._session.post(out, into)

    def wait(self, peer: int, index: int, buffer: Tensor) -> None:
        """Return when what was to be received in ``buffer`` is there."""
        if buffer.numel():
            self._session.wait(self._transfer(index, peer, self._rank))

    def takes_receives_early(self, device_type: str) -> bool:
        """See :meth:`..comm.transport.Session.takes_receives_early`."""
        return self._session.takes_receives_early(device_type)

    def drain(self) -> None:
        """Return when all that was sent has left."""
        self._session.drain()

    def _transfer(self, index: int, source: int, target: int) -> Transfer:
        return Transfer(self._kind, Rows(source, index, 0, 0), source, target)

    def __enter__(self) -> Messages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self._session, error)


def agree(group: ProcessGroup, text: str) -> None:
    """Return when all ranks have said ``text``, which they do once.

    Raises:
        RuntimeError: on every rank, where they have not.
    """
    agreement_of(group).require(text)


class Part(NamedTuple):
    """A tensor [B, rows, heads, columns] of which each rank of a row of the grid has rows, or heads.

    ``rows``: positions that each rank holds before; ``heads``: those that each has afterwards. Several may have the
    same head.
    """

    rows: tuple[Intervals, ...]
    heads: tuple[range, ...]
    whole: Intervals  # all rows, in ascending order
    all_heads: int
    tensor: Tensor | None = None
    like: tuple[int, int, torch.dtype] | None = None  # batch, columns and dtype where there is no tensor

    def shape(self, rows: int, heads: int) -> tuple[int, int, int, int]:
        batch, columns, _ = self._like()
        return batch, rows, heads, columns

    @property
    def dtype(self) -> torch.dtype:
        return self._like()[2]

    def _like(self) -> tuple[int, int, torch.dtype]:
        if self.tensor is not None:
            return self.tensor.shape[0], self.tensor.shape[3], self.tensor.dtype
        assert self.like is not None
        return self.like


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def message_buffer(
    shapes: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """One buffer of bytes, and a view of each shape and dtype in it."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    buffer = torch.empty(sum(map(_padded, sizes)), dtype=torch.uint8, device=device)
    views, at = [], 0
    for (shape, dtype), size in zip(shapes, sizes, strict=True):
        views.append(buffer[at : at + size].view(dtype).view(tuple(shape)))
        at += _padded(size)
    return buffer, views


def rows_to_heads(messages: Messages, ranks: range, me: int, parts: Sequence[Part]) -> list[Tensor]:
    """Each rank's rows of all heads become all rows of its heads, contiguous. ``me``: our place among ``ranks``."""
    assert parts[0].tensor is not None
    device = parts[0].tensor.device
    outs = [torch.empty(p.shape(count(p.whole), len(p.heads[me])), dtype=p.dtype, device=device) for p in parts]
    sends, receives, arrivals = [], [], []
    for other, peer in enumerate(ranks):
        if other == me:
            continue
        shapes = [(p.shape(count(p.rows[me]), len(p.heads[other])), p.dtype) for p in parts]
        buffer, views = message_buffer(shapes, device)
        for view, part in zip(views, parts, strict=True):
            assert part.tensor is not None
            view.copy_(_narrow_heads(part.tensor, part.heads[other]))
        sends.append((peer, 0, buffer))
        shapes = [(p.shape(count(p.rows[other]), len(p.heads[me])), p.dtype) for p in parts]
        buffer, views = message_buffer(shapes, device)
        receives.append((peer, 0, buffer))
        arrivals.append((other, views))
    messages.post(sends, receives)
    for out, part in zip(outs, parts, strict=True):
        assert part.tensor is not None
        _put_rows(out, part, me, _narrow_heads(part.tensor, part.heads[me]))
    for (peer, index, buffer), (other, views) in zip(receives, arrivals, strict=True):
        messages.wait(peer, index, buffer)
        for out, part, view in zip(outs, parts, views, strict=True):
            _put_rows(out, part, other, view)
    messages.drain()
    return outs


def heads_to_rows(
    messages: Messages, ranks: range, me: int, parts: Sequence[Part], outs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The way back, into ``outs``. What several ranks have of one head is summed in rank order in fp32 (fp64)."""
    assert parts[0].tensor is not None
    device = parts[0].tensor.device
    sends, receives, arrived = [], [], dict[int, list[Tensor]]()
    for other, peer in enumerate(ranks):
        if other == me:
            arrived[me] = [_rows_of(p, me) for p in parts]
            continue
        shapes = [(p.shape(count(p.rows[other]), len(p.heads[me])), p.dtype) for p in parts]
        buffer, views = message_buffer(shapes, device)
        for view, part in zip(views, parts, strict=True):
            view.copy_(_rows_of(part, other))
        sends.append((peer, 0, buffer))
        shapes = [(p.shape(count(p.rows[me]), len(p.heads[other])), p.dtype) for p in parts]
        buffer, arrived[other] = message_buffer(shapes, device)
        receives.append((peer, 0, buffer))
    messages.post(sends, receives)
    for peer, index, buffer in receives:
        messages.wait(peer, index, buffer)
    for i, (part, out) in enumerate(zip(parts, outs, strict=True)):
        _sum_heads(out, [(part.heads[other], arrived[other][i]) for other in sorted(arrived)])
    messages.drain()
    return outs


def _sum_heads(out: Tensor, pieces: list[tuple[range, Tensor]]) -> None:
    """``out`` [B, rows, H, columns] from pieces of its heads."""
    if sum(len(heads) for heads, _ in pieces) == out.shape[2]:
        for heads, piece in pieces:
            _narrow_heads(out, heads).copy_(piece)
        return
    total = torch.zeros(out.shape, dtype=accumulation_dtype(out.dtype), device=out.device)
    for heads, piece in pieces:
        _narrow_heads(total, heads).add_(piece)
    out.copy_(total)


def _narrow_heads(t: Tensor, heads: range) -> Tensor:
    return t.narrow(2, heads.start, len(heads))


def _put_rows(out: Tensor, part: Part, rank: int, rows: Tensor) -> None:
    before = 0
    for at in _places(part, rank):
        out[:, at.start : at.stop] = rows[:, before : before + at.size]
        before += at.size


def _rows_of(part: Part, rank: int) -> Tensor:
    """A view where they lie side by side."""
    assert part.tensor is not None
    found = [part.tensor[:, at.start : at.stop] for at in _places(part, rank)]
    return found[0] if len(found) == 1 else torch.cat(found, 1) if found else part.tensor[:, :0]


def _places(part: Part, rank: int) -> Intervals:
    return places(part.whole, common(part.rows[rank], part.whole))
