"""Causal attention of the heads that a rank holds."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..checks import check_probability, check_same_device, check_sequence, check_tensor, renamed
from ..comm.coordination import checked_together
from ..layout import Group, group_rank, group_size, resolve_group
from ..random import as_seed


@renamed(head_size="head_dim", rotary_base="rope_theta")
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_dim: int,
    p: float = 0.0,
    training: bool = True,
    rope_theta: float | None = None,
    group: Group = None,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Causal attention over the whole sequence with this rank's heads; keeps q, k, v and its result.

    Without dropout this calls PyTorch's fused kernel. With dropout it calls an op of this package, whose mask is that
    of the unsharded attention: row (seed, batch, head of all ranks, query), column key. PyTorch would draw the mask
    from the generator, and on ranks with one seed different heads would drop the same weights.

    Args:
        q: [..., S, ..., heads/t * head_dim].
        k, v: like ``q``, or with fewer heads, each shared by as many consecutive heads of ``q`` (grouped queries).
        head_dim: features of one head; even with ``rope_theta``.
        p: dropout probability of the attention weights.
        rope_theta: rotate q and k by position first, with this base (10000 in Llama); None does not.
        group: the ranks that the heads are split over: rank r holds the r-th part of them.
        seed: as in :func:`seqpar_kernels.dropout_add_layer_norm`.

    Returns:
        Tensor: like ``q``.

    ``head_dim`` and ``rope_theta`` are also taken under their old names, ``head_size`` and ``rotary_base``.

    Raises:
        ValueError: an argument that does not fit, by name.
    """
    pg = resolve_group(group)
    with checked_together(pg, step=False):
        for name, t in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, t)
            check_same_device(name, t, "q", q)
        if not isinstance(head_dim, int) or isinstance(head_dim, bool) or head_dim < 1:
            raise ValueError(f"head_dim: expected a positive int, got {head_dim!r}")
        check_probability("p", p)
        seq_dim = check_sequence("q", q, seq_dim)
        for name, t, like_name, like in (("q", q, "q", q), ("k", k, "q", q), ("v", v, "k", k)):
            if t.shape[:-1] != q.shape[:-1] or t.dtype != q.dtype:
                raise ValueError(
                    f"{name}: expected {q.dtype} {(*q.shape[:-1], '...')} like q, got {t.dtype} {tuple(t.shape)}"
                )
            if t.shape[-1] % head_dim or t.shape[-1] == 0 or like.shape[-1] % t.shape[-1]:
                raise ValueError(
                    f"{name}: expected whole heads of {head_dim} features that divide those of {like_name}, "
                    f"{like.shape[-1]}, got {t.shape[-1]}"
                )
        if v.shape != k.shape:
            raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"head_dim: expected an even number with rope_theta, got {head_dim}")
        seed_tensor = as_seed(seed, q.device) if training and p > 0.0 else None
    length = q.shape[seq_dim]
    outer, inner = math.prod(q.shape[:seq_dim]), math.prod(q.shape[seq_dim + 1 : -1])
    q5, k5, v5 = (  # [outer, S, inner, heads/t, d]
        t.reshape(outer, length, inner, t.shape[-1] // head_dim, head_dim) for t in (q, k, v)
    )
    if rope_theta is not None:
        q5, k5 = (ops.rotary(t, 1, float(rope_theta), False) for t in (q5, k5))
    if seed_tensor is None:
        # The inner batch counts as heads, so that the result has the input's memory layout.
        qs, ks, vs = (t.flatten(2, 3).transpose(1, 2) for t in (q5, k5, v5))  # [outer, inner * heads/t, S, d]
        grouped = k.shape[-1] != q.shape[-1]
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(q.shape)
    heads = q5.shape[3]
    batched = (t.permute(0, 2, 3, 1, 4).flatten(0, 1) for t in (q5, k5, v5))  # [outer * inner, heads/t, S, d]
    place = (heads * group_size(pg), heads * group_rank(pg))
    out = ops.dropout_attention(*batched, seed_tensor, float(p), head_dim**-0.5, True, *place)
    return out.view(outer, inner, heads, length, head_dim).permute(0, 3, 1, 2, 4).reshape(q.shape)
