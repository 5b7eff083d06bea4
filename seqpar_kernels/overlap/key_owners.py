"""Owners of the keys of a cache that ranks share, and the sending of new keys and values to them.

Position p is on rank p mod t, in slot p // t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..sequence_layout import Intervals
from .messages import Messages, message_buffer


def keys_of(kv_seq_len: int, ranks: int, rank: int) -> int:
    """The number of keys that ``rank`` holds of ``kv_seq_len``."""
    return (kv_seq_len - rank + ranks - 1) // ranks


class Taken(NamedTuple):
    """The rows of a shard that one rank holds in the cache: every t-th row, in consecutive slots."""

    rows: slice  # of the shard
    slot: int  # of the first one
    size: int


def taken(rows: Intervals, first: int, ranks: int, owner: int) -> list[Taken]:
    """The rows that ``owner`` takes of a shard that holds ``rows``; these count from the position ``first``."""
    found, before = [], 0
    for interval in rows:
        skipped = (owner - first - interval.start) % ranks
        size = keys_of(interval.size, ranks, skipped)
        if size > 0:
            rows_at = slice(before + skipped, before + interval.size, ranks)
            found.append(Taken(rows_at, (first + interval.start + skipped) // ranks, size))
        before += interval.size
    return found


class Held(NamedTuple):
    """The part of new keys and values that one rank has, before they are sent to their owners."""

    rows: Intervals
    heads: range


class Source(NamedTuple):
    """The parts of new keys and values that all ranks have: each some rows of all heads, or all rows of some heads.

    Several ranks may hold the same head.
    """

    held: tuple[Held, ...]
    by_heads: bool
    first: int  # the position that rows count from

    def rows(self, source: int, owner: int) -> list[Taken]:
        """Rows of ``source`` for ``owner``."""
        return taken(self.held[source].rows, self.first, len(self.held), owner)

    def heads(self, source: int, owner: int) -> range:
        """Heads of ``source`` for ``owner``: one rank sends a head that several ranks have."""
        heads = self.held[source].heads
        if not self.by_heads:
            return heads
        sent = [h for h in heads if self._sender(h, owner) == source]
        return range(sent[0], sent[-1] + 1) if sent else range(0)

    def _sender(self, head: int, owner: int) -> int:
        holders = [rank for rank, held in enumerate(self.held) if head in held.heads]
        return owner if owner in holders else holders[owner % len(holders)]


def heads_of(heads: int, ranks: int, rank: int) -> range:
    """A rank's heads. ``heads`` is a multiple or a divisor of the ranks; with a divisor ranks share each head."""
    each = max(1, heads // ranks)
    start = rank * heads // ranks
    return range(start, start + each)


# --- new keys and values to their owners -----------------------------------------------------------------------------

#: Puts rows of some heads, [B, rows, heads, D] and [B, rows, heads, Dv], into this rank's cache from a slot on.
Store = Callable[[range, int, Tensor, Tensor], None]


def store_own(source: Source, rank: int, k: Tensor, v: Tensor, store: Store) -> None:
    """Put the new keys that ``rank`` has and owns into its cache."""
    heads, held = source.heads(rank, rank), source.held[rank].heads
    if len(heads):
        some = slice(heads.start - held.start, heads.stop - held.start)
        for part in source.rows(rank, rank):
            store(heads, part.slot, k[:, part.rows, some], v[:, part.rows, some])


def to_owners(
    group: ProcessGroup, signature: str, source: Source, k: Tensor, v: Tensor, store: Store, q: Tensor | None = None
) -> Tensor | None:
    """Send new keys and values to the ranks that hold their positions, one message a peer.

    ``q`` [B, n, this rank's heads, D]: the new rows; returned with all heads, [B, n, Hq, D]."""
    rank, ranks = group.rank(), group.size()
    held = source.held[rank].heads

    def message(sender: int, owner: int) -> tuple[Tensor, list[Tensor]]:
        rows, heads = sum(part.size for part in source.rows(sender, owner)), len(source.heads(sender, owner))
        shapes: list[tuple[Sequence[int], torch.dtype]] = [((1,), torch.int64)]
        shapes += [((t.shape[0], rows, heads, t.shape[3]), t.dtype) for t in (k, v)]
        shapes += [] if q is None else [(q.shape, q.dtype)]
        return message_buffer(shapes, k.device)

    parts = {rank: q}
    with Messages(group, f"{signature} first={source.first % ranks}") as messages:
        sends, receives, arriving = [], [], {}
        for peer in (other for other in range(ranks) if other != rank):
            buffer, (header, keys, values, *queries) = message(rank, peer)
            header.fill_(source.first)
            heads, before = source.heads(rank, peer), 0
            some = slice(heads.start - held.start, heads.stop - held.start) if len(heads) else slice(0, 0)
            for part in source.rows(rank, peer):
                keys[:, before : before + part.size] = k[:, part.rows, some]
                values[:, before : before + part.size] = v[:, part.rows, some]
                before += part.size
            if q is not None:
                queries[0].copy_(q)
            sends.append((peer, 0, buffer))
            buffer, arriving[peer] = message(peer, rank)
            receives.append((peer, 0, buffer))
        messages.post(sends, receives)
        store_own(source, rank, k, v, store)
        for peer, index, buffer in receives:
            messages.wait(peer, index, buffer)
    said = {peer: int(views[0]) for peer, views in arriving.items()}
    check_lengths(signature, {**said, rank: source.first})
    for peer, (_, keys, values, *queries) in arriving.items():
        heads, before = source.heads(peer, rank), 0
        for part in source.rows(peer, rank):
            if len(heads):
                some = slice(before, before + part.size)
                store(heads, part.slot, keys[:, some], values[:, some])
            before += part.size
        parts[peer] = queries[0] if queries else None
    return None if q is None else torch.cat([found for r in range(ranks) if (found := parts[r]) is not None], 2)


def check_lengths(what: str, lengths: dict[int, int]) -> None:
    """
    Raises:
        RuntimeError: on every rank, where ranks have different lengths.
    """
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"rank {rank}: {lengths[rank]}" for rank in sorted(lengths))
        raise RuntimeError(f"{what}: the ranks disagree on how many keys they share: {said}")
