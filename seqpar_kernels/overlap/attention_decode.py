"""Decoding over keys that the ranks of a group share: the key at position p is on rank p mod t, in slot p // t.

Every rank attends over its own keys. It sends its partial result, a softmax that is not yet divided by its sum, to
every peer in one message. All ranks sum the partial results in rank order. The number of bytes sent depends on the new
rows, never on the length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels import attention
from ..kernels.attention_spec import NO_MASKS, AttentionMasks, AttentionSpec, AttentionState
from ..kernels.spec import accumulation_dtype
from ..layout import group_rank, group_size
from .key_owners import check_lengths, heads_of, keys_of
from .messages import Messages, message_buffer


class Masking(NamedTuple):
    """The scalars of a call, the same on all ranks."""

    kv_seq_len: int  # the queries are the last rows of a sequence of this length
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
    # Query heads that share a key head become rows of one head, so that each key is read once for all of them.
    by_head = any(t is not None and t.shape[1] > 1 for t in (bias, mask))
    share = 1 if by_head else heads // k.shape[2]
    if share > 1:
        q = q.unflatten(2, (k.shape[2], share)).transpose(2, 3).flatten(1, 2)
        bias, mask = (t if t is None or t.shape[2] == 1 else t.repeat_interleave(share, 2) for t in (bias, mask))
    spec, masks = AttentionSpec(masking.scale, masking.softcap), NO_MASKS
    if rows > 1 and (masking.left is not None or masking.right is not None):
        spec = spec._replace(left=masking.left, right=masking.right, ordered=True)
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
    """The partial results of all ranks, in rank order."""
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
            if own_heads or packed is None:  # else all peers get the same message
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
    """out and lse of the sum of ``parts`` in this order. Maxima are integers, so that rescaling is exact."""
    highest, sink = parts[0].maxima, None
    for part in parts[1:]:
        highest = torch.maximum(highest, part.maxima)
    if sinks is not None:  # a sink is a key without a value
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
