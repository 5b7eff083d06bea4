"""The public functions: all validation, then one op call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import ops
from .checks import (
    check_chunks,
    check_eps,
    check_float,
    check_probability,
    check_same_device,
    check_same_shape,
    check_sequence,
    check_vector,
    check_weight,
)
from .kernels import BACKENDS, NormKind
from .layout import Group, SequenceShard, group_rank, group_size, normalize_dim, resolve_group, row_map, shard_of
from .ops.library import group_name
from .overlap.agreement import checked_together
from .overlap.planner import Plan, check_engine, plan
from .random import as_seed, check_seeds_alike, debug_enabled

# --- dropout + add + norm --------------------------------------------------------------------------------------------


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    p: float = 0.0,
    eps: float = 1e-5,
    training: bool = True,
    prenorm: bool = False,
    x_bias: Tensor | None = None,
    zero_centered_weight: bool = False,
    residual_dtype: torch.dtype | None = None,
    group: Group = None,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    seq_len: int | None = None,
    row_scale: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Any:
    """``z = dropout(x + x_bias) + residual; y = layer_norm(z) * weight + bias``, in one pass.

    Args:
        x: [..., S/t, ..., H], float32, bfloat16, float16 or float64; this rank's shard where ``group`` has t ranks.
        residual: like ``x``, in ``x``'s dtype or ``residual_dtype``; None adds nothing.
        weight, bias: [H]; None for none. With ``group``, their gradients are summed over its ranks.
        p: dropout probability. The mask is a function of (seed, global row, column) alone, so it does not change with
            the number of ranks, the device or the backend (README, "Numerics").
        eps: added to the variance.
        training: dropout only where True.
        prenorm: return ``(y, z)``, z being the residual of the next block.
        x_bias: [H], the bias of the linear layer that made ``x``, added first.
        zero_centered_weight: scale by ``1 + weight``.
        residual_dtype: dtype of z: ``x``'s or float32. Default: residual's, or ``x``'s without a residual.
        group: ProcessGroup, 1-D DeviceMesh or None over which the sequence is sharded.
        seq_dim: the sequence dimension of ``x``.
        seed: an int or a 0-d int64 tensor; default: drawn from the default generator of ``x.device``.
        backend: force "native", "cpu", "cuda", "triton" or "reference".
        seq_len: unsharded length; needed only where it is not a multiple of the number of ranks.
        row_scale: float32 of ``x.shape[:-1]``; multiplies the dropout's result row by row (stochastic depth).
        weight2, bias2: [H]; a second norm of the same z (parallel attention and MLP blocks), returned after ``y``.

    Returns:
        ``y``, or ``(y, z)`` with ``prenorm``; with a second norm ``(y, y2)`` or ``(y, y2, z)``. y has the dtype of
        ``x``, z has ``residual_dtype``.

    Raises:
        ValueError: an argument that does not fit, by name.
        RuntimeError: the forced backend cannot run here, with the reason.
    """
    return _dropout_add_norm(
        NormKind.LAYER,
        x,
        residual,
        weight,
        bias,
        p,
        eps,
        training,
        prenorm,
        x_bias,
        zero_centered_weight,
        residual_dtype,
        group,
        seq_dim,
        seed,
        backend,
        seq_len,
        row_scale,
        weight2,
        bias2,
    )


def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    p: float = 0.0,
    eps: float = 1e-5,
    training: bool = True,
    prenorm: bool = False,
    x_bias: Tensor | None = None,
    zero_centered_weight: bool = False,
    residual_dtype: torch.dtype | None = None,
    group: Group = None,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    seq_len: int | None = None,
    row_scale: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Any:
    """``z = dropout(x + x_bias) + residual; y = rms_norm(z) * weight``: see :func:`dropout_add_layer_norm`.

    RMSNorm (Zhang and Sennrich 2019) subtracts no mean and has no bias.
    """
    return _dropout_add_norm(
        NormKind.RMS,
        x,
        residual,
        weight,
        None,
        p,
        eps,
        training,
        prenorm,
        x_bias,
        zero_centered_weight,
        residual_dtype,
        group,
        seq_dim,
        seed,
        backend,
        seq_len,
        row_scale,
        weight2,
        None,
    )


def dropout_add(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
    x_bias: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    group: Group = None,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    seq_len: int | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """``dropout(x + x_bias) + residual`` with the mask of :func:`dropout_add_layer_norm`, and no norm after it."""
    out: Tensor = _dropout_add_norm(
        NormKind.NONE,
        x,
        residual,
        None,
        None,
        p,
        1.0,
        training,
        True,
        x_bias,
        False,
        residual_dtype,
        group,
        seq_dim,
        seed,
        backend,
        seq_len,
        row_scale,
        None,
        None,
    )
    return out


def _dropout_add_norm(
    kind: NormKind,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    training: bool,
    prenorm: bool,
    x_bias: Tensor | None,
    zero_centered: bool,
    residual_dtype: torch.dtype | None,
    group: Group,
    seq_dim: int,
    seed: int | Tensor | None,
    backend: str | None,
    seq_len: int | None,
    row_scale: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    *,
    sum_gradients: bool = True,
) -> Any:
    pg = resolve_group(group)
    with checked_together(pg):
        seq_dim = check_sequence("x", x, seq_dim)
        shard = shard_of("x", x.shape[seq_dim], pg, seq_len)
        residual_dtype = _check_norm(
            x, residual, weight, bias, p, eps, x_bias, residual_dtype, backend, row_scale, weight2, bias2
        )
        # a wrong seed is wrong in evaluation too
        seed_tensor = as_seed(seed, x.device) if seed is not None or (training and p > 0.0) else None
    if not (training and p > 0.0):
        seed_tensor = None
    elif pg is not None and debug_enabled():
        assert seed_tensor is not None
        check_seeds_alike(seed_tensor, pg)
    if residual is not None:
        residual = residual.to(residual_dtype)
    if row_scale is not None:
        row_scale = row_scale.reshape(-1)
    two_norms = weight2 is not None or bias2 is not None

    vectors = _one_dtype([weight, bias, weight2, bias2, x_bias], x.dtype)
    if pg is not None and sum_gradients:
        vectors = replicated(vectors, pg)
    weight, bias, weight2, bias2, x_bias = vectors
    w_dtype = next((v.dtype for v in vectors if v is not None), x.dtype)

    same = seed_tensor is None and residual is None and x_bias is None and row_scale is None
    same = same and residual_dtype == x.dtype
    if kind == NormKind.NONE and same:
        return x
    outs = ops.dropout_add_norm(
        x,
        residual,
        weight,
        bias,
        weight2,
        bias2,
        x_bias,
        row_scale,
        seed_tensor,
        not same,
        two_norms,
        int(kind),
        zero_centered,
        float(eps),
        float(p),
        *row_map(x.shape, seq_dim, shard),
        residual_dtype,
        w_dtype,
        backend or "",
    )
    if kind == NormKind.NONE:
        return outs[0]
    norms = tuple(outs[:2]) if two_norms else (outs[0],)
    if prenorm:
        return (*norms, x if same else outs[len(norms)])
    return norms if two_norms else norms[0]


def _check_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    x_bias: Tensor | None,
    residual_dtype: torch.dtype | None,
    backend: str | None,
    row_scale: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
) -> torch.dtype:
    """Everything that can be wrong with the arguments of a norm; returns the residual's dtype."""
    hidden = x.shape[-1]
    if hidden == 0:
        raise ValueError(f"x: expected a last size of at least 1, got shape {tuple(x.shape)}")
    check_probability("p", p)
    check_eps(eps)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {sorted(BACKENDS)} or None, got {backend!r}")
    check_vector("weight", weight, hidden, x)
    check_vector("bias", bias, hidden, x)
    check_vector("x_bias", x_bias, hidden, x)
    check_vector("weight2", weight2, hidden, x)
    check_vector("bias2", bias2, hidden, x)
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    if residual_dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64 and residual_dtype != x.dtype):
        wanted = f"{x.dtype}, the dtype of x" + ("" if x.dtype == torch.float64 else ", or torch.float32")
        raise ValueError(f"residual_dtype: expected {wanted}, got {residual_dtype}")
    if residual is not None:
        check_same_shape("residual", residual, "x", x)
        check_same_device("residual", residual, "x", x)
        if residual.dtype not in (x.dtype, residual_dtype):
            raise ValueError(f"residual: expected {x.dtype} or {residual_dtype}, got {residual.dtype}")
    if row_scale is not None:
        if row_scale.shape != x.shape[:-1] or row_scale.dtype != torch.float32 or row_scale.requires_grad:
            raise ValueError(
                f"row_scale: expected float32 {tuple(x.shape[:-1])} without gradient, "
                f"got {row_scale.dtype} {tuple(row_scale.shape)} requires_grad={row_scale.requires_grad}"
            )
        check_same_device("row_scale", row_scale, "x", x)
    return residual_dtype


def _one_dtype(vectors: list[Tensor | None], x_dtype: torch.dtype) -> list[Tensor | None]:
    """The kernels take [H] vectors in one dtype, x's or float32; anything else is cast (gradients flow back)."""
    dtypes = {v.dtype for v in vectors if v is not None}
    if len(dtypes) == 1 and dtypes <= {x_dtype, torch.float64 if x_dtype == torch.float64 else torch.float32}:
        return vectors
    target = torch.float64 if x_dtype == torch.float64 else torch.float32
    return [None if v is None else v.to(target) for v in vectors]


def replicated(params: Sequence[Tensor | None], group: ProcessGroup) -> list[Tensor | None]:
    """Parameters as they must enter a computation on a sequence shard: their gradients are summed over the ranks.

    16-bit ones come back in float32, so that the sum over ranks is rounded once.
    """
    if not torch.is_grad_enabled():
        return list(params)
    picked = [i for i, t in enumerate(params) if t is not None and t.requires_grad]
    if not picked:
        return list(params)
    out = list(params)
    wrapped = ops.SumGradients.apply(group_name(group), *(params[i] for i in picked))
    for i, tensor in zip(picked, wrapped, strict=True):
        out[i] = tensor
    # The kernels want one dtype: a frozen 16-bit vector follows its trained neighbours into float32.
    dtype = wrapped[0].dtype
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in out]


# --- matmuls with their collective -----------------------------------------------------------------------------------


@overload
def all_gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
) -> Tensor: ...


@overload
def all_gather_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
) -> tuple[Tensor, ...]: ...


def all_gather_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``linear(all_gather(x), weight, bias)``, the gather hidden behind the matmul (column-parallel linear).

    The backward gathers ``x`` again under dgrad and reduce-scatters dx under wgrad; only the local shard is kept.

    Args:
        x: [..., S/t, ..., K], this rank's shard of the sequence.
        weight: [N/t, K], or several such: one gather feeds them all and a tuple comes back.
        bias: [N/t], or a sequence with one entry (a tensor or None) for each weight.
        group: ProcessGroup or 1-D DeviceMesh of t ranks; None computes locally.
        seq_dim: the sequence dimension of ``x``.
        chunks: pieces each shard is cut into; None lets the planner choose.
        engine: "auto", "single" (one gather, one matmul) or "collective" (pipelined over torch.distributed).
        seq_len: the unsharded length S; needed only where it is not a multiple of t.

    Returns:
        [..., S, ..., N/t], or a tuple of such.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: ranks that disagree, a peer that failed.
    """
    return planned_all_gather_linear(x, weight, bias, group, seq_dim, chunks, engine, seq_len)[0]


def planned_all_gather_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    group: Group,
    seq_dim: int,
    chunks: int | None,
    engine: str,
    seq_len: int | None,
) -> tuple[Any, Plan]:
    """:func:`all_gather_linear` and the plan it ran by."""
    pg = resolve_group(group)
    with checked_together(pg):
        seq_dim = check_sequence("x", x, seq_dim)
        several = not isinstance(weight, Tensor)
        weights: list[Tensor] = list(weight) if several else [weight]  # type: ignore[list-item]
        if not weights:
            raise ValueError("weight: expected at least one weight, got an empty sequence")
        if several:
            biases = [None] * len(weights) if bias is None else list(bias)
            if isinstance(bias, Tensor) or len(biases) != len(weights):
                got = "a single tensor" if isinstance(bias, Tensor) else f"{len(biases)} entries"
                raise ValueError(f"bias: expected a sequence of {len(weights)} entries, one for each weight, got {got}")
        elif bias is None or isinstance(bias, Tensor):
            biases = [bias]
        else:
            raise ValueError("bias: expected a tensor or None beside a single weight, got a sequence")
        x, weights, biases = _autocast(x, weights, biases)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            index = f"[{i}]" if several else ""
            check_weight(f"weight{index}", w, x.shape[-1], x)
            check_vector(f"bias{index}", b, w.shape[0], x, "the out_features of its weight")
        shard = shard_of("x", x.shape[seq_dim], pg, seq_len)
        settled = _settle_plan(x, seq_dim, shard, x.shape[-1], engine, chunks)
    outs = ops.all_gather_linear(x, weights, biases, *_place(pg, seq_dim, shard, settled))
    return (tuple(outs) if several else outs[0]), settled


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
) -> Tensor:
    """``reduce_scatter(linear(x, weight)) + bias``, the scatter hidden behind the matmul (row-parallel linear).

    Partial results are summed in rank order in fp32; the bias is added once, after the sum, and its gradient is
    complete on every rank.

    Args:
        x: [..., S, ..., K/t], the whole sequence, this rank's features.
        weight: [N, K/t].
        bias: [N], the same on every rank.
        group, seq_dim, chunks, engine: as in :func:`all_gather_linear`.

    Returns:
        [..., S/t, ..., N], this rank's shard of the sequence.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: ranks that disagree, a peer that failed.
    """
    return planned_linear_reduce_scatter(x, weight, bias, group, seq_dim, chunks, engine)[0]


def planned_linear_reduce_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, seq_dim: int, chunks: int | None, engine: str
) -> tuple[Tensor, Plan]:
    """:func:`linear_reduce_scatter` and the plan it ran by."""
    pg = resolve_group(group)
    with checked_together(pg):
        seq_dim = check_sequence("x", x, seq_dim)
        x, (weight,), (bias,) = _autocast(x, [weight], [bias])
        check_weight("weight", weight, x.shape[-1], x)
        check_vector("bias", bias, weight.shape[0], x, "the out_features of weight")
        length = x.shape[seq_dim]
        shard = SequenceShard(length, group_size(pg), group_rank(pg))
        settled = _settle_plan(x, seq_dim, shard, weight.shape[0], engine, chunks)
    return ops.linear_reduce_scatter(x, weight, bias, *_place(pg, seq_dim, shard, settled)), settled


def _settle_plan(x: Tensor, seq_dim: int, shard: SequenceShard, features: int, engine: str, chunks: int | None) -> Plan:
    check_engine(engine)
    check_chunks(chunks)
    other = 1
    for i, size in enumerate(x.shape[:-1]):
        other *= 1 if i == seq_dim else size
    largest = shard.of(0).size
    return plan(
        engine,
        chunks,
        shard_bytes=largest * other * features * x.element_size(),
        ranks=shard.ranks,
        device=x.device,
    )


def _place(pg: ProcessGroup | None, seq_dim: int, shard: SequenceShard, settled: Plan) -> tuple[Any, ...]:
    return group_name(pg), seq_dim, shard.length, settled.chunks, settled.engine != "single"


def _autocast(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """What torch.nn.functional.linear does under torch.autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weights, biases
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), [w.to(dtype) for w in weights], [None if b is None else b.to(dtype) for b in biases]


# --- region mappings -------------------------------------------------------------------------------------------------


def scatter_sequence(x: Tensor, group: Group, seq_dim: int = -2) -> Tensor:
    """Each rank keeps its rows of a replicated tensor; the backward gathers.

    [..., S, ..., H] -> [..., S/t, ..., H] (Megatron: ``scatter_to_sequence_parallel_region``).
    """
    return _split(x, group, check_sequence("x", x, seq_dim))


def gather_sequence(
    x: Tensor,
    group: Group,
    seq_dim: int = -2,
    *,
    seq_len: int | None = None,
    tensor_parallel_output_grad: bool = True,
) -> Tensor:
    """All rows on every rank. [..., S/t, ..., H] -> [..., S, ..., H]

    Args:
        x: this rank's shard.
        group: ProcessGroup, 1-D DeviceMesh or None.
        seq_dim: the sequence dimension.
        seq_len: the unsharded length; needed only where it is not a multiple of the number of ranks.
        tensor_parallel_output_grad: True where what follows is tensor-parallel, so that each rank has a part of the
            gradient: the backward reduce-scatters. False where every rank goes on with the same computation and has
            the whole gradient: the backward splits. (Megatron's argument of the same name.)
    """
    dim = check_sequence("x", x, seq_dim)
    return _gather(x, group, dim, seq_len, tensor_parallel_output_grad)


def reduce_scatter_sequence(x: Tensor, group: Group, seq_dim: int = -2) -> Tensor:
    """Sum over ranks, each keeps its rows; the backward gathers. [..., S, ..., H] -> [..., S/t, ..., H]

    The sum is taken in rank order in fp32 (fp64 for fp64).
    """
    dim = check_sequence("x", x, seq_dim)
    pg = resolve_group(group)
    return x if pg is None else ops.reduce_scatter(x, dim, group_name(pg))  # type: ignore[no-any-return]


def scatter_tensor_parallel(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Each rank keeps its part of dimension ``dim`` of a replicated tensor; the backward gathers."""
    check_float("x", x)
    return _split(x, group, normalize_dim("dim", dim, x.dim()))


def gather_tensor_parallel(x: Tensor, group: Group, dim: int = -1, *, size: int | None = None) -> Tensor:
    """All parts of dimension ``dim`` on every rank; the backward splits (every rank has the whole gradient).

    ``size`` is the full size of ``dim``; needed only where it is not a multiple of the number of ranks.
    """
    check_float("x", x)
    return _gather(x, group, normalize_dim("dim", dim, x.dim()), size, False)


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Identity; the backward sums over ranks. For a replicated tensor that enters tensor-parallel computation."""
    check_float("x", x)
    pg = resolve_group(group)
    return x if pg is None else ops.CopyToRegion.apply(x, group_name(pg))  # type: ignore[no-any-return]


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks, in rank order in fp32, the same bits on every rank; the backward is the identity."""
    check_float("x", x)
    pg = resolve_group(group)
    return x if pg is None else ops.all_reduce(x, group_name(pg))  # type: ignore[no-any-return]


def _split(x: Tensor, group: Group, dim: int) -> Tensor:
    pg = resolve_group(group)
    return x if pg is None else ops.split(x, dim, group_name(pg))  # type: ignore[no-any-return]


def _gather(x: Tensor, group: Group, dim: int, size: int | None, partial_grad: bool) -> Tensor:
    pg = resolve_group(group)
    if pg is None:
        return x
    with checked_together(pg):
        shard = shard_of("x", x.shape[dim], pg, size)
    return ops.gather(x, dim, shard.length, group_name(pg), partial_grad)  # type: ignore[no-any-return]


__all__ = [
    "all_gather_linear",
    "copy_to_tensor_parallel",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "gather_sequence",
    "gather_tensor_parallel",
    "linear_reduce_scatter",
    "reduce_from_tensor_parallel",
    "reduce_scatter_sequence",
    "scatter_sequence",
    "scatter_tensor_parallel",
]
