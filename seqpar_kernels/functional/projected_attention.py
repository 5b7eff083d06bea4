"""Attention over a sequence that the ranks of a group share, from the hidden states of a shard to those of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..checks import check_float, check_linear_bias, check_same_device, check_tensor, check_weight
from ..comm.coordination import checked_together
from ..compiling import constant_when_traced
from ..layout import Group, resolve_group
from ..ops.projected_attention import ProjectedScalars, grouped, heads_like
from ..ops.registry import group_name
from ..ops.sequence_attention import Scalars
from ..overlap.attention_choice import Choice
from ..overlap.head_groups import HeadGroups
from ..overlap.projected_attention import rotated
from ..random import as_seed, check_seeds_alike, debug_enabled
from .sequence_attention import (
    attention_lengths,
    check_attention_bias,
    check_attention_options,
    check_cu_seqlens,
    mask_bounds,
    sequence_parallel_attention,
)


def sequence_parallel_self_attention(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    *,
    group: Group,
    num_heads: int,
    num_kv_heads: int | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    is_causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attn_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_len: int | None = None,
    layout: str = "contiguous",
    engine: str = "auto",
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    save_kv: bool | None = None,
    head_groups: int | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The projections of q, k and v, :func:`sequence_parallel_attention` and the output projection, in one call.

    Where all ranks exchange heads (``engine="ulysses"``, or ``"auto"`` if it chooses that), heads go in groups. While
    a group travels the next one is projected, and the one before it is attended with; while a result travels back, the
    output projection is applied to the one before. The backward does the same. The attention has the bits of
    :func:`sequence_parallel_attention`, however many groups there are. Sums over heads (the output projection, the
    gradient of x) are fp32 and in the order of heads, block by block; of 16-bit tensors on a CPU they are one matmul.
    Neither order depends on the numbers of groups or ranks. With a ring, a hybrid or an ``attn_bias`` the projections
    are plain matmuls before and after :func:`sequence_parallel_attention`.

    All ranks of the group must make the call, and run its backward.

    Args:
        x: [B, S/t, E], this rank's rows of the sequence in ``layout``.
        q_weight: [Hq D, E].
        k_weight: [Hkv D, E].
        v_weight: [Hkv Dv, E].
        out_weight: [E', Hq Dv].
        group: as in :func:`sequence_parallel_attention`, as all arguments that are not described here.
        num_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq; None: as many as Hq.
        q_bias, k_bias, v_bias, out_bias: of the projections.
        rotary: (cos, sin), each [B or 1, S/t, R] or [S/t, R] for this rank's rows: rotates the first R features of each
            head of q and k, R even, halves paired as in Llama. Both without gradients.
        head_groups: the number of groups of heads; None: by size and :func:`set_max_workspace_bytes`. Bits do not
            depend on it.

    Returns:
        Tensor: [B, S/t, E']. Gradients of weights, biases and sinks are this rank's part: sum them over the ranks.

    Raises:
        ValueError: an argument that does not fit, by name, on every rank, before anything is sent.
        RuntimeError: ranks that call with different sizes, or no kernel for the device.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, wq, wo = torch.randn(1, 8, 32), torch.randn(64, 32), torch.randn(32, 64)
        >>> wk, wv = torch.randn(2, 32, 32)
        >>> sp.sequence_parallel_self_attention(x, wq, wk, wv, wo, group=None, num_heads=4, num_kv_heads=2).shape
        torch.Size([1, 8, 32])
    """
    pg = resolve_group(group)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    with checked_together(pg):
        tensors = (x, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias)
        x, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias = _as_autocast(*tensors)
        biases = (q_bias, k_bias, v_bias, out_bias)
        own = _check_projections(
            x, (q_weight, k_weight, v_weight, out_weight), biases, num_heads, num_kv_heads, head_groups
        )
        check_sinks(sinks, num_heads, x)
        tables = _check_rotary(rotary, x, own.head_dim)
        like = heads_like(x, own)
        q_len, _ = attention_lengths(like, like, pg, seq_len, None)
        bounds = mask_bounds(window_size, is_causal, 0)
        check_attention_bias(attn_bias, like, q_len)
        asked = (ulysses_degree, ring_degree)
        check_attention_options(layout, engine, dropout_p, scale, softcap, None, save_kv, *asked)
        check_cu_seqlens(cu_seqlens, q_len, q_len, x)
        scale = own.head_dim**-0.5 if scale is None else float(scale)
        options = (float(softcap), *bounds, float(dropout_p), layout, engine, *asked, save_kv)
        scalars = Scalars(q_len, q_len, scale, *options, None, False, False, group_name(pg))
        in_groups = attn_bias is None and _goes_in_groups(tuple(own), tuple(x.shape), x.dtype, x.device, tuple(scalars))
        if head_groups is not None and not in_groups:
            raise ValueError(
                "head_groups: expected None where the ranks do not all exchange heads (engine='ulysses' without "
                f"attn_bias does), got {head_groups}"
            )
        if in_groups:
            seed_tensor = as_seed(seed, x.device) if dropout_p > 0 else None
    if not in_groups:
        return _one_after_the_other(
            x, (q_weight, k_weight, v_weight, out_weight), biases, own, tables,
            group=group, is_causal=is_causal, window_size=window_size, dropout_p=dropout_p, scale=scale,
            softcap=softcap, sinks=sinks, attn_bias=attn_bias, cu_seqlens=cu_seqlens, seq_len=seq_len, layout=layout,
            engine=engine, ulysses_degree=ulysses_degree, ring_degree=ring_degree, save_kv=save_kv, seed=seed,
        )  # fmt: skip
    if seed_tensor is not None and pg is not None and not torch.compiler.is_compiling() and debug_enabled():
        check_seeds_alike(seed_tensor, pg)
    weights = (q_weight, k_weight, v_weight, out_weight, *biases)
    y: Tensor = ops.projected_attention(x, *weights, *tables, sinks, cu_seqlens, seed_tensor, *own, *scalars)[0]
    return y


def self_attention_choice(
    x: Tensor,
    *,
    group: Group,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    is_causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    seq_len: int | None = None,
    layout: str = "contiguous",
    engine: str = "auto",
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    save_kv: bool | None = None,
    head_groups: int | None = None,
    has_attn_bias: bool = False,
) -> tuple[Choice, HeadGroups | None]:
    """How :func:`sequence_parallel_self_attention` runs with these arguments; None where heads do not go in groups."""
    pg = resolve_group(group)
    own = ProjectedScalars(num_heads, num_kv_heads, head_dim, value_dim, head_groups)
    like = heads_like(x, own)
    length, _ = attention_lengths(like, like, pg, seq_len, None)
    left, right = mask_bounds(window_size, is_causal, 0)
    asked: Any = (layout, engine, ulysses_degree, ring_degree, save_kv, None, False, False, group_name(pg))
    scalars = Scalars(length, length, 1.0, 0.0, left, right, 0.0, *asked)
    choice = scalars.choice(scalars.problem(like, num_kv_heads, value_dim, num_heads, None, None))
    return choice, None if has_attn_bias or choice.sizes.ring > 1 else grouped(x, own, scalars)


@constant_when_traced
def _goes_in_groups(
    own: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scalars: tuple[Any, ...]
) -> bool:
    """Whether all ranks exchange heads; raises here what the op would."""
    x, projected, s = (
        torch.empty(1, dtype=dtype, device=device).expand(shape),
        ProjectedScalars(*own),
        Scalars(*scalars),
    )
    like = heads_like(x, projected)
    choice = s.choice(s.problem(like, projected.kv_heads, projected.value_dim, projected.q_heads, None, None))
    if choice.sizes.ring > 1:
        return False
    grouped(x, projected, s)
    return True


def _as_autocast(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The tensors cast as F.linear casts them under torch.autocast."""
    if not isinstance(x, Tensor) or not torch.is_autocast_enabled(x.device.type):
        return (x, *rest)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *rest)
    )


def _check_projections(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, ...],
    q_heads: int,
    kv_heads: int,
    head_groups: int | None,
) -> ProjectedScalars:
    check_tensor("x", x)
    check_float("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, S/t, E], got {tuple(x.shape)}")
    for name, heads in (("num_heads", q_heads), ("num_kv_heads", kv_heads)):
        if type(heads) is not int or heads < 1 or q_heads % heads:
            raise ValueError(f"{name}: expected a positive int that divides num_heads={q_heads}, got {heads!r}")
    if head_groups is not None and (type(head_groups) is not int or head_groups < 1):
        raise ValueError(f"head_groups: expected a positive int or None, got {head_groups!r}")
    names = ("q_weight", "k_weight", "v_weight")
    for name, weight, heads in zip(names, weights, (q_heads, kv_heads, kv_heads), strict=False):
        check_weight(name, weight, x.shape[2], x)
        if weight.shape[0] == 0 or weight.shape[0] % heads:
            raise ValueError(f"{name}: expected features of {heads} heads, got {tuple(weight.shape)}")
    q, k, v, out = weights
    head_dim, value_dim = q.shape[0] // q_heads, v.shape[0] // kv_heads
    if k.shape[0] != kv_heads * head_dim:
        raise ValueError(f"k_weight: expected {kv_heads} heads of {head_dim} features like q, got {tuple(k.shape)}")
    check_weight("out_weight", out, q_heads * value_dim, x)
    for name, bias, weight in zip(("q_bias", "k_bias", "v_bias", "out_bias"), biases, weights, strict=True):
        check_linear_bias(name, bias, weight)
    return ProjectedScalars(q_heads, kv_heads, head_dim, value_dim, head_groups)


def check_sinks(sinks: Tensor | None, heads: int, x: Tensor) -> None:
    if sinks is None:
        return
    check_tensor("sinks", sinks)
    check_float("sinks", sinks)
    check_same_device("sinks", sinks, "x", x)
    if sinks.shape != (heads,):
        raise ValueError(f"sinks: expected ({heads},), one for each query head, got {tuple(sinks.shape)}")


def _check_rotary(
    rotary: tuple[Tensor, Tensor] | None, x: Tensor, head_dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, [B or 1, S/t, R]."""
    if rotary is None:
        return None, None
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        raise ValueError(f"rotary: expected (cos, sin) or None, got {type(rotary).__name__}")
    found = []
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        check_tensor(f"rotary {name}", table)
        check_same_device(f"rotary {name}", table, "x", x)
        full = table if table.dim() == 3 else table[None]
        size = full.shape[-1]
        if full.dim() != 3 or full.shape[0] not in (1, x.shape[0]) or full.shape[1] != x.shape[1]:
            raise ValueError(f"rotary {name}: expected rows for {tuple(x.shape[:2])}, got {tuple(table.shape)}")
        if size % 2 or not 0 < size <= head_dim:
            raise ValueError(f"rotary {name}: expected an even number of up to {head_dim} features, got {size}")
        found.append(full.detach())
    if found[0].shape != found[1].shape:
        raise ValueError(
            f"rotary: expected tables of one shape, got {tuple(rotary[0].shape)}, {tuple(rotary[1].shape)}"
        )
    return found[0], found[1]


def _one_after_the_other(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    own: ProjectedScalars,
    tables: tuple[Tensor | None, Tensor | None],
    **options: object,
) -> Tensor:
    sizes = ((own.q_heads, own.head_dim), (own.kv_heads, own.head_dim), (own.kv_heads, own.value_dim))
    q, k, v = (
        F.linear(x, weight, bias).view(*x.shape[:2], *size)
        for weight, bias, size in zip(weights, biases, sizes, strict=False)
    )
    q, k = rotated(q, *tables), rotated(k, *tables)
    out = sequence_parallel_attention(q, k, v, **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return F.linear(out.flatten(2), weights[3], biases[3])
