"""Decoding over keys that the ranks of a group share: the key at position p is on rank p mod t, in slot p // t.

Every rank attends with its own keys. What each has, a softmax not yet divided by its sum, goes to every peer in one
message, and is added there in rank order. Bytes on the wire depend on the new rows, never on the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels import attention
from ..kernels.attention_spec import NO_MASKS, AttentionMasks, AttentionSpec, AttentionState
from ..kernels.spec import accumulation_dtype
from ..layout import group_rank, group_size
from ..sequence_layout import Interval, Intervals
from .attention_exchange import Messages, message_buffer

# --- what is where ---------------------------------------------------------------------------------------------------


def keys_of(kv_seq_len: int, ranks: int, rank: int) -> int:
    """How many of ``kv_seq_len`` keys ``rank`` holds."""
    return (kv_seq_len - rank + ranks - 1) // ranks


class Taken(NamedTuple):
    """Rows of a shard that one rank holds in the cache: every t-th; they lie one behind the other there."""

    rows: slice  # of the shard
    slot: int  # of the first one
    size: int


def taken(rows: Intervals, first: int, ranks: int, owner: int) -> list[Taken]:
    """What ``owner`` takes of a shard that holds ``rows``; these count from the position ``first``."""
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
    """What one rank holds of new keys and values before they are at their owners."""

    rows: Intervals
    heads: range


class Source(NamedTuple):
    """What all ranks hold of new keys and values: some rows of all heads each, or all rows of some heads each.

    Several ranks may hold the same head.
    """

    held: tuple[Held, ...]
    by_heads: bool
    first: int  # the position that rows count from

    def rows(self, source: int, owner: int) -> list[Taken]:
        """Rows of ``source`` for ``owner``."""
        return taken(self.held[source].rows, self.first, len(self.held), owner)

    def heads(self, source: int, owner: int) -> range:
        """Heads of ``source`` for ``owner``: those that several have come from one of them."""
        heads = self.held[source].heads
        if not self.by_heads:
            return heads
        sent = [h for h in heads if self._sender(h, owner) == source]
        return range(sent[0], sent[-1] + 1) if sent else range(0)

    def _sender(self, head: int, owner: int) -> int:
        holders = [rank for rank, held in enumerate(self.held) if head in held.heads]
        return owner if owner in holders else holders[owner % len(holders)]


def heads_of(heads: int, ranks: int, rank: int) -> range:
    """A rank's heads: a multiple of the ranks is cut, of a divisor each goes to ranks / heads neighbours."""
    each = max(1, heads // ranks)
    start = rank * heads // ranks
    return range(start, start + each)


# --- new keys and values to their owners -----------------------------------------------------------------------------

#: Puts rows of some heads, [B, rows, heads, D] and [B, rows, heads, Dv], into this rank's cache from a slot on.
Store = Callable[[range, int, Tensor, Tensor], None]


def store_own(source: Source, rank: int, k: Tensor, v: Tensor, store: Store) -> None:
    """Put what ``rank`` holds itself of its keys into its cache."""
    heads, held = source.heads(rank, rank), source.held[rank].heads
    if len(heads):
        some = slice(heads.start - held.start, heads.stop - held.start)
        for part in source.rows(rank, rank):
            store(heads, part.slot, k[:, part.rows, some], v[:, part.rows, some])


def to_owners(
    group: ProcessGroup, signature: str, source: Source, k: Tensor, v: Tensor, store: Store, q: Tensor | None = None
) -> Tensor | None:
    """New keys and values to the ranks that hold their positions, one message a peer; with ``q``, this rank's heads of
    the new rows, all heads of it come back, [B, n, Hq, D]."""
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
    return None if q is None else torch.cat([parts[r] for r in range(ranks)], 2)  # type: ignore[misc]


def check_lengths(what: str, lengths: dict[int, int]) -> None:
    """
    Raises:
        RuntimeError: on every rank, where they do not hold as many keys.
    """
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"rank {rank}: {lengths[rank]}" for rank in sorted(lengths))
        raise RuntimeError(f"{what}: the ranks disagree on how many keys they share: {said}")


# --- attention -------------------------------------------------------------------------------------------------------


class Masking(NamedTuple):
    """What a call says beside its tensors, alike on all ranks."""

    kv_seq_len: int  # the queries are the last rows of so many
    scale: float
    softcap: float
    left: int | None
    right: int | None


def attend(
    group: ProcessGroup | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    masking: Masking,
    own_heads: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, n, h, Dv] and lse [B, h, n] of all query heads, or with ``own_heads`` of those of :func:`heads_of`.

    ``q`` has all heads, ``k`` and ``v`` this rank's keys; ``sinks`` concern the heads of the result; ``bias`` and
    ``mask`` have a column for each of ``kv_seq_len`` keys, or one.
    """
    rank, ranks = group_rank(group), group_size(group)
    state = _own_part(rank, ranks, q, k, v, bias, mask, masking)
    if group is None:
        parts = [state]
    else:
        signature = (
            f"decode_attention(B={q.shape[0]}, {q.shape[1]} rows, heads {q.shape[2]}, {k.shape[2]}, "
            f"sizes {q.shape[3]}, {v.shape[3]}, {q.dtype}, window {masking.left}, {masking.right}, "
            f"scale {masking.scale}, softcap {masking.softcap}, own_heads={own_heads}, sinks={sinks is not None}, "
            f"bias={bias is not None or mask is not None})"
        )
        parts = _exchanged(group, signature, state, masking.kv_seq_len, own_heads)
    return _merged(parts, sinks, q.dtype)


def _own_part(
    rank: int,
    ranks: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    masking: Masking,
) -> AttentionState:
    """The softmax over this rank's keys. acc [B, n, Hq, Dv], maxima and sums [B, Hq, n]"""
    batch, rows, heads, _ = q.shape
    first = masking.kv_seq_len - rows
    low = 0 if masking.left is None else first - masking.left
    high = masking.kv_seq_len if masking.right is None else masking.kv_seq_len + masking.right
    some = slice(*(min(max(0, keys_of(end, ranks, rank)), k.shape[1]) for end in (low, high)))
    k, v = k[:, some], v[:, some]
    bias, mask = (t if t is None or t.shape[-1] == 1 else t[..., rank::ranks][..., some] for t in (bias, mask))
    if attention.no_work(q, k):
        wide = accumulation_dtype(q.dtype)
        shape = (batch, heads, rows)
        acc = torch.zeros(batch, rows, heads, v.shape[3], dtype=wide, device=q.device)
        return AttentionState(acc, *torch.zeros(2, *shape, dtype=torch.float64, device=q.device))
    # Query heads that share a key head become rows of it: each key is then read once for all of them.
    by_head = any(t is not None and t.shape[1] > 1 for t in (bias, mask))
    share = 1 if by_head else heads // k.shape[2]
    if share > 1:
        q = q.unflatten(2, (k.shape[2], share)).transpose(2, 3).flatten(1, 2)
        bias, mask = (t if t is None or t.shape[2] == 1 else t.repeat_interleave(share, 2) for t in (bias, mask))
    spec, masks = AttentionSpec(masking.scale, masking.softcap), NO_MASKS
    if rows > 1 and (masking.left is not None or masking.right is not None):
        spec = spec._replace(left=masking.left, right=masking.right)
        queries = torch.arange(first, masking.kv_seq_len, device=q.device).repeat_interleave(share)
        keys = torch.arange(some.start, some.start + k.shape[1], device=q.device) * ranks + rank
        masks = AttentionMasks(q_positions=queries, k_positions=keys)
    masks = masks._replace(bias=bias, mask=mask)
    *_, state = attention.forward(q, k, v, spec, masks, keep_state=True, finish=False)
    assert state is not None
    if share == 1:
        return state
    acc = state.acc.unflatten(1, (rows, share)).transpose(2, 3).flatten(2, 3)
    maxima, sums = (t.unflatten(2, (rows, share)).transpose(2, 3).flatten(1, 2) for t in state[1:])
    return AttentionState(acc, maxima, sums)


def _exchanged(
    group: ProcessGroup, signature: str, state: AttentionState, kv_seq_len: int, own_heads: bool
) -> list[AttentionState]:
    """The states of all ranks, in their order."""
    rank, ranks = group.rank(), group.size()
    heads = state.acc.shape[2]

    def part(owner: int) -> AttentionState:
        some = heads_of(heads, ranks, owner) if own_heads else range(heads)
        cut = slice(some.start, some.stop)
        return AttentionState(state.acc[:, :, cut], state.maxima[:, cut], state.sums[:, cut])

    parts = {rank: part(rank)}
    shapes: list[tuple[Any, torch.dtype]] = [((1,), torch.int64), *((t.shape, t.dtype) for t in parts[rank])]
    packed: Tensor | None = None
    with Messages(group, signature) as messages:
        sends, receives, arriving = [], [], {}
        for peer in (other for other in range(ranks) if other != rank):
            if own_heads or packed is None:  # else all peers get the same
                packed, (header, *views) = message_buffer(shapes, state.acc.device)
                header.fill_(kv_seq_len)
                for view, t in zip(views, part(peer), strict=True):
                    view.copy_(t)
            sends.append((peer, 0, packed))
            buffer, arriving[peer] = message_buffer(shapes, state.acc.device)
            receives.append((peer, 0, buffer))
        messages.post(sends, receives)
        for peer, index, buffer in receives:
            messages.wait(peer, index, buffer)
    check_lengths(signature, {peer: int(views[0]) for peer, views in arriving.items()} | {rank: kv_seq_len})
    for peer, views in arriving.items():
        parts[peer] = AttentionState(*views[1:])
    return [parts[r] for r in range(ranks)]


def _merged(parts: Sequence[AttentionState], sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse of the sum of ``parts``, in their order. Maxima are integers, so that rescaling is exact."""
    highest, sink = parts[0].maxima, None
    for part in parts[1:]:
        highest = torch.maximum(highest, part.maxima)
    if sinks is not None:  # a key without a value
        sink = (sinks.to(torch.float64) * math.log2(math.e))[None, :, None]
        highest = torch.maximum(highest, sink.round().clamp(min=-1e30))
    sums = torch.zeros_like(highest) if sink is None else torch.exp2(sink - highest)
    acc = torch.zeros_like(parts[0].acc)
    for part in parts:
        factor = torch.exp2(part.maxima - highest)
        sums = sums + part.sums * factor
        acc = acc + part.acc * factor.to(acc.dtype).transpose(1, 2)[..., None]
    nothing = sums == 0
    total = torch.where(nothing, 1.0, sums)
    out = acc / total.to(acc.dtype).transpose(1, 2)[..., None]
    lse = torch.where(nothing, -math.inf, (highest + torch.log2(total)) * math.log(2))
    return out.to(dtype), lse.to(acc.dtype)


def whole(rows: int, heads: int, ranks: int, first: int) -> Source:
    """Every rank holds all rows of all heads."""
    return Source((Held((Interval(0, rows),), range(heads)),) * ranks, False, first)
