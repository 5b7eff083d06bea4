"""Attention over a sharded sequence on one rank: heads exchanged for rows, then blocks of keys as they arrive.

Forward, a column of the grid: keys and values that other rows need are posted, a rank's own are computed with, then
the others' in rotated order. One softmax state goes through all of them, so that the bits depend on that order alone.
Backward: half of a rank's own keys, then the other ranks', whose gradients are posted to their owner as each is done,
then the rest of its own; owners sum in rank order in fp32 (fp64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels import attention
from ..kernels.attention_spec import AttentionGrads, AttentionMasks, AttentionSpec, AttentionState, empty_like_heads
from ..kernels.spec import accumulation_dtype
from ..sequence_layout import Interval, Intervals, places
from . import planner
from .attention_choice import Choice
from .attention_exchange import Messages
from .attention_plan import Piece, Sizes, arriving, leaving, pieces, remote_rows


class Extras(NamedTuple):
    """Tensors beside q, k and v. All but the seed concern the query rows and heads that a rank computes."""

    sinks: Tensor | None = None  # [Hq]
    bias: Tensor | None = None  # [B or 1, Hq or 1, Sq or 1, Sk or 1]
    mask: Tensor | None = None
    seed: Tensor | None = None


class Column(NamedTuple):
    """One rank's part once heads have been exchanged for rows."""

    choice: Choice
    group: ProcessGroup | None
    rank: int
    documents: tuple[int, ...] | None
    spec: AttentionSpec  # bounds, scale, softcap and dropout; offsets are set here
    signature: str

    @property
    def sizes(self) -> Sizes:
        return self.choice.sizes

    @property
    def row(self) -> int:
        return self.rank // self.sizes.ulysses

    def peer(self, row: int) -> int:
        return self.sizes.rank(row, self.rank % self.sizes.ulysses)

    @property
    def q_rows(self) -> Intervals:
        return self.sizes.rows(self.sizes.q_len, self.row)

    @property
    def k_rows(self) -> Intervals:
        return self.sizes.rows(self.sizes.k_len, self.row)

    def messages(self, what: str, kind: str = "gather") -> Messages:
        assert self.group is not None
        return Messages(self.group, f"{self.signature}: {what}", kind)

    def documents_at(self, positions: Tensor) -> Tensor | None:
        if self.documents is None:
            return None
        ends = torch.tensor(self.documents[1:], device=positions.device)
        return torch.searchsorted(ends, positions, right=True).to(torch.int32)

    def block(self, extras: Extras, keys: Interval, device: torch.device) -> tuple[AttentionSpec, AttentionMasks]:
        """All our rows against the keys at ``keys``."""
        rows = self.q_rows
        queries = _positions(rows, device)
        spec = self.spec._replace(q_offset=rows[0].start if len(rows) == 1 else 0, k_offset=keys.start)
        documents = self.documents_at(queries)
        key_documents = None if documents is None else self.documents_at(_positions((keys,), device))
        return spec, AttentionMasks(
            q_positions=queries if len(rows) > 1 else None,
            q_documents=documents,
            k_documents=key_documents,
            mask=_columns(extras.mask, keys),
            bias=_columns(extras.bias, keys),
            seed=extras.seed,
        )


def _positions(rows: Intervals, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(0, device=device), *(torch.arange(i.start, i.stop, device=device) for i in rows)])


def _columns(t: Tensor | None, keys: Interval) -> Tensor | None:
    return t if t is None or t.shape[-1] == 1 else t[..., keys.start : keys.stop]


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(
    column: Column, q: Tensor, k: Tensor, v: Tensor, extras: Extras, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Sq, Hq, Dv], lse [B, Hq, Sq] and what is kept of other ranks' keys and values, flat; nothing unless
    ``save``."""
    save = save and column.choice.save_kv
    state = _state(q, v.shape[3], extras.sinks)
    if column.sizes.ring == 1:
        out, lse = _whole_forward(column, q, k, v, extras, state)
        return out, lse, k.new_empty(0)
    with column.messages("keys and values") as messages:
        if column.choice.engine == "all_gather":
            gathered, keys, values = _gathered(column, messages, k, v, None)
            out, lse = _whole_forward(column, q, keys, values, extras, state)
            return out, lse, gathered if save else k.new_empty(0)
        kept = k.new_empty(kept_elements(column.choice, column.rank, k, v)) if save else None
        incoming = _Incoming(column, messages, k, v, kept)
        for interval, keys, values in _own(column, k, v):
            state = _resumed(column, q, keys, values, extras, interval, state)
        for piece, keys, values in incoming:
            state = _resumed(column, q, keys, values, extras, piece.keys, state)
    out, lse = _whole_forward(column, q, k[:, :0], v[:, :0], Extras(), state, Interval(0, 0))
    return out, lse, k.new_empty(0) if kept is None else kept


def kept_elements(choice: Choice, rank: int, k: Tensor, v: Tensor) -> int:
    """How many numbers of other ranks' keys and values ``choice`` keeps; k and v as a column has them."""
    sizes = choice.sizes
    rows = remote_rows(sizes, rank // sizes.ulysses)
    if choice.engine == "all_gather":
        rows = sizes.k_len if sizes.ring > 1 else 0
    return int(k.shape[0] * k.shape[2] * rows * (k.shape[3] + v.shape[3]))


def _state(q: Tensor, value_dim: int, sinks: Tensor | None) -> AttentionState | None:
    """A sink is a key without a value: the state from which all rows of its head begin."""
    if sinks is None or q.shape[0] == 0 or q.shape[2] == 0:
        return None
    acc = empty_like_heads(q, value_dim, accumulation_dtype(q.dtype)).zero_()
    scores = sinks.to(torch.float64) * math.log2(math.e)
    maxima = scores.round().clamp(min=-1e30)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    maxima, sums = (t[None, :, None].expand(shape).contiguous() for t in (maxima, torch.exp2(scores - maxima)))
    return AttentionState(acc, maxima, sums)


def _resumed(
    column: Column, q: Tensor, k: Tensor, v: Tensor, extras: Extras, keys: Interval, state: AttentionState | None
) -> AttentionState | None:
    spec, masks = column.block(extras, keys, q.device)
    return attention.forward(q, k, v, spec, masks, state=state, keep_state=True, finish=False)[2]


def _whole_forward(
    column: Column,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    state: AttentionState | None,
    keys: Interval | None = None,
) -> tuple[Tensor, Tensor]:
    spec, masks = column.block(extras, keys or Interval(0, k.shape[1]), q.device)
    out, lse, _ = attention.forward(q, k, v, spec, masks, state=state)
    assert out is not None and lse is not None
    return out, lse


def _own(column: Column, k: Tensor, v: Tensor) -> Iterator[tuple[Interval, Tensor, Tensor]]:
    """Our own keys and values, an interval of positions at a time."""
    for keys, at in zip(column.k_rows, places(column.k_rows, column.k_rows), strict=True):
        yield keys, k[:, at.start : at.stop], v[:, at.start : at.stop]


def _at(column: Column, keys: Interval) -> Interval:
    """Where ``keys`` lie among our own."""
    return places(column.k_rows, (keys,))[0]


def _views(flat: Tensor, rows: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, rows, Hkv, D] in one message."""
    shapes = [(t.shape[0], rows, t.shape[2], t.shape[3]) for t in (k, v)]
    cut = math.prod(shapes[0])
    return flat[:cut].view(shapes[0]), flat[cut : cut + math.prod(shapes[1])].view(shapes[1])


def _numbers(rows: int, k: Tensor, v: Tensor) -> int:
    return int(rows * k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]))


class _Incoming:
    """Keys and values of other ranks in the order of :func:`.attention_plan.arriving`, while ours go to them.

    Without a workspace bound all of them are posted at once. With one, two messages are under way at a time.
    """

    def __init__(self, column: Column, messages: Messages, k: Tensor, v: Tensor, kept: Tensor | None):
        self._column, self._messages, self._k, self._v, self._kept = column, messages, k, v, kept
        self._packed: dict[Interval, Tensor] = {}
        self._filled = 0
        me, ring = column.row, column.sizes.ring
        into, out = (
            [list(pieces(column.sizes, column.documents, *pair)) for pair in pairs]
            for pairs in (
                [((me - step) % ring, me) for step in range(1, ring)],
                [(me, (me + step) % ring) for step in range(1, ring)],
            )
        )
        # Step by step and message by message, alike on all ranks: each of these is one post.
        self._posts: list[tuple[Piece | None, Piece | None]] = []
        for step in range(ring - 1):
            most = max(len(pieces(column.sizes, column.documents, r, (r + step + 1) % ring)) for r in range(ring))
            for i in range(most):
                self._posts.append((_get(out[step], i), _get(into[step], i)))
        self._buffers: dict[Piece, Tensor] = {}
        self._bounded = planner.max_workspace_bytes() is not None
        if self._bounded:
            self._post(*self._posts[:1])
        else:
            self._post(*self._posts)

    def __iter__(self) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        for i, (_, piece) in enumerate(self._posts):
            buffer = None
            if piece is not None:
                buffer = self._buffers.pop(piece)
                self._messages.wait(self._column.peer(piece.owner), piece.index, buffer)
            if self._bounded:  # what the peers post next they post after this message, so it can leave
                self._messages.drain()
                self._packed.clear()
                self._post(*self._posts[i + 1 : i + 2])
            if piece is not None and buffer is not None:
                yield piece, *_views(buffer, piece.keys.size, self._k, self._v)

    def _post(self, *posts: tuple[Piece | None, Piece | None]) -> None:
        peer = self._column.peer
        sends, receives = [p for p, _ in posts if p], [p for _, p in posts if p]
        for piece in receives:
            self._buffers[piece] = self._room(_numbers(piece.keys.size, self._k, self._v))
        self._messages.post(
            [(peer(p.reader), p.index, self._pack(p.keys)) for p in sends],
            [(peer(p.owner), p.index, self._buffers[p]) for p in receives],
        )

    def _room(self, numbers: int) -> Tensor:
        if self._kept is None:
            return self._k.new_empty(numbers)
        self._filled += numbers
        return self._kept[self._filled - numbers : self._filled]

    def _pack(self, keys: Interval) -> Tensor:
        """Our keys and values at ``keys`` as one message; what several peers need is packed once."""
        if keys not in self._packed:
            at = _at(self._column, keys)
            flat = self._k.new_empty(_numbers(keys.size, self._k, self._v))
            for view, t in zip(_views(flat, keys.size, self._k, self._v), (self._k, self._v), strict=True):
                view.copy_(t[:, at.start : at.stop])
            self._packed[keys] = flat
        return self._packed[keys]


def _get(items: list[Piece], i: int) -> Piece | None:
    return items[i] if i < len(items) else None


def _kept_pieces(column: Column, k: Tensor, v: Tensor, kept: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    at = 0
    for piece in arriving(column.sizes, column.documents, column.row):
        size = _numbers(piece.keys.size, k, v)
        yield piece, *_views(kept[at : at + size], piece.keys.size, k, v)
        at += size


def _gathered(
    column: Column, messages: Messages, k: Tensor, v: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All keys and values in order, zeros where we need none: flat, and as [B, Sk, Hkv, D]."""
    length = column.sizes.k_len
    flat = k.new_zeros(_numbers(length, k, v)) if kept is None else kept
    keys, values = _views(flat, length, k, v)
    if kept is None:
        incoming = _Incoming(column, messages, k, v, None)
        for at, own_keys, own_values in _own(column, k, v):
            keys[:, at.start : at.stop], values[:, at.start : at.stop] = own_keys, own_values
        for piece, their_keys, their_values in incoming:
            rows = slice(piece.keys.start, piece.keys.stop)
            keys[:, rows], values[:, rows] = their_keys, their_values
    return flat, keys, values


# --- backward --------------------------------------------------------------------------------------------------------


class Grads(NamedTuple):
    """dq, dk and dv in the dtype of q or wider; dbias in the accumulation dtype."""

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
        grads = run.whole(k, v, grad_dtype)
        return Grads(*grads, run.dbias)  # type: ignore[arg-type]
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
        """Gradients over all keys in one go."""
        return self._block(k, v, Interval(0, k.shape[1]), None, dtype)

    def _block(
        self, k: Tensor, v: Tensor, keys: Interval, into: AttentionGrads | None, dtype: torch.dtype | None = None
    ) -> AttentionGrads:
        spec, masks = self._column.block(self._extras, keys, self._q.device)
        given = (self._dout, self._q, k, v, self._lse, self._delta, spec, masks)
        if self.dbias is not None:
            target = _columns(self.dbias, keys)
            assert target is not None
            target += attention.bias_gradient(*given, target.shape)
        return attention.backward(*given, into=into, grad_dtype=dtype)

    def over_ranks(self, kept: Tensor) -> Grads:
        """With keys and values of other ranks, kept or fetched again. Either kind of message is a step of its own."""
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
            _, keys, values = _gathered(column, fetch or back, k, v, kept)
            grads = self._block(keys, values, Interval(0, column.sizes.k_len), None, self._wide)
            assert grads.dq is not None and grads.dk is not None and grads.dv is not None
            for piece in arriving(column.sizes, column.documents, column.row):
                rows = slice(piece.keys.start, piece.keys.stop)
                out.send(piece, grads.dk[:, rows], grads.dv[:, rows])
            own_dk, own_dv = (empty_like_heads(t, t.shape[3], self._wide) for t in (k, v))
            for at in column.k_rows:
                rows, place = slice(at.start, at.stop), _at(column, at)
                own_dk[:, place.start : place.stop] = grads.dk[:, rows]
                own_dv[:, place.start : place.stop] = grads.dv[:, rows]
            dk, dv = out.summed(own_dk, own_dv, self._grad_dtype)
            return Grads(grads.dq.to(self._q.dtype), dk, dv, self.dbias)
        if fetch is None:
            assert kept is not None
            remote: Iterator[tuple[Piece, Tensor, Tensor]] = _kept_pieces(column, k, v, kept)
        else:
            remote = iter(_Incoming(column, fetch, k, v, None))
        dq = empty_like_heads(self._q, self._q.shape[3], self._wide).zero_()
        own_dk, own_dv = (empty_like_heads(t, t.shape[3], self._wide).zero_() for t in (k, v))
        blocks = list(_own_halves(column))
        self._own_blocks(blocks[: len(blocks) // 2], dq, own_dk, own_dv)
        for piece, keys, values in remote:
            dk, dv = (torch.zeros(t.shape, dtype=self._wide, device=t.device) for t in (keys, values))
            self._block(keys, values, piece.keys, AttentionGrads(dq, dk, dv))
            out.send(piece, dk, dv)
        self._own_blocks(blocks[len(blocks) // 2 :], dq, own_dk, own_dv)
        own_dk, own_dv = out.summed(own_dk, own_dv, self._grad_dtype)
        return Grads(dq.to(self._q.dtype), own_dk, own_dv, self.dbias)

    def _own_blocks(self, blocks: Sequence[Interval], dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        for keys in blocks:
            at = _at(self._column, keys)
            rows = slice(at.start, at.stop)
            self._block(self._k[:, rows], self._v[:, rows], keys, AttentionGrads(dq, dk[:, rows], dv[:, rows]))


def _own_halves(column: Column) -> Iterator[Interval]:
    """Our own keys in an even number of blocks: each interval in two where there is one, which the masks allow."""
    rows = column.k_rows
    if len(rows) % 2 == 0:
        yield from rows
        return
    for interval in rows:
        middle = interval.start + interval.size // 2 // 8 * 8
        yield Interval(interval.start, middle)
        yield Interval(middle, interval.stop)


class _Returned:
    """Gradients of keys and values on their way to the owner of these, rounded to their dtype."""

    def __init__(self, column: Column, messages: Messages, k: Tensor, v: Tensor):
        self._column, self._messages, self._k, self._v = column, messages, k, v
        self._expected = list(leaving(column.sizes, column.documents, column.row))
        self._buffers = {p: k.new_empty(_numbers(p.keys.size, k, v)) for p in self._expected}
        peer = column.peer
        messages.post([], [(peer(p.reader), p.index, self._buffers[p]) for p in self._expected])

    def send(self, piece: Piece, dk: Tensor, dv: Tensor) -> None:
        flat = self._k.new_empty(_numbers(piece.keys.size, self._k, self._v))
        for view, grad in zip(_views(flat, piece.keys.size, self._k, self._v), (dk, dv), strict=True):
            view.copy_(grad)
        self._messages.post([(self._column.peer(piece.owner), piece.index, flat)], [])

    def summed(self, own_dk: Tensor, own_dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What all rows of the grid have computed of our keys, added in their order."""
        dk, dv = torch.zeros_like(own_dk), torch.zeros_like(own_dv)
        for row in range(self._column.sizes.ring):
            if row == self._column.row:
                dk += own_dk
                dv += own_dv
            for piece in [p for p in self._expected if p.reader == row]:
                buffer = self._buffers.pop(piece)
                self._messages.wait(self._column.peer(row), piece.index, buffer)
                at = _at(self._column, piece.keys)
                their_dk, their_dv = _views(buffer, piece.keys.size, self._k, self._v)
                dk[:, at.start : at.stop] += their_dk
                dv[:, at.start : at.stop] += their_dv
        return dk.to(dtype), dv.to(dtype)
