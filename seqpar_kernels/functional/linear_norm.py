"""A row-parallel linear, the reduce-scatter of its result, and what stands before the next block, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, overload

import torch
from torch import Tensor

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
from ..kernels import NormKind, NormTensors
from ..layout import Group, SequenceShard, group_rank, group_size, resolve_group
from ..overlap.engines import settle_plan
from ..overlap.tuning import profile_of
from ..random import as_seed, debug_enabled
from .linear import autocast, check_activation, place
from .linear_calls import LinearNorm
from .norm_call import Meta, NormOptions, compare_seeds, converted, metas_of, replicated, settle

if TYPE_CHECKING:
    from typing_extensions import Unpack

Norm = Literal["layer", "rms"] | None
KINDS: dict[Norm, NormKind] = {"layer": NormKind.LAYER, "rms": NormKind.RMS, None: NormKind.NONE}


class _Arguments(TypedDict, total=False):
    """Keyword arguments that say nothing of what is returned; for the overloads."""

    residual: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    p: float
    eps: float
    training: bool
    zero_centered_weight: bool
    residual_dtype: torch.dtype | None
    seq_dim: int
    seed: int | Tensor | None
    chunks: int | None
    engine: str
    row_scale: Tensor | None
    activation: str | None
    gate: Tensor | None
    main_grad: Tensor | None


@overload
def linear_reduce_scatter_dropout_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Literal["layer", "rms"] = "layer",
    group: Group,
    **options: Unpack[_Arguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_reduce_scatter_dropout_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: None,
    group: Group,
    **options: Unpack[_Arguments],
) -> tuple[None, Tensor]: ...
@overload
def linear_reduce_scatter_dropout_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm = "layer",
    group: Group,
    **options: Unpack[_Arguments],
) -> tuple[Tensor | None, Tensor]: ...
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
    tensors = NormTensors(x, residual, norm_weight, norm_bias, x_bias=bias, row_scale=row_scale)
    kind = cast(NormKind, KINDS.get(norm, norm))  # an unknown name goes on, to be refused on every rank alike
    options = NormOptions(kind, p, eps, training, True, zero_centered_weight, residual_dtype, seq_dim)
    call, operands = checked_linear_norm(
        tensors, weight, options, group, seed, chunks, engine, activation, gate, main_grad
    )
    return call(*operands)


def checked_linear_norm(
    tensors: NormTensors,
    weight: Tensor,
    options: NormOptions,
    group: Group,
    seed: int | Tensor | None,
    chunks: int | None,
    engine: str,
    activation: str | None = None,
    gate: Tensor | None = None,
    main_grad: Tensor | None = None,
    *,
    sum_gradients: bool = True,
    remake: int = 0,
) -> tuple[LinearNorm, tuple[Any, ...]]:
    """The call that :func:`linear_reduce_scatter_dropout_add_norm` makes, which knows its plan, and its operands.

    ``tensors``: what the norm reads, x being the input of the linear, of which the sum is made.
    ``sum_gradients=False``: the caller sums the gradients of the vectors over the ranks. ``remake``: as in
    :func:`.linear.checked_all_gather_linear`.
    """
    x, residual, norm_weight, norm_bias, _, _, bias, row_scale, _, _ = tensors
    pg = resolve_group(group)
    profiles = None if pg is None else profile_of(pg)
    with checked_together(pg):
        check_tensor("x", x)
        seq_dim = check_sequence("x", x, options.seq_dim)
        check_activation(x, activation, gate)
        x, (weight,), (gate,) = autocast(x, [weight], [gate])
        check_weight("weight", weight, x.shape[-1], x)
        check_main_grad("main_grad", main_grad, weight)
        check_probability("p", options.p)
        _check_norm(options.kind, norm_weight, norm_bias)
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
        tensors = NormTensors(x, residual, norm_weight, norm_bias, x_bias=bias, row_scale=row_scale)
        options = options._replace(prenorm=True, seq_dim=seq_dim, seq_len=shard.length)
        settled = settle(options, shard.ranks, shard.rank, tuple(out), *metas_of(tensors[1:]))
        plan = settle_plan(x, seq_dim, shard, weight.shape[0], weight.numel(), engine, chunks, profiles, pg)
        # a wrong seed is wrong in evaluation too
        seed_tensor = as_seed(seed, x.device) if settled.drop or seed is not None else None
    if not settled.drop:
        seed_tensor = None
    elif pg is not None and debug_enabled() and not torch.compiler.is_compiling():
        assert seed_tensor is not None
        compare_seeds(seed_tensor, pg, "linear_reduce_scatter_dropout_add_norm")
    call = LinearNorm(plan, place(pg, seq_dim, shard, plan), activation, settled.call, remake)
    return call, (converted(tensors, settled)._replace(seed=seed_tensor), weight, gate, main_grad)


def _check_norm(kind: NormKind, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    if not isinstance(kind, NormKind):
        raise ValueError(f"norm: expected 'layer', 'rms' or None, got {kind!r}")
    norm = next(name for name in KINDS if KINDS[name] == kind)
    if kind != NormKind.LAYER and norm_bias is not None:
        raise ValueError(f"norm_bias: expected None with norm={norm!r}, got a tensor")
    if kind == NormKind.NONE and norm_weight is not None:
        raise ValueError("norm_weight: expected None with norm=None, got a tensor")


def _check_shard(name: str, t: Tensor | None, shape: torch.Size, out: Meta) -> None:
    """Something that goes with the output, this rank's shard."""
    if t is None:
        return
    check_tensor(name, t)
    if t.shape != shape:
        raise ValueError(f"{name}: expected {tuple(shape)}, this rank's shard of the output, got {tuple(t.shape)}")
    check_same_device(name, t, "x", out)
