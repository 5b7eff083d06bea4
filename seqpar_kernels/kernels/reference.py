"""The specification of every kernel, in plain torch: slow, on any device, exact in fp64.

Tensors are [..., cols] contiguous, or [rows, cols] with contiguous columns; vectors are [cols] or [rows]. The other
backends are held to these functions, and these functions to nothing but the paper and ``csrc/seqpar.h``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import NormGiven, NormGrads, NormKind, NormOutputs, NormSpec, NormStores, NormTensors, NormWants, RowMap
from .spec import ONLY_Z, accumulation_dtype, as_matrices, dropout_scale, dropout_threshold

_MASK32 = 0xFFFFFFFF


def philox_words(seed: Tensor, rows: Tensor, column_blocks: Tensor) -> list[Tensor]:
    """Philox-4x32-10 of counters (column block, row low, row high, 0) under key (seed low, seed high).

    ``rows`` and ``column_blocks`` are int64 and broadcast; returns the four 32-bit output words as int64.
    Multipliers are taken less 2**32, so that no int64 product overflows, which compilers take for undefined: the low
    half of a product stays what it is, the high one lacks the other factor.
    """
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    rows, column_blocks = torch.broadcast_tensors(rows, column_blocks)
    c0, c1, c2, c3 = column_blocks, rows & _MASK32, (rows >> 32) & _MASK32, torch.zeros_like(rows)
    for _ in range(10):
        p0, p1 = (0xD2511F53 - 2**32) * c0, (0xCD9E8D57 - 2**32) * c2
        c0, c1, c2, c3 = (
            ((p1 >> 32) + c2 & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) + c0 & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def global_rows(rows: int, row_map: RowMap, device: torch.device | str | None = None) -> Tensor:
    """Row of the unsharded tensor for each local row. int64 [rows]."""
    local = torch.arange(rows, device=device)
    block = max(row_map.block, 1)
    return local // block * row_map.stride + local % block + row_map.offset


def dropout_mask(rows: int, cols: int, p: float, seed: Tensor, row_map: RowMap) -> Tensor:
    """Which elements dropout keeps. bool [rows, cols]."""
    row = global_rows(rows, row_map, seed.device)
    words = philox_words(seed, row[:, None], torch.arange((cols + 7) // 8, device=seed.device)[None, :])
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, dim=-1).flatten(-2)[:, :cols]  # [rows, cols]
    return bits >= dropout_threshold(p)


Mask = Callable[[int, int, float, Tensor, RowMap], Tensor]


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, zero_centered: bool) -> Tensor:
    if weight is not None:
        weight = weight.to(xhat.dtype)
        xhat = xhat * (1 + weight if zero_centered else weight)
    return xhat if bias is None else xhat + bias.to(xhat.dtype)


def _stored(y: Tensor, y_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One rounding; what float8 cannot hold saturates, NaN stays NaN."""
    if y_scale is not None:
        y = y * y_scale.to(y.dtype)
    if dtype == torch.float8_e4m3fn:
        y = y.clamp(-448.0, 448.0)
    return y.to(dtype)


def _sum_of_shards(parts: Tensor) -> Tensor:
    """[count, rows, cols] summed over dim 0 in index order, in fp32 (fp64)."""
    acc = accumulation_dtype(parts.dtype)
    total = parts[0].to(acc)
    for part in parts[1:]:
        total = total + part.to(acc)
    return total


def norm_forward(
    tensors: NormTensors,
    spec: NormSpec,
    stores: NormStores = ONLY_Z,
    *,
    stacked: bool = False,
    mask: Mask = dropout_mask,
) -> NormOutputs:
    """z = row_scale * dropout(x + x_bias) + residual; y = norm(z) * weight + bias; y2 likewise with weight2, bias2.

    The norm is that of z as stored. ``seed=None`` switches dropout off. With ``stacked=True`` x is a stack
    [shards, rows, cols] of partial results and stands for their sum in index order; only z is rounded then.
    """
    tensors = as_matrices(tensors, stacked=stacked)
    x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale, seed = tensors
    acc = accumulation_dtype(x.dtype)
    z = _sum_of_shards(x if stacked else x[None])
    if x_bias is not None:
        z = z + x_bias.to(acc)
    if seed is not None:
        keep = mask(z.shape[0], z.shape[1], spec.p, seed, spec.rows)
        z = torch.where(keep, z * dropout_scale(spec.p), 0)
    if row_scale is not None:
        z = z * row_scale.to(acc)[:, None]
    if residual is not None:
        z = z + residual.to(acc)
    stored = z.to(spec.z_dtype) if stores.store_z else None
    if stored is not None:
        z = stored.to(acc)  # what the backward will read is what the forward normalises
    if spec.kind == NormKind.NONE:
        return NormOutputs(None, None, stored, None)
    if spec.kind == NormKind.LAYER:
        first = z.mean(-1)
        mean = [first + (z - first[:, None]).mean(-1)]  # that of a constant row is exact so
        centred = z - mean[0][:, None]
    else:
        mean, centred = [], z
    rstd = torch.rsqrt(centred.square().mean(-1) + spec.eps)
    xhat = centred * rstd[:, None]
    y = _stored(_affine(xhat, weight, bias, spec.zero_centered), y_scale, spec.y_dtype)
    y2 = None
    if stores.two_norms:
        y2 = _stored(_affine(xhat, weight2, bias2, spec.zero_centered), y_scale, spec.y_dtype)
    return NormOutputs(y, y2, stored, torch.stack([*mean, rstd]))


def norm_backward(tensors: NormGiven, spec: NormSpec, wants: NormWants, *, mask: Mask = dropout_mask) -> NormGrads:
    """Gradients of :func:`norm_forward`. ``dz`` is the gradient that reached the returned ``z``, if any."""
    dy, dy2, dz, z, statistics, row_scale, weight, weight2, seed = as_matrices(tensors)
    acc = accumulation_dtype(spec.x_dtype)
    grads: dict[str, Tensor | None] = {}
    total: Tensor | None = None if dz is None else dz.to(acc)
    if spec.kind != NormKind.NONE:
        assert z is not None and statistics is not None
        *mean, rstd = statistics
        centred = z.to(acc) - mean[0][:, None] if mean else z.to(acc)
        if mean:  # the stored mean is rounded, which matters where a row hardly varies
            hidden = (mean[0] * rstd).abs() > 4
            centred = centred - torch.where(hidden, centred.mean(-1), 0)[:, None]
        xhat = centred * rstd[:, None]
        dxhat = torch.zeros_like(xhat)
        for grad, scale, suffix in ((dy, weight, ""), (dy2, weight2, "2")):
            if grad is None:
                continue
            grad = grad.to(acc)
            grads["dweight" + suffix] = (grad * xhat).sum(0)
            grads["dbias" + suffix] = grad.sum(0)
            dxhat = dxhat + _affine(grad, scale, None, spec.zero_centered)
        dnorm = dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)
        if spec.kind == NormKind.LAYER:
            dnorm = dnorm - dxhat.mean(-1, keepdim=True)
        dnorm = dnorm * rstd[:, None]
        total = dnorm if total is None else total + dnorm
    assert total is not None
    dx = total
    if row_scale is not None:
        dx = dx * row_scale.to(acc)[:, None]
    if seed is not None:
        keep = mask(total.shape[0], total.shape[1], spec.p, seed, spec.rows)
        dx = torch.where(keep, dx * dropout_scale(spec.p), 0)
    grads["dx_bias"] = dx.sum(0)
    zeros = torch.zeros(total.shape[1], dtype=acc, device=total.device)

    def vector(name: str, wanted: bool) -> Tensor | None:
        grad = grads.get(name)
        return (zeros if grad is None else grad).to(spec.w_dtype) if wanted else None

    return NormGrads(
        dx.to(spec.x_dtype) if wants.dx else None,
        total.to(spec.z_dtype) if wants.dresidual else None,
        vector("dweight", wants.dweight),
        vector("dbias", wants.dbias),
        vector("dweight2", wants.dweight2),
        vector("dbias2", wants.dbias2),
        vector("dx_bias", wants.dx_bias),
    )


def reduce_shards(parts: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``parts`` [count, rows, cols] summed over dim 0 in index order in fp32 (fp64), plus ``bias``, rounded once."""
    total = _sum_of_shards(parts)
    if bias is not None:
        total = total + bias.to(total.dtype)
    total = total.to(parts.dtype)
    return total if out is None else out.copy_(total)
