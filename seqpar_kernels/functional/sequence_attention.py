"""Attention over a sequence that the ranks of a group share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import check_chunks, check_float, check_probability, check_same_device, check_tensor
from ..comm.coordination import checked_together
from ..layout import Group, resolve_group, shard_of
from ..ops.registry import group_name
from ..ops.sequence_attention import Scalars
from ..overlap.attention_choice import ENGINES, Choice
from ..overlap.attention_plan import check_documents
from ..random import as_seed, check_seeds_alike, debug_enabled
from ..sequence_layout import check_layout


def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    is_causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attn_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    layout: str = "contiguous",
    engine: str = "auto",
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    save_kv: bool | None = None,
    chunks: int | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys and values of all ranks.

    Tensors are [B, S, H, D], as in flash-attn and Transformer Engine. Pass SDPA's [B, H, S, D] as
    ``x.transpose(1, 2)``, which copies nothing. All ranks of the group must make the call, and run its backward.

    No engine ignores a mask or another argument: an engine that cannot take one raises on all ranks.

    Args:
        q: [B, S/t, Hq, D], this rank's rows of the sequence in ``layout``.
        k: [B, S/t, Hkv, D]; Hkv divides Hq, consecutive query heads share a key head (grouped and multi queries).
        v: [B, S/t, Hkv, Dv]; Dv may differ from D (latent attention).
        group: the ranks that share the sequence: a ProcessGroup, a 1-D DeviceMesh or None for this rank alone.
        is_causal: a row sees no key behind its own position. Where the numbers of queries and keys differ, the last
            query sees the last key, as in flash-attn; PyTorch's SDPA aligns the first ones instead.
        window_size: (left, right): a row at position p, aligned as for ``is_causal``, sees keys p - left .. p + right;
            -1 is no bound. With ``is_causal`` right is 0.
        dropout_p: probability that a weight is dropped. The mask is a function of (seed, batch entry, head, positions),
            so that the result does not depend on how the sequence is sharded. Pass 0 in evaluation, as to SDPA.
        scale: of the scores; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0 leaves them alone.
        sinks: [Hq], a logit of each head that takes part in the softmax and has no value. Counted once.
        attn_bias: broadcast to [B, Hq, S/t, S]: this rank's rows, keys in order of position. Booleans say which keys
            are seen (padding: [B, 1, 1, S]); numbers are added to the scores.
        cu_seqlens: integers [documents + 1] from 0 to S, the same on all ranks: packed documents, whose rows see the
            keys of their own document alone.
        seq_len: rows of the unsharded queries; needed only where that is not a multiple of the number of ranks.
        kv_seq_len: the same of keys; None: ``seq_len`` where this rank has as many keys as queries.
        layout: how queries and keys are sharded, see :func:`sequence_positions`.
        engine: ``"ulysses"``: heads are exchanged for rows, then each rank attends with its heads; the results have the
            bits of one rank. ``"ring"``: ranks send each other the keys and values that masks need, while each computes
            with its own. ``"all_gather"``: the same keys and values, but the computation starts when all are there; the
            results but dk and dv have the bits of one rank. ``"auto"``: the one that sends the fewest bytes.
        ulysses_degree: the number of consecutive ranks that exchange heads; with ``ring_degree`` ranks in a ring this
            is a hybrid of both engines. Their product is the number of ranks.
        ring_degree: see ``ulysses_degree``; one of them is enough.
        save_kv: whether a ring keeps the other ranks' keys and values for the backward, or sends them again. None:
            keeps them where they take no more memory than this rank's q, k, v and result.
        chunks: the number of messages for one rank's keys and values; None: by size. Results do not depend on it.
        return_lse: also return the log-sum-exp of the scores, for :func:`merge_attention`; a sink is part of it.
        seed: as in :func:`dropout_add_layer_norm`, the same on all ranks.

    Returns:
        Tensor: [B, S/t, Hq, Dv], 0 in a row that sees no key; with ``return_lse`` also lse [B, Hq, S/t] in fp32
        (fp64), -inf in such a row unless there are sinks.

        Gradients of ``sinks`` and of broadcast dimensions of ``attn_bias`` are this rank's part: sum them over the
        ranks, as for any replicated parameter that each rank uses for its own rows.

    Raises:
        ValueError: an argument that does not fit, by name, on every rank, before anything is sent.
        RuntimeError: ranks that call with different sizes, or no kernel for the device.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> q = torch.randn(1, 8, 4, 16)
        >>> k, v = torch.randn(2, 1, 8, 2, 16).unbind(0)
        >>> sp.sequence_parallel_attention(q, k, v, group=None, is_causal=True, window_size=(3, 0)).shape
        torch.Size([1, 8, 4, 16])
    """
    pg = resolve_group(group)
    with checked_together(pg):
        q, k, v, attn_bias = cast_as_autocast(q, k, v, attn_bias)
        check_attention_tensors(q, k, v, sinks)
        q_len, k_len = attention_lengths(q, k, pg, seq_len, kv_seq_len)
        bias, mask = check_attention_bias(attn_bias, q, k_len)
        left, right = mask_bounds(window_size, is_causal, k_len - q_len)
        check_attention_options(layout, engine, dropout_p, scale, softcap, chunks, save_kv, ulysses_degree, ring_degree)
        check_cu_seqlens(cu_seqlens, q_len, k_len, q)
        scalars = Scalars(
            q_len,
            k_len,
            q.shape[3] ** -0.5 if scale is None else float(scale),
            float(softcap),
            left,
            right,
            float(dropout_p),
            layout,
            engine,
            ulysses_degree,
            ring_degree,
            save_kv,
            chunks,
            return_lse,
            False,
            group_name(pg),
        )
        if not torch.compiler.is_compiling():  # else the op says so when it is traced
            scalars.choice(scalars.problem(q, k.shape[2], v.shape[3], q.shape[2], bias, mask))
        seed_tensor = as_seed(seed, q.device) if dropout_p > 0 else None
    if seed_tensor is not None and pg is not None and not torch.compiler.is_compiling() and debug_enabled():
        check_seeds_alike(seed_tensor, pg)
    out, lse, *_ = ops.sequence_attention(q, k, v, sinks, bias, mask, cu_seqlens, seed_tensor, *scalars)
    return (out, lse) if return_lse else out


def attention_choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    is_causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attn_bias: Tensor | None = None,
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    layout: str = "contiguous",
    engine: str = "auto",
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    save_kv: bool | None = None,
    chunks: int | None = None,
) -> Choice:
    """How :func:`sequence_parallel_attention` runs with these arguments: engine, grid, bytes, balance and reason."""
    pg = resolve_group(group)
    q_len, k_len = attention_lengths(q, k, pg, seq_len, kv_seq_len)
    bias, mask = check_attention_bias(attn_bias, q, k_len)
    left, right = mask_bounds(window_size, is_causal, k_len - q_len)
    asked = (layout, engine, ulysses_degree, ring_degree, save_kv, chunks, False, False, group_name(pg))
    scalars = Scalars(q_len, k_len, 1.0, 0.0, left, right, 0.0, *asked)
    return scalars.choice(scalars.problem(q, k.shape[2], v.shape[3], q.shape[2], bias, mask))


def cast_as_autocast(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors cast as SDPA casts them under torch.autocast."""
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v, bias
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(q), cast(k), cast(v), bias


def check_attention_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t)
        check_float(name, t)
        check_same_device(name, t, "q", q)
        if t.dim() != 4:
            raise ValueError(f"{name}: expected [B, S/t, H, D], got {tuple(t.shape)}")
        if t.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} like q, got {t.dtype}")
        if t.shape[3] == 0:
            raise ValueError(f"{name}: expected one feature or more, got {tuple(t.shape)}")
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected {q.shape[0]} batch entries like q, got {tuple(t.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected heads of {q.shape[3]} features like q, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected {tuple(k.shape[:3])} like k, got {tuple(v.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] or q.shape[2] == 0:
        raise ValueError(
            f"k: expected a number of heads that divides the {q.shape[2]} of q, got {k.shape[2]}; "
            f"a tensor [B, H, S, D] comes as its transpose(1, 2)"
        )
    if sinks is not None:
        check_tensor("sinks", sinks)
        check_float("sinks", sinks)
        check_same_device("sinks", sinks, "q", q)
        if sinks.shape != (q.shape[2],):
            raise ValueError(f"sinks: expected ({q.shape[2]},), one for each query head, got {tuple(sinks.shape)}")


def attention_lengths(
    q: Tensor, k: Tensor, pg: ProcessGroup | None, seq_len: int | None, kv_seq_len: int | None
) -> tuple[int, int]:
    for name, length in (("seq_len", seq_len), ("kv_seq_len", kv_seq_len)):
        if length is not None and (not isinstance(length, int | torch.SymInt) or isinstance(length, bool)):
            raise ValueError(f"{name}: expected an int or None, got {length!r}")
    if kv_seq_len is None and k.shape[1] == q.shape[1]:
        kv_seq_len = seq_len
    q_len, k_len = (shard_of(n, t.shape[1], pg, s).length for n, t, s in (("q", q, seq_len), ("k", k, kv_seq_len)))
    return int(q_len), int(k_len)


def check_attention_bias(bias: Tensor | None, q: Tensor, k_len: int) -> tuple[Tensor | None, Tensor | None]:
    """A bias [B or 1, Hq or 1, Sq or 1, Sk or 1] or a mask of these sizes."""
    if bias is None:
        return None, None
    check_tensor("attn_bias", bias)
    check_same_device("attn_bias", bias, "q", q)
    full = (q.shape[0], q.shape[2], q.shape[1], k_len)
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if bias.dim() > 4 or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=False)):
        raise ValueError(
            f"attn_bias: expected what can be broadcast to {full}: batch, query heads, this rank's queries and all "
            f"keys of the unsharded sequence; got {tuple(bias.shape)}"
        )
    if bias.dtype == torch.bool:
        return None, bias.view(sizes)
    if not bias.is_floating_point():
        raise ValueError(f"attn_bias: expected booleans or floating-point numbers, got {bias.dtype}")
    check_float("attn_bias", bias)
    return bias.view(sizes), None


def mask_bounds(window_size: Sequence[int], is_causal: bool, ahead: int) -> tuple[int | None, int | None]:
    """(left, right): a row at P sees keys P - left .. P + right. ``ahead``: the number of keys less that of queries."""
    found = tuple(window_size) if isinstance(window_size, Sequence) else window_size
    if not isinstance(found, tuple) or len(found) != 2 or not all(type(n) is int and n >= -1 for n in found):
        raise ValueError(f"window_size: expected (left, right), ints of -1 or more, got {window_size!r}")
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal: expected a bool, got {is_causal!r}")
    left, right = found
    if is_causal:
        right = 0
    return (None if left < 0 else left - ahead), (None if right < 0 else right + ahead)


def check_attention_options(
    layout: str,
    engine: str,
    dropout_p: float,
    scale: float | None,
    softcap: float,
    chunks: int | None,
    save_kv: bool | None,
    ulysses_degree: int | None,
    ring_degree: int | None,
) -> None:
    check_layout(layout)
    check_probability("dropout_p", dropout_p)
    check_chunks(chunks)
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    check_scores(scale, softcap)
    if save_kv is not None and not isinstance(save_kv, bool):
        raise ValueError(f"save_kv: expected a bool or None, got {save_kv!r}")
    for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
        if degree is not None and (type(degree) is not int or degree < 1):
            raise ValueError(f"{name}: expected a positive int or None, got {degree!r}")


def check_scores(scale: float | None, softcap: float) -> None:
    if scale is not None and (not isinstance(scale, int | float) or not -math.inf < scale < math.inf):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    if not isinstance(softcap, int | float) or not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number, 0 or more, got {softcap!r}")


def check_cu_seqlens(cu_seqlens: Tensor | None, q_len: int, k_len: int, q: Tensor) -> None:
    if cu_seqlens is None:
        return
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 [documents + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if not torch.compiler.is_compiling():  # else the op does, once there are values
        check_documents(tuple(cu_seqlens.tolist()), q_len, k_len)
