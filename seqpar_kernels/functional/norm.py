"""Fused dropout + residual + norm, and dropout + residual alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from ..kernels import NormKind, NormTensors
from ..layout import Group
from .norm_call import NormOptions, run_norm

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StreamArguments(TypedDict, total=False):
    """Keyword arguments of every function here; for the overloads, which differ in others."""

    p: float
    training: bool
    x_bias: Tensor | None
    residual_dtype: torch.dtype | None
    group: Group
    seq_dim: int
    seed: int | Tensor | None
    backend: str | None
    seq_len: int | None
    row_scale: Tensor | None


class NormArguments(StreamArguments, total=False):
    """Those of the norms."""

    eps: float
    zero_centered_weight: bool
    y_scale: Tensor | None


@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    prenorm: Literal[False] = False,
    weight2: None = None,
    bias2: None = None,
    **options: Unpack[NormArguments],
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    prenorm: Literal[True],
    weight2: None = None,
    bias2: None = None,
    **options: Unpack[NormArguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    prenorm: Literal[False] = False,
    weight2: Tensor,
    bias2: Tensor | None = None,
    **options: Unpack[NormArguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    prenorm: Literal[True],
    weight2: Tensor,
    bias2: Tensor | None = None,
    **options: Unpack[NormArguments],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    prenorm: bool = False,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    **options: Unpack[NormArguments],
) -> Tensor | tuple[Tensor, ...]: ...
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
    y_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``z = dropout(x + x_bias) + residual; y = layer_norm(z) * weight + bias``, in one pass.

    Args:
        x: [..., S/t, ..., H], float32, bfloat16, float16 or float64; this rank's shard where ``group`` has t ranks.
        residual: like ``x``, in ``x``'s dtype or ``residual_dtype``; None adds nothing.
        weight, bias: [H]; None for none. With ``group``, their gradients are summed over its ranks.
        p: dropout probability. The mask is a function of (seed, global row, column) alone, so it does not change with
            the number of ranks, the device or the backend (docs/numerics.md).
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
        y_scale: float32, one element. Norms come out in float8_e4m3fn, multiplied by it and saturated to +-448, for a
            matmul in 8 bits: its other factor is ``1 / y_scale``. Such an output carries no gradient.

    Returns:
        ``y``, or ``(y, z)`` with ``prenorm``; with a second norm ``(y, y2)`` or ``(y, y2, z)``. y has the dtype of
        ``x`` (float8_e4m3fn with ``y_scale``), z has ``residual_dtype``.

    Raises:
        ValueError: an argument that does not fit, by name.
        RuntimeError: the forced backend cannot run here, with the reason.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, residual = torch.randn(2, 2, 8, 16).unbind(0)
        >>> weight, bias = torch.ones(16), torch.zeros(16)
        >>> y, z = sp.dropout_add_layer_norm(x, residual, weight, bias, p=0.1, prenorm=True)
        >>> torch.allclose(y, torch.nn.functional.layer_norm(z, (16,), weight, bias), atol=1e-5)
        True
    """
    out: Tensor | tuple[Tensor, ...] = run_norm(
        NormTensors(x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale),
        NormOptions(
            NormKind.LAYER, p, eps, training, prenorm, zero_centered_weight, residual_dtype, seq_dim, seq_len, backend
        ),
        group,
        seed,
    )
    return out


@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    prenorm: Literal[False] = False,
    weight2: None = None,
    **options: Unpack[NormArguments],
) -> Tensor: ...
@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    prenorm: Literal[True],
    weight2: None = None,
    **options: Unpack[NormArguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    prenorm: Literal[False] = False,
    weight2: Tensor,
    **options: Unpack[NormArguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    prenorm: Literal[True],
    weight2: Tensor,
    **options: Unpack[NormArguments],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    prenorm: bool = False,
    weight2: Tensor | None = None,
    **options: Unpack[NormArguments],
) -> Tensor | tuple[Tensor, ...]: ...
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
    y_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``z = dropout(x + x_bias) + residual; y = rms_norm(z) * weight``: see :func:`dropout_add_layer_norm`.

    RMSNorm (Zhang and Sennrich 2019) subtracts no mean and has no bias.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, residual = torch.randn(2, 2, 8, 16).unbind(0)
        >>> y = sp.dropout_add_rms_norm(x, residual, torch.ones(16), eps=1e-6)
        >>> torch.allclose(y, torch.nn.functional.rms_norm(x + residual, (16,), eps=1e-6), atol=1e-5)
        True
    """
    out: Tensor | tuple[Tensor, ...] = run_norm(
        NormTensors(x, residual, weight, None, weight2, None, x_bias, row_scale, y_scale),
        NormOptions(
            NormKind.RMS, p, eps, training, prenorm, zero_centered_weight, residual_dtype, seq_dim, seq_len, backend
        ),
        group,
        seed,
    )
    return out


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
    """``dropout(x + x_bias) + residual`` with the mask of :func:`dropout_add_layer_norm`, and no norm after it.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, residual = torch.ones(2, 8, 16), torch.zeros(2, 8, 16)
        >>> z = sp.dropout_add(x, residual, p=0.5, seed=1)
        >>> z.unique()
        tensor([0., 2.])
        >>> torch.equal(z, sp.dropout_add(x, residual, p=0.5, seed=1))
        True
    """
    tensors = NormTensors(x, residual, x_bias=x_bias, row_scale=row_scale)
    options = NormOptions(
        NormKind.NONE,
        p,
        training=training,
        residual_dtype=residual_dtype,
        seq_dim=seq_dim,
        seq_len=seq_len,
        backend=backend,
    )
    out: Tensor = run_norm(tensors, options, group, seed)
    return out
