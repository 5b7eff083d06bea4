"""A row-parallel linear, the reduce-scatter of its result, and what stands before the next block, in one pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..checks import (
    check_main_grad,
    check_probability,
    check_same_device,
    check_sequence,
    check_tensor,
    check_vector,
    check_weight,
)
from ..comm.coordination import checked_together
from ..kernels import NormKind
from ..layout import Group, SequenceShard, group_rank, group_size, resolve_group
from ..overlap.engines import settle_plan
from ..overlap.planner import Plan
from ..overlap.tuning import figures_of
from ..random import as_seed, debug_enabled
from .linear import autocast, check_activation, place
from .norm import Meta, NormOptions, compare_seeds, metas_of, replicated, settle

Norm = Literal["layer", "rms"] | None
KINDS = {"layer": NormKind.LAYER, "rms": NormKind.RMS, None: NormKind.NONE}


def linear_reduce_scatter_dropout_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: Norm = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
    training: bool = True,
    zero_centered_weight: bool = False,
    residual_dtype: torch.dtype | None = None,
    group: Group,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
    chunks: int | None = None,
    engine: str = "auto",
    row_scale: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``z = dropout(reduce_scatter(linear(x, weight)) + bias) + residual; y = norm(z)``, the sum never written.

    The scatter hides behind the matmul as in :func:`linear_reduce_scatter`; the kernel that sums what arrived, in rank
    order in fp32, goes on with the arithmetic of :func:`dropout_add_layer_norm` on the sum unrounded. The backward is
    that of the norm, then that of the row-parallel linear (Korthikanti et al. 2022, section 4.2.2).

    Args:
        x: [..., S, ..., K/t], the whole sequence, this rank's features.
        weight: [N, K/t].
        bias: [N], the same on every rank, added once.
        residual: [..., S/t, ..., N], this rank's shard, in ``x``'s dtype or ``residual_dtype``; None adds nothing.
        norm: "layer", "rms", or None for the residual stream alone.
        norm_weight, norm_bias: [N]; None for none. RMSNorm has no bias. The gradients of these and of ``bias`` are
            summed over the ranks.
        p, eps, training, zero_centered_weight, residual_dtype, seed: as in :func:`dropout_add_layer_norm`.
        group, seq_dim, chunks, engine, activation, gate, main_grad: as in :func:`linear_reduce_scatter`.
        row_scale: float32 [..., S/t, ...]; multiplies the dropout's result row by row (stochastic depth).

    Returns:
        ``(y, z)``, both [..., S/t, ..., N]: y in the dtype of ``x``, None without a norm; z in ``residual_dtype``.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: ranks that disagree, a peer that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, weight, residual = torch.randn(2, 8, 32), torch.randn(16, 32), torch.randn(2, 8, 16)
        >>> y, z = sp.linear_reduce_scatter_dropout_add_norm(
        ...     x, weight, residual=residual, norm="rms", norm_weight=torch.ones(16), group=None
        ... )
        >>> torch.allclose(z, x @ weight.t() + residual, atol=1e-4)
        True
    """
    return planned_linear_reduce_scatter_dropout_add_norm(
        x,
        weight,
        bias,
        residual,
        norm,
        norm_weight,
        norm_bias,
        p,
        eps,
        training,
        zero_centered_weight,
        residual_dtype,
        group,
        seq_dim,
        seed,
        chunks,
        engine,
        row_scale,
        activation,
        gate,
        main_grad,
    )[0]


def planned_linear_reduce_scatter_dropout_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    p: float,
    eps: float,
    training: bool,
    zero_centered: bool,
    residual_dtype: torch.dtype | None,
    group: Group,
    seq_dim: int,
    seed: int | Tensor | None,
    chunks: int | None,
    engine: str,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    main_grad: Tensor | None = None,
    *,
    sum_gradients: bool = True,
) -> tuple[tuple[Tensor | None, Tensor], Plan]:
    """:func:`linear_reduce_scatter_dropout_add_norm` and the plan it ran by.

    ``sum_gradients=False``: the caller sums those of ``bias``, ``norm_weight`` and ``norm_bias`` over the ranks.
    """
    pg = resolve_group(group)
    figures = None if pg is None else figures_of(pg)
    with checked_together(pg):
        check_tensor("x", x)
        seq_dim = check_sequence("x", x, seq_dim)
        check_activation(x, activation, gate)
        x, (weight,), (gate,) = autocast(x, [weight], [gate])
        check_weight("weight", weight, x.shape[-1], x)
        check_main_grad("main_grad", main_grad, weight)
        check_probability("p", p)
        kind = _check_norm(norm, norm_weight, norm_bias)
        shard = SequenceShard(x.shape[seq_dim], group_size(pg), group_rank(pg))
        shape = list(x.shape)
        shape[seq_dim], shape[-1] = shard.size, weight.shape[0]
        out = Meta(torch.Size(shape), x.dtype, x.device, type(x))
        _check_shard("residual", residual, out.shape, out)
        _check_shard("row_scale", row_scale, out.shape[:-1], out)
        if row_scale is not None and row_scale.requires_grad:
            raise ValueError("row_scale: expected a tensor without gradient, got requires_grad=True")
        vectors = [bias, norm_weight, norm_bias]
        for name, vector in zip(("bias", "norm_weight", "norm_bias"), vectors, strict=True):
            if vector is not None:
                check_tensor(name, vector)
                check_vector(name, vector, weight.shape[0], x, "the out_features of weight")
        if pg is not None and sum_gradients:
            vectors = replicated(vectors, pg)
        bias, norm_weight, norm_bias = vectors
        options = NormOptions(kind, p, eps, training, True, zero_centered, residual_dtype, seq_dim, shard.length)
        rest = (residual, norm_weight, norm_bias, None, None, bias, row_scale, None)  # as NormTensors has them
        settled = settle(options, shard.ranks, shard.rank, tuple(out), *metas_of(rest))
        plan = settle_plan(x, seq_dim, shard, weight.shape[0], weight.numel(), engine, chunks, figures, pg)
        # a wrong seed is wrong in evaluation too
        seed_tensor = as_seed(seed, x.device) if settled.drop or seed is not None else None
    if not settled.drop:
        seed_tensor = None
    elif pg is not None and debug_enabled() and not torch.compiler.is_compiling():
        assert seed_tensor is not None
        compare_seeds(seed_tensor, pg, "linear_reduce_scatter_dropout_add_norm")
    if residual is not None:
        residual = residual.to(settled.scalars.z_dtype)
    if settled.vector_dtype is not None:
        bias, norm_weight, norm_bias = (
            None if v is None else v.to(settled.vector_dtype) for v in (bias, norm_weight, norm_bias)
        )
    args = (
        x,
        weight,
        bias,
        residual,
        norm_weight,
        norm_bias,
        None if row_scale is None else row_scale.reshape(-1),
        seed_tensor,
        gate,
        *place(pg, seq_dim, shard, plan),
        activation or "",
        *settled.scalars[2:],
    )
    if main_grad is not None and torch.is_grad_enabled():
        outs = ops.linear_reduce_scatter_dropout_add_norm_into(main_grad, *args)
    else:
        outs = ops.linear_reduce_scatter_dropout_add_norm(*args)
    return ((None, outs[0]) if kind == NormKind.NONE else (outs[0], outs[1])), plan


def _check_norm(norm: Norm, norm_weight: Tensor | None, norm_bias: Tensor | None) -> NormKind:
    if norm not in KINDS:
        raise ValueError(f"norm: expected 'layer', 'rms' or None, got {norm!r}")
    kind = KINDS[norm]
    if kind != NormKind.LAYER and norm_bias is not None:
        raise ValueError(f"norm_bias: expected None with norm={norm!r}, got a tensor")
    if kind == NormKind.NONE and norm_weight is not None:
        raise ValueError("norm_weight: expected None with norm=None, got a tensor")
    return kind


def _check_shard(name: str, t: Tensor | None, shape: torch.Size, out: Meta) -> None:
    """Something that goes with the output, this rank's shard."""
    if t is None:
        return
    check_tensor(name, t)
    if t.shape != shape:
        raise ValueError(f"{name}: expected {tuple(shape)}, this rank's shard of the output, got {tuple(t.shape)}")
    check_same_device(name, t, "x", out)
