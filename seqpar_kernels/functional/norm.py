"""Fused dropout + residual + norm, and dropout + residual alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import (
    check_eps,
    check_probability,
    check_same_device,
    check_same_shape,
    check_sequence,
    check_tensor,
    check_vector,
)
from ..kernels import BACKENDS, NormKind
from ..layout import Group, check_shard, group_rank, group_size, resolve_group, row_map
from ..ops.library import group_name
from ..overlap.agreement import agreement_of, checked_together
from ..random import as_seed, check_seeds_alike, debug_enabled


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
    return run_norm(
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
    return run_norm(
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
    out: Tensor = run_norm(
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


class Meta(NamedTuple):
    """What the checks look at: a tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Settled(NamedTuple):
    """A call whose arguments fit together."""

    scalars: tuple[Any, ...]  # of the op, from ``kind`` on
    length: int  # of the unsharded sequence
    same: bool  # z is x itself, nothing is added
    two_norms: bool
    residual_dtype: torch.dtype
    vector_dtype: torch.dtype | None  # what the [H] vectors must be cast to first; None: they are fine


def _meta(name: str, t: Tensor | None) -> Meta | None:
    if t is None:
        return None
    check_tensor(name, t)
    return Meta(t.shape, t.dtype, t.device)


def run_norm(
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
    """All three public functions. ``sum_gradients=False``: the caller sums those of the vectors over the ranks."""
    pg = resolve_group(group)
    # Symbolic shapes cannot be looked up; there nothing is called twice anyway.
    symbolic = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    settle = _settle.__wrapped__ if symbolic else _settle
    with checked_together(pg) if pg is not None else _ALONE:
        check_tensor("x", x)
        check_probability("p", p)
        drop = training and p > 0.0
        if pg is not None and sum_gradients:
            weight, bias, weight2, bias2, x_bias = replicated([weight, bias, weight2, bias2, x_bias], pg)
        settled = settle(
            kind,
            Meta(x.shape, x.dtype, x.device),
            _meta("residual", residual),
            _meta("weight", weight),
            _meta("bias", bias),
            _meta("x_bias", x_bias),
            _meta("row_scale", row_scale),
            _meta("weight2", weight2),
            _meta("bias2", bias2),
            p,
            eps,
            drop,
            zero_centered,
            residual_dtype,
            group_size(pg),
            group_rank(pg),
            seq_dim,
            seq_len,
            backend,
        )
        if row_scale is not None and row_scale.requires_grad:
            raise ValueError("row_scale: expected a tensor without gradient, got requires_grad=True")
        # a wrong seed is wrong in evaluation too
        seed_tensor = as_seed(seed, x.device) if drop or seed is not None else None
    if not drop:
        seed_tensor = None
    elif pg is not None and not torch.compiler.is_compiling():
        # Shards of different lengths would drop different rows without anybody noticing.
        agreement_of(pg).require(f"dropout over S={settled.length} at dim {seq_dim} of {x.dim()}")
        if debug_enabled():
            assert seed_tensor is not None
            check_seeds_alike(seed_tensor, pg)
    if kind == NormKind.NONE and settled.same:
        return x
    if residual is not None and residual.dtype != settled.residual_dtype:
        residual = residual.to(settled.residual_dtype)
    if row_scale is not None:
        row_scale = row_scale.reshape(-1)
    if settled.vector_dtype is not None:
        weight, bias, weight2, bias2, x_bias = (
            None if v is None else v.to(settled.vector_dtype) for v in (weight, bias, weight2, bias2, x_bias)
        )
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
        not settled.same,
        settled.two_norms,
        *settled.scalars,
    )
    if kind == NormKind.NONE:
        return outs[0]
    norms = tuple(outs[:2]) if settled.two_norms else (outs[0],)
    if prenorm:
        return (*norms, x if settled.same else outs[len(norms)])
    return norms if settled.two_norms else norms[0]


_ALONE = contextlib.nullcontext()


@functools.lru_cache(maxsize=4096)
def _settle(
    kind: NormKind,
    x: Meta,
    residual: Meta | None,
    weight: Meta | None,
    bias: Meta | None,
    x_bias: Meta | None,
    row_scale: Meta | None,
    weight2: Meta | None,
    bias2: Meta | None,
    p: float,
    eps: float,
    drop: bool,
    zero_centered: bool,
    residual_dtype: torch.dtype | None,
    ranks: int,
    rank: int,
    seq_dim: int,
    seq_len: int | None,
    backend: str | None,
) -> Settled:
    """Everything that can be wrong with a call, and what follows from its shapes; once for each kind of call."""
    seq_dim = check_sequence("x", x, seq_dim)
    shard = check_shard("x", x.shape[seq_dim], ranks, rank, seq_len)
    hidden = x.shape[-1]
    if hidden == 0:
        raise ValueError(f"x: expected a last size of at least 1, got shape {tuple(x.shape)}")
    check_eps(eps)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {sorted(BACKENDS)} or None, got {backend!r}")
    vectors = {"weight": weight, "bias": bias, "x_bias": x_bias, "weight2": weight2, "bias2": bias2}
    for name, vector in vectors.items():
        check_vector(name, vector, hidden, x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    if residual_dtype not in (x.dtype, wide):
        wanted = f"{x.dtype}, the dtype of x" + ("" if x.dtype == wide else f", or {wide}")
        raise ValueError(f"residual_dtype: expected {wanted}, got {residual_dtype}")
    if residual is not None:
        check_same_shape("residual", residual, "x", x)
        check_same_device("residual", residual, "x", x)
        if residual.dtype not in (x.dtype, residual_dtype):
            raise ValueError(f"residual: expected {x.dtype} or {residual_dtype}, got {residual.dtype}")
    if row_scale is not None:
        if row_scale.shape != x.shape[:-1] or row_scale.dtype != torch.float32:
            raise ValueError(
                f"row_scale: expected float32 {tuple(x.shape[:-1])}, got {row_scale.dtype} {tuple(row_scale.shape)}"
            )
        check_same_device("row_scale", row_scale, "x", x)
    # The kernels take [H] vectors in one dtype, x's or the wide one; anything else is cast, and gradients flow back.
    dtypes = {vector.dtype for vector in vectors.values() if vector is not None}
    fine = len(dtypes) == 0 or (len(dtypes) == 1 and dtypes <= {x.dtype, wide})
    w_dtype = next(iter(dtypes), x.dtype) if fine else wide
    same = not drop and residual is None and x_bias is None and row_scale is None and residual_dtype == x.dtype
    scalars = (
        int(kind),
        zero_centered,
        float(eps),
        float(p),
        *row_map(x.shape, seq_dim, shard),
        residual_dtype,
        w_dtype,
        backend or "",
    )
    two_norms = weight2 is not None or bias2 is not None
    return Settled(scalars, shard.length, same, two_norms, residual_dtype, None if fine else wide)


def replicated(params: Sequence[Tensor | None], group: ProcessGroup) -> list[Tensor | None]:
    """Parameters as they must enter a computation on a sequence shard: their gradients are summed over the ranks.

    16-bit ones come back in float32, so that the sum over ranks is rounded once.
    """
    if not torch.is_grad_enabled():
        return list(params)
    picked = [i for i, t in enumerate(params) if isinstance(t, Tensor) and t.requires_grad]
    if not picked:
        return list(params)
    out = list(params)
    wrapped = ops.SumGradients.apply(group_name(group), *(params[i] for i in picked))
    for i, tensor in zip(picked, wrapped, strict=True):
        out[i] = tensor
    return out
