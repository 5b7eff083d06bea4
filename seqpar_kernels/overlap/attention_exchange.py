"""Heads exchanged for rows, and back: what attention over a sharded sequence by Ulysses sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.spec import accumulation_dtype
from ..sequence_layout import Intervals, common, count, places
from .attention_plan import Sizes
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


class Exchange:
    """An all-to-all under way: :meth:`finish` waits for it and returns the tensors that it fills."""

    def __init__(
        self,
        messages: Messages | None,
        receives: list[tuple[int, int, Tensor]],
        outs: Sequence[Tensor],
        put: Callable[[], None],
    ):
        self._messages, self._receives, self._outs, self._put = messages, receives, outs, put

    def finish(self) -> Sequence[Tensor]:
        for peer, index, buffer in self._receives:
            assert self._messages is not None
            self._messages.wait(peer, index, buffer)
        self._put()
        return self._outs


def post_rows_to_heads(
    messages: Messages | None,
    ranks: range,
    me: int,
    parts: Sequence[Part],
    outs: Sequence[Tensor] | None = None,
    index: int = 0,
) -> Exchange:
    """Start what :func:`rows_to_heads` does, into ``outs`` where given.

    ``index`` tells the exchanges of one step of an op apart. ``messages`` is None where there is one rank.
    """
    assert parts[0].tensor is not None
    device = parts[0].tensor.device
    if outs is None:
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
        sends.append((peer, index, buffer))
        shapes = [(p.shape(count(p.rows[other]), len(p.heads[me])), p.dtype) for p in parts]
        buffer, views = message_buffer(shapes, device)
        receives.append((peer, index, buffer))
        arrivals.append((other, views))
    if messages is not None:
        messages.post(sends, receives)
    for out, part in zip(outs, parts, strict=True):
        assert part.tensor is not None
        _put_rows(out, part, me, _narrow_heads(part.tensor, part.heads[me]))

    def put() -> None:
        for other, views in arrivals:
            for out, part, view in zip(outs, parts, views, strict=True):
                _put_rows(out, part, other, view)

    return Exchange(messages, receives, outs, put)


def rows_to_heads(messages: Messages, ranks: range, me: int, parts: Sequence[Part]) -> list[Tensor]:
    """From each rank's rows of all heads to all rows of its heads, contiguous; ``me``: this rank's index."""
    outs = post_rows_to_heads(messages, ranks, me, parts).finish()
    messages.drain()
    return list(outs)


def post_heads_to_rows(
    messages: Messages | None, ranks: range, me: int, parts: Sequence[Part], outs: Sequence[Tensor], index: int = 0
) -> Exchange:
    """Start what :func:`heads_to_rows` does."""
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
        sends.append((peer, index, buffer))
        shapes = [(p.shape(count(p.rows[me]), len(p.heads[other])), p.dtype) for p in parts]
        buffer, arrived[other] = message_buffer(shapes, device)
        receives.append((peer, index, buffer))
    if messages is not None:
        messages.post(sends, receives)

    def put() -> None:
        for i, (part, out) in enumerate(zip(parts, outs, strict=True)):
            _sum_heads(out, [(part.heads[other], arrived[other][i]) for other in sorted(arrived)])

    return Exchange(messages, receives, outs, put)


def heads_to_rows(
    messages: Messages, ranks: range, me: int, parts: Sequence[Part], outs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The inverse, into ``outs``. A head that several ranks have is summed in rank order in fp32 (fp64)."""
    outs = post_heads_to_rows(messages, ranks, me, parts, outs).finish()
    messages.drain()
    return outs


# --- query heads in groups of different sizes ------------------------------------------------------------------------


def expansion(sizes: Sizes, column: int, device: torch.device) -> Tensor | None:
    """The key head that each query head of a column reads; None where all key heads have as many query heads.

    Kernels need equal groups. Where groups differ, each query head gets a copy of its key head.
    """
    read = key_of_each(sizes, column)
    return None if read is None else torch.tensor(read, device=device)


def key_of_each(sizes: Sizes, column: int) -> list[int] | None:
    """The values of :func:`expansion`."""
    queries, keys = sizes.heads(column)
    group = sizes.q_heads // max(1, sizes.kv_heads)
    read = [h // group - keys.start for h in queries]
    return None if len({read.count(i) for i in range(len(keys))}) <= 1 else read


def expanded(t: Tensor, index: Tensor | None) -> Tensor:
    """A key head for each query head, as ``index`` says."""
    return t if index is None else t.index_select(2, index)


def summed(grad: Tensor, index: Tensor | None, heads: int) -> Tensor:
    """The gradient of :func:`expanded`'s argument."""
    if index is None:
        return grad
    shape = (*grad.shape[:2], heads, grad.shape[3])
    return torch.zeros(shape, dtype=grad.dtype, device=grad.device).index_add_(2, index, grad)


# --- places ----------------------------------------------------------------------------------------------------------


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
