"""The forward of attention over a sharded sequence on one rank, in a column of the grid.

A rank posts the keys and values that other rows need, computes with its own keys, then with the other rows' keys in
rotated order. One softmax state goes through all of them, so that the bits depend on this order only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels import attention
from ..kernels.attention_spec import AttentionState, empty_like_heads
from ..kernels.spec import accumulation_dtype
from ..sequence_layout import Interval, Intervals
from .attention_column import (
    Column,
    Extras,
    Incoming,
    gathered,
    kept_elements,
    own_blocks,
)
from .attention_plan import arriving


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
