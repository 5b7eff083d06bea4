"""Attention of new rows over keys that the ranks of a group share, and the sending of new keys to their owners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..comm.coordination import checked_together
from ..layout import Group, group_rank, group_size, resolve_group
from ..ops.registry import group_name
from ..overlap.key_owners import Source, Store, keys_of, store_own, to_owners
from .sequence_attention import (
    cast_as_autocast,
    check_attention_bias,
    check_attention_tensors,
    check_scores,
    mask_bounds,
)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    kv_seq_len: int,
    is_causal: bool = True,
    window_size: Sequence[int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attn_bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a sequence's last rows over sharded keys: the key at position p is on rank p mod t.

    :class:`SequenceShardedCache` keeps its keys in this way; call this function with a cache of your own. Every rank
    attends over the keys that it holds, sends its partial result to every peer in one message, and sums all partial
    results in rank order in fp32 (fp64 for fp64). The result has the same bits on all ranks. The number of bytes sent
    depends on the new rows, not on ``kv_seq_len``. All ranks of the group must make the call. There is no gradient.

    Args:
        q: [B, n, Hq, D], the same on every rank: the last n rows of a sequence of ``kv_seq_len``.
        k: [B, Sr, Hkv, D]: keys at positions r, r + t, r + 2 t ... below ``kv_seq_len`` on rank r of t, those of the
            new rows among them. Hkv divides Hq.
        v: [B, Sr, Hkv, Dv]; Dv may be unlike D.
        group: the ranks that share the keys: a ProcessGroup, a 1-D DeviceMesh or None for this rank alone.
        kv_seq_len: keys of all ranks together.
        is_causal: a row sees no key behind its own position.
        window_size: (left, right): a row at position p sees keys p - left .. p + right; -1 is no bound.
        scale: of the scores; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0 leaves them alone.
        sinks: [Hq], a logit of each head that takes part in the softmax and has no value. Counted once.
        attn_bias: broadcast to [B, Hq, n, kv_seq_len], keys in order of position, the same on every rank. Booleans say
            which keys are seen (padding: [B, 1, 1, kv_seq_len]); numbers are added to the scores.
        return_lse: also return the log-sum-exp of the scores; a sink is part of it.

    Returns:
        Tensor: [B, n, Hq, Dv], 0 in a row that sees no key; with ``return_lse`` also lse [B, Hq, n] in fp32 (fp64),
        -inf in such a row unless there are sinks.

    Raises:
        ValueError: an argument that does not fit or requires a gradient, by name, on every rank, before any is sent.
        RuntimeError: ranks that call with unlike sizes or lengths, or no kernel for the device.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> q = torch.randn(1, 1, 4, 16)
        >>> k, v = torch.randn(2, 1, 8, 2, 16).unbind(0)
        >>> sp.decode_attention(q, k, v, group=None, kv_seq_len=8).shape
        torch.Size([1, 1, 4, 16])
    """
    pg = resolve_group(group)
    with checked_together(pg):
        q, k, v, attn_bias = cast_as_autocast(q, k, v, attn_bias)
        check_attention_tensors(q, k, v, sinks)
        check_no_gradient(q=q, k=k, v=v, sinks=sinks, attn_bias=attn_bias)
        _check_length(q, k, pg, kv_seq_len)
        scalars = decode_scalars(q, kv_seq_len, is_causal, window_size, scale, softcap)
        bias, mask = check_attention_bias(attn_bias, q, kv_seq_len)
    out, lse = ops.decode_attention(q, k, v, sinks, bias, mask, *scalars, False, group_name(pg))
    return (out, lse) if return_lse else out


def decode_scalars(
    q: Tensor, kv_seq_len: int, is_causal: bool, window_size: Sequence[int], scale: float | None, softcap: float
) -> tuple[Any, ...]:
    """Scalars of the op, checked."""
    check_scores(scale, softcap)
    bounds = mask_bounds(window_size, is_causal, 0)
    return (kv_seq_len, q.shape[3] ** -0.5 if scale is None else float(scale), float(softcap), *bounds)


def check_no_gradient(**tensors: Tensor | None) -> None:
    """
    Raises:
        ValueError: a tensor requires a gradient, and decoding has no backward.
    """
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if getattr(t, "requires_grad", False):
                raise ValueError(
                    f"{name}: expected requires_grad=False, since decoding has no backward, got requires_grad=True; "
                    f"call under torch.no_grad(), or use sequence_parallel_attention to train"
                )


def _check_length(q: Tensor, k: Tensor, pg: ProcessGroup | None, kv_seq_len: int) -> None:
    if not isinstance(kv_seq_len, int | torch.SymInt) or isinstance(kv_seq_len, bool) or kv_seq_len < 1:
        raise ValueError(f"kv_seq_len: expected a positive int, got {kv_seq_len!r}")
    if not 1 <= q.shape[1] <= kv_seq_len:
        raise ValueError(f"q: expected the last rows of kv_seq_len={kv_seq_len}, one or more, got {tuple(q.shape)}")
    ranks, rank = group_size(pg), group_rank(pg)
    rows = keys_of(kv_seq_len, ranks, rank)
    if k.shape[1] != rows:
        raise ValueError(
            f"k: expected {rows} keys on rank {rank} of {ranks}, those at {rank}, {rank + ranks} ... below "
            f"kv_seq_len={kv_seq_len}, got {tuple(k.shape)}"
        )


def keys_to_owners(
    pg: ProcessGroup | None, source: Source, k: Tensor, v: Tensor, store: Store, q: Tensor | None = None
) -> Tensor | None:
    """Put new keys and values into the caches of the ranks that hold their positions. The arguments are checked.

    ``q`` [B, n, heads of this rank, D]: the new rows; the result has all their heads.
    """
    rank = group_rank(pg)
    travels = pg is not None and (source.by_heads or any(h.rows != source.held[0].rows for h in source.held))
    if pg is None or not travels:
        store_own(source, rank, k, v, store)
        return q
    shapes = f"B={k.shape[0]}, {[(h.rows, h.heads) for h in source.held]}, sizes {k.shape[3]}, {v.shape[3]}, {k.dtype}"
    queries = "" if q is None else f", queries {tuple(q.shape[1:])}"
    signature = f"SequenceShardedCache(keys to their owners, {shapes}{queries})"
    return to_owners(pg, signature, source, k, v, store, q)
