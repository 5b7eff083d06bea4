"""Gradients of keys and values on their way to the ranks that own the keys, and the sum of them there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.attention_spec import empty_like_heads
from ..sequence_layout import Interval
from .attention_column import Column, numbers_of, place_of, views_of
from .attention_plan import Piece, exchanged, leaving
from .messages import Messages

_NUMBERS = 1 << 18  # of keys and values that a CPU sums at one time: what a cache holds


class Returns:
    """Sends gradients of keys and values to the owners of the keys, rounded to their dtype."""

    def __init__(self, column: Column, messages: Messages, k: Tensor, v: Tensor):
        self._column, self._messages, self._k, self._v = column, messages, k, v
        self._expected = list(leaving(column.sizes, column.documents, column.row))
        self._buffers = {p: k.new_empty(numbers_of(p.keys.size, k, v)) for p in self._expected}
        #: (what we receive, what we send), each of which is one post.
        self._posts: deque[tuple[Piece | None, Piece | None]] = deque()
        if messages.takes_receives_early(k.device.type):
            messages.post([], self._receives(self._expected))
        else:  # a receive may keep later sends from moving: each is posted with the send of its step
            self._posts.extend(exchanged(column.sizes, column.documents, column.row))

    def send(self, piece: Piece, dk: Tensor, dv: Tensor) -> None:
        flat = self._k.new_empty(numbers_of(piece.keys.size, self._k, self._v))
        for view, grad in zip(views_of(flat, piece.keys.size, self._k, self._v), (dk, dv), strict=True):
            view.copy_(grad)
        due = []
        while self._posts:
            received, sent = self._posts.popleft()
            due += [received]
            if sent == piece:
                break
        self._messages.post([(self._column.peer(piece.owner), piece.index, flat)], self._receives(due))

    def skip(self) -> None:
        """Nothing to send in a step of the others."""
        if self._posts:
            self._messages.post([], self._receives([self._posts.popleft()[0]]))

    def _receives(self, pieces: Sequence[Piece | None]) -> list[tuple[int, int, Tensor]]:
        return [(self._column.peer(p.reader), p.index, self._buffers[p]) for p in pieces if p is not None]

    def summed(self, own_dk: Tensor, own_dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The gradients of this rank's keys in ``dtype``: the sum over all rows of the grid, in their order.

        Some keys at a time, in the dtype of ``own_dk`` and ``own_dv`` [B, rows, Hkv, D].
        """
        self._messages.post([], self._receives([received for received, _ in self._posts]))
        self._posts.clear()
        own, waiting = (own_dk, own_dv), set(self._expected)
        sums = [empty_like_heads(t, t.shape[3], dtype) for t in own]
        pieces = [(piece, place_of(self._column, piece.keys)) for piece in self._expected]
        rows = own_dk.shape[1]
        step = max(1, _NUMBERS // max(1, numbers_of(1, *own))) if own_dk.is_cpu else max(1, rows)
        for start in range(0, rows, step):
            some = Interval(start, min(start + step, rows))
            parts = [torch.zeros_like(t[:, some.start : some.stop]) for t in own]
            for row in range(self._column.sizes.ring):
                if row == self._column.row:
                    for part, t in zip(parts, own, strict=True):
                        part += t[:, some.start : some.stop]
                for piece, at in pieces:
                    first, last = max(at.start, some.start), min(at.stop, some.stop)
                    if piece.reader == row and first < last:
                        if piece in waiting:
                            waiting.remove(piece)
                            self._messages.wait(self._column.peer(row), piece.index, self._buffers[piece])
                        views = views_of(self._buffers[piece], piece.keys.size, self._k, self._v)
                        for part, theirs in zip(parts, views, strict=True):
                            part[:, first - start : last - start] += theirs[:, first - at.start : last - at.start]
            for total, part in zip(sums, parts, strict=True):
                total[:, some.start : some.stop] = part
        return sums[0], sums[1]
