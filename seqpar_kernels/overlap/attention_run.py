"""Attention over a sharded sequence on one rank: heads exchanged for rows, then blocks of keys as they arrive.

Forward, in a column of the grid: a rank posts the keys and values that other rows need, computes with its own keys,
then with the other rows' keys in rotated order. One softmax state goes through all of them, so that the bits depend on
this order only.

Backward: a rank computes with half of its own keys, then with the other ranks' keys, and posts the gradients of each
piece to its owner when they are done, then with the rest of its own keys. Owners sum in rank order in fp32 (fp64).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import attention
from ..kernels.attention_spec import AttentionGrads, AttentionState, empty_like_heads
from ..kernels.spec import accumulation_dtype
from ..sequence_layout import Interval, Intervals
from .attention_column import (
    Column,
    Extras,
    Incoming,
    columns_of,
    gathered,
    kept_elements,
    kept_pieces,
    numbers_of,
    own_blocks,
    place_of,
    views_of,
)
from .attention_plan import Piece, arriving, exchanged, leaving
from .messages import Messages

# --- forward ---------------------------------------------------------------------------------------------------------


def forward(
    column: Column, q: Tensor, k: Tensor, v: Tensor, extras: Extras, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Sq, Hq, Dv], lse [B, Hq, Sq] and the kept keys and values of other ranks, flat, empty unless ``save``."""
    save = save and column.choice.save_kv
    state = _state(q, v.shape[3], extras.sinks)
    if column.sizes.ring == 1:
        out, lse = _whole_forward(column, q, k, v, extras, state)
        return out, lse, k.new_empty(0)
    with column.messages("keys and values") as messages:
        if column.choice.engine == "all_gather":
            flat, keys, values = gathered(column, messages, k, v, None)
            out, lse = _whole_forward(column, q, keys, values, extras, state)
            return out, lse, flat if save else k.new_empty(0)
        kept = k.new_empty(kept_elements(column.choice, column.rank, k, v)) if save else None
        incoming = Incoming(column, messages, k, v, kept)
        own = _own_together(column, k, v, extras)
        remote = ((piece.keys, keys, values) for piece, keys, values in filter(None, incoming))
        blocks = len(own) + len(list(arriving(column.sizes, column.documents, column.row)))
        out, lse = _in_turn(column, q, itertools.chain(own, remote), blocks, extras, state)
    return out, lse, k.new_empty(0) if kept is None else kept


def _state(q: Tensor, value_dim: int, sinks: Tensor | None) -> AttentionState | None:
    """The state in which all rows begin; a sink, a key without a value, is in it."""
    if sinks is None or q.shape[0] == 0 or q.shape[2] == 0:
        return None
    acc = empty_like_heads(q, value_dim, accumulation_dtype(q.dtype)).zero_()
    scores = sinks.to(torch.float64) * math.log2(math.e)
    maxima = scores.round().clamp(min=-1e30)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    maxima, sums = (t[None, :, None].expand(shape).contiguous() for t in (maxima, torch.exp2(scores - maxima)))
    return AttentionState(acc, maxima, sums)


def _in_turn(
    column: Column,
    q: Tensor,
    blocks: Iterable[tuple[Interval | Intervals, Tensor, Tensor]],
    count: int,
    extras: Extras,
    state: AttentionState | None,
) -> tuple[Tensor, Tensor]:
    """out and lse over ``count`` blocks, one after the other; the last call finishes."""
    out = lse = None
    for i, (keys_at, keys, values) in enumerate(blocks):
        spec, masks = column.block(extras, keys_at, q.device)
        last = i + 1 == count
        out, lse, state = attention.forward(q, keys, values, spec, masks, state=state, keep_state=not last, finish=last)
    assert out is not None and lse is not None
    return out, lse


def _own_together(
    column: Column, k: Tensor, v: Tensor, extras: Extras
) -> list[tuple[Interval | Intervals, Tensor, Tensor]]:
    """This rank's own keys and values as one block; one block an interval where a bias or a mask has a column a key."""
    by_column = any(t is not None and t.shape[-1] > 1 for t in (extras.bias, extras.mask))
    if by_column and len(column.k_rows) > 1:
        return list(own_blocks(column, k, v))
    return [(column.k_rows, k, v)]


def _whole_forward(
    column: Column, q: Tensor, k: Tensor, v: Tensor, extras: Extras, state: AttentionState | None
) -> tuple[Tensor, Tensor]:
    return _in_turn(column, q, [(Interval(0, k.shape[1]), k, v)], 1, extras, state)


# --- backward --------------------------------------------------------------------------------------------------------


class Grads(NamedTuple):
    """dq in the dtype of q, dk and dv in that asked for, dbias in the accumulation dtype."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


def backward(
    column: Column,
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    kept: Tensor,
    extras: Extras,
    bias_grad: bool,
    grad_dtype: torch.dtype,
) -> Grads:
    """``delta`` as in :func:`..kernels.attention.backward`; ``grad_dtype`` is that of dk and dv."""
    run = _Backward(column, dout, delta, q, k, v, lse, extras, bias_grad, grad_dtype)
    if column.sizes.ring == 1:
        dq, dk, dv = run.whole(k, v, grad_dtype)
        assert dq is not None and dk is not None and dv is not None
        return Grads(dq.to(q.dtype), dk, dv, run.dbias)
    return run.over_ranks(kept)


class _Backward:
    def __init__(
        self,
        column: Column,
        dout: Tensor,
        delta: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        extras: Extras,
        bias_grad: bool,
        grad_dtype: torch.dtype,
    ):
        self._column, self._dout, self._delta, self._lse, self._extras = column, dout, delta, lse, extras
        self._q, self._k, self._v, self._grad_dtype = q, k, v, grad_dtype
        self._wide = accumulation_dtype(q.dtype)
        self.dbias: Tensor | None = None
        if bias_grad and extras.bias is not None:
            self.dbias = torch.zeros(extras.bias.shape, dtype=self._wide, device=q.device)

    def whole(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> AttentionGrads:
        """The gradients over all keys in one kernel call."""
        return self._block(k, v, Interval(0, k.shape[1]), None, dtype)

    def _block(
        self, k: Tensor, v: Tensor, keys: Interval, into: AttentionGrads | None, dtype: torch.dtype | None = None
    ) -> AttentionGrads:
        spec, masks = self._column.block(self._extras, keys, self._q.device)
        given = (self._dout, self._q, k, v, self._lse, self._delta, spec, masks)
        if self.dbias is not None:
            target = columns_of(self.dbias, keys)
            assert target is not None
            target += attention.bias_gradient(*given, target.shape)
        return attention.backward(*given, into=into, grad_dtype=dtype)

    def over_ranks(self, kept: Tensor) -> Grads:
        """The gradients with keys and values of other ranks, kept or sent again. Keys and gradients are a step each."""
        column = self._column
        if column.choice.save_kv:
            with column.messages("gradients of keys and values", "scatter") as back:
                return self._all(kept, None, back)
        with (
            column.messages("keys and values again") as messages,
            column.messages("gradients of keys and values", "scatter") as back,
        ):
            return self._all(None, messages, back)

    def _all(self, kept: Tensor | None, fetch: Messages | None, back: Messages) -> Grads:
        column, k, v = self._column, self._k, self._v
        out = _Returned(column, back, k, v)
        if column.choice.engine == "all_gather":
            _, keys, values = gathered(column, fetch or back, k, v, kept)
            grads = self._block(keys, values, Interval(0, column.sizes.k_len), None, self._wide)
            assert grads.dq is not None and grads.dk is not None and grads.dv is not None
            for piece in arriving(column.sizes, column.documents, column.row):
                rows = slice(piece.keys.start, piece.keys.stop)
                out.send(piece, grads.dk[:, rows], grads.dv[:, rows])
            own_dk, own_dv = (empty_like_heads(t, t.shape[3], self._wide) for t in (k, v))
            for at in column.k_rows:
                rows, place = slice(at.start, at.stop), place_of(column, at)
                own_dk[:, place.start : place.stop] = grads.dk[:, rows]
                own_dv[:, place.start : place.stop] = grads.dv[:, rows]
            dk, dv = out.summed(own_dk, own_dv, self._grad_dtype)
            return Grads(grads.dq.to(self._q.dtype), dk, dv, self.dbias)
        if fetch is None:
            assert kept is not None
            remote: Iterator[tuple[Piece, Tensor, Tensor] | None] = kept_pieces(column, k, v, kept)
        else:
            remote = iter(Incoming(column, fetch, k, v, None))
        dq = empty_like_heads(self._q, self._q.shape[3], self._wide).zero_()
        own_dk, own_dv = (empty_like_heads(t, t.shape[3], self._wide).zero_() for t in (k, v))
        blocks = list(_own_halves(column))
        self._own_blocks(blocks[: len(blocks) // 2], dq, own_dk, own_dv)
        for received in remote:
            if received is None:
                out.skip()
                continue
            piece, keys, values = received
            dk, dv = (torch.zeros(t.shape, dtype=self._wide, device=t.device) for t in (keys, values))
            self._block(keys, values, piece.keys, AttentionGrads(dq, dk, dv))
            out.send(piece, dk, dv)
        self._own_blocks(blocks[len(blocks) // 2 :], dq, own_dk, own_dv)
        own_dk, own_dv = out.summed(own_dk, own_dv, self._grad_dtype)
        return Grads(dq.to(self._q.dtype), own_dk, own_dv, self.dbias)

    def _own_blocks(self, blocks: Sequence[Interval], dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        for keys in blocks:
            at = place_of(self._column, keys)
            rows = slice(at.start, at.stop)
            self._block(self._k[:, rows], self._v[:, rows], keys, AttentionGrads(dq, dk[:, rows], dv[:, rows]))


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum over this rank's rows of exp(sink - lse) * delta. [Hq]"""
    weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
    return -(weights.double() * delta.double()).sum((0, 2)).to(sinks.dtype)


def _own_halves(column: Column) -> Iterator[Interval]:
    """This rank's own keys in two halves, each a list of blocks."""
    rows = column.k_rows
    if len(rows) % 2 == 0:
        yield from rows
        return
    for interval in rows:
        middle = interval.start + interval.size // 2 // 8 * 8
        yield Interval(interval.start, middle)
        yield Interval(middle, interval.stop)


class _Returned:
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
        """The gradients of this rank's keys: the sum over all rows of the grid, in their order."""
        self._messages.post([], self._receives([received for received, _ in self._posts]))
        dk, dv = torch.zeros_like(own_dk), torch.zeros_like(own_dv)
        for row in range(self._column.sizes.ring):
            if row == self._column.row:
                dk += own_dk
                dv += own_dv
            for piece in [p for p in self._expected if p.reader == row]:
                buffer = self._buffers.pop(piece)
                self._messages.wait(self._column.peer(row), piece.index, buffer)
                at = place_of(self._column, piece.keys)
                their_dk, their_dv = views_of(buffer, piece.keys.size, self._k, self._v)
                dk[:, at.start : at.stop] += their_dk
                dv[:, at.start : at.stop] += their_dv
        return dk.to(dtype), dv.to(dtype)
