"""One rank of a column of the grid: its queries, its keys, and the keys and values that it receives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels.attention_spec import AttentionMasks, AttentionSpec
from ..sequence_layout import Interval, Intervals, places
from . import planner
from .attention_choice import Choice
from .attention_plan import Piece, Sizes, arriving, exchanged, remote_rows
from .messages import Messages


class Extras(NamedTuple):
    """Tensors beside q, k and v. All but the seed are those of the query rows and heads that a rank computes."""

    sinks: Tensor | None = None  # [Hq]
    bias: Tensor | None = None  # [B or 1, Hq or 1, Sq or 1, Sk or 1]
    mask: Tensor | None = None
    seed: Tensor | None = None


class Column(NamedTuple):
    """One rank's part of a call, after heads have been exchanged for rows."""

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

    def block(
        self, extras: Extras, keys: Interval | Intervals, device: torch.device
    ) -> tuple[AttentionSpec, AttentionMasks]:
        """The kernel call of this rank's rows with ``keys``: one interval where a bias or a mask has a column a key."""
        rows, keys = self.q_rows, (keys,) if isinstance(keys, Interval) else keys
        queries, apart = _positions(rows, device), len(keys) > 1
        first = keys[0] if keys else Interval(0, 0)
        key_positions = _positions(keys, device) if apart or self.documents is not None else None
        spec = self.spec._replace(q_offset=rows[0].start if len(rows) == 1 else 0, k_offset=0 if apart else first.start)
        spec = spec._replace(ordered=True)  # intervals ascend, and documents with positions
        return spec, AttentionMasks(
            q_positions=queries if len(rows) > 1 else None,
            k_positions=key_positions if apart else None,
            q_documents=self.documents_at(queries),
            k_documents=None if key_positions is None else self.documents_at(key_positions),
            mask=columns_of(extras.mask, first),
            bias=columns_of(extras.bias, first),
            seed=extras.seed,
        )


def _positions(rows: Intervals, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(0, device=device), *(torch.arange(i.start, i.stop, device=device) for i in rows)])


def columns_of(t: Tensor | None, keys: Interval) -> Tensor | None:
    return t if t is None or t.shape[-1] == 1 else t[..., keys.start : keys.stop]


def kept_elements(choice: Choice, rank: int, k: Tensor, v: Tensor) -> int:
    """The number of elements of other ranks' keys and values that ``choice`` keeps; k and v are those of a column."""
    sizes = choice.sizes
    rows = remote_rows(sizes, rank // sizes.ulysses)
    if choice.engine == "all_gather":
        rows = sizes.k_len if sizes.ring > 1 else 0
    return int(k.shape[0] * k.shape[2] * rows * (k.shape[3] + v.shape[3]))


def own_blocks(column: Column, k: Tensor, v: Tensor) -> Iterator[tuple[Interval, Tensor, Tensor]]:
    """This rank's own keys and values, one interval of positions at a time."""
    for keys, at in zip(column.k_rows, places(column.k_rows, column.k_rows), strict=True):
        yield keys, k[:, at.start : at.stop], v[:, at.start : at.stop]


def place_of(column: Column, keys: Interval) -> Interval:
    """The rows of this rank's keys at the positions ``keys``."""
    return places(column.k_rows, (keys,))[0]


def views_of(flat: Tensor, rows: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, rows, Hkv, D] in one message."""
    shapes = [(t.shape[0], rows, t.shape[2], t.shape[3]) for t in (k, v)]
    cut = math.prod(shapes[0])
    return flat[:cut].view(shapes[0]), flat[cut : cut + math.prod(shapes[1])].view(shapes[1])


def numbers_of(rows: int, k: Tensor, v: Tensor) -> int:
    return int(rows * k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]))


class Incoming:
    """Receives keys and values of other ranks in the order of :func:`.attention_plan.arriving`, and sends this rank's.

    Without a workspace bound all messages are posted at once. With a bound two messages are in flight at a time.
    Iterating gives None for what other ranks receive and this one does not.
    """

    def __init__(self, column: Column, messages: Messages, k: Tensor, v: Tensor, kept: Tensor | None):
        self._column, self._messages, self._k, self._v, self._kept = column, messages, k, v, kept
        self._packed: dict[Interval, Tensor] = {}
        self._filled = 0
        self._posts = exchanged(column.sizes, column.documents, column.row)
        self._buffers: dict[Piece, Tensor] = {}
        self._bounded = planner.max_workspace_bytes() is not None
        if self._bounded:
            self._post(*self._posts[:1])
        else:
            self._post(*self._posts)

    def __iter__(self) -> Iterator[tuple[Piece, Tensor, Tensor] | None]:
        for i, (_, piece) in enumerate(self._posts):
            if piece is not None:
                self._messages.wait(self._column.peer(piece.owner), piece.index, self._buffers[piece])
            if self._bounded:  # the peers post their next message after this one, so that this one must leave first
                self._messages.drain()
                self._packed.clear()
                self._post(*self._posts[i + 1 : i + 2])
            yield None if piece is None else self._taken(piece)

    def _taken(self, piece: Piece) -> tuple[Piece, Tensor, Tensor]:
        """What has arrived; the caller alone holds it."""
        return piece, *views_of(self._buffers.pop(piece), piece.keys.size, self._k, self._v)

    def _post(self, *posts: tuple[Piece | None, Piece | None]) -> None:
        peer = self._column.peer
        sends, receives = [p for p, _ in posts if p], [p for _, p in posts if p]
        for piece in receives:
            self._buffers[piece] = self._room(numbers_of(piece.keys.size, self._k, self._v))
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
        """This rank's keys and values at ``keys`` as one message; a message for several peers is packed once."""
        if keys not in self._packed:
            at = place_of(self._column, keys)
            flat = self._k.new_empty(numbers_of(keys.size, self._k, self._v))
            for view, t in zip(views_of(flat, keys.size, self._k, self._v), (self._k, self._v), strict=True):
                view.copy_(t[:, at.start : at.stop])
            self._packed[keys] = flat
        return self._packed[keys]


def kept_pieces(column: Column, k: Tensor, v: Tensor, kept: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    at = 0
    for piece in arriving(column.sizes, column.documents, column.row):
        size = numbers_of(piece.keys.size, k, v)
        yield piece, *views_of(kept[at : at + size], piece.keys.size, k, v)
        at += size


def gathered(
    column: Column, messages: Messages, k: Tensor, v: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All keys and values in order, zeros where this rank needs none: flat, and as [B, Sk, Hkv, D]."""
    length = column.sizes.k_len
    flat = k.new_zeros(numbers_of(length, k, v)) if kept is None else kept
    keys, values = views_of(flat, length, k, v)
    if kept is None:
        incoming = Incoming(column, messages, k, v, None)
        for at, own_keys, own_values in own_blocks(column, k, v):
            keys[:, at.start : at.stop], values[:, at.start : at.stop] = own_keys, own_values
        for piece, their_keys, their_values in filter(None, incoming):
            rows = slice(piece.keys.start, piece.keys.stop)
            keys[:, rows], values[:, rows] = their_keys, their_values
    return flat, keys, values
