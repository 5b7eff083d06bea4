"""Heads exchanged for rows, and back: what attention over a sharded sequence by Ulysses sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.spec import accumulation_dtype
from ..sequence_layout import Intervals, common, count, places
from .messages import Messages, message_buffer


class Part(NamedTuple):
    """A tensor [B, rows, heads, columns] that is sharded over a row of the grid: by rows, or by heads.

    ``rows``: the positions of each rank's rows; ``heads``: the heads of each rank. Several ranks may have one head.
    """

    rows: tuple[Intervals, ...]
    heads: tuple[range, ...]
    whole: Intervals  # all rows, in ascending order
    all_heads: int
    tensor: Tensor | None = None
    like: tuple[int, int, torch.dtype] | None = None  # batch, columns and dtype where this rank has no tensor

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


def rows_to_heads(messages: Messages, ranks: range, me: int, parts: Sequence[Part]) -> list[Tensor]:
    """From each rank's rows of all heads to all rows of its heads, contiguous; ``me``: this rank's index."""
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
    """The inverse, into ``outs``. A head that several ranks have is summed in rank order in fp32 (fp64)."""
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
    """The rows of ``rank``, a view where they are adjacent."""
    assert part.tensor is not None
    found = [part.tensor[:, at.start : at.stop] for at in _places(part, rank)]
    return found[0] if len(found) == 1 else torch.cat(found, 1) if found else part.tensor[:, :0]


def _places(part: Part, rank: int) -> Intervals:
    return places(part.whole, common(part.rows[rank], part.whole))
