"""``seqpar::rotary`` and ``seqpar::dropout_attention``: rotary embedding, and attention with dropout on some heads.

Both take the whole sequence with this rank's heads, and save only their inputs: the backward computes rotation tables,
scores and dropout masks again. h heads are on this rank; k and v may have fewer, h_kv.

| op | result | shape | communication |
|---|---|---|---|
| rotary | out | [..., S, ..., d] | none |
| | dx | [..., S, ..., d], the inverse rotation of dy | none |
| dropout_attention | out | [B, h, S, d] | none |
| | dq; dk, dv | [B, h, S, d]; [B, h_kv, S, d] | none |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels import NormKind, NormSpec, NormTensors, RowMap, select
from ..kernels.spec import accumulation_dtype
from .registry import register, without_autocast

# --- rotary ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _rotation(length: int, size: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base ** (-2 i / size). [S, size / 2] each"""
    exponent = torch.arange(0, size, 2, device=device, dtype=torch.float64) / size
    angles = torch.arange(length, device=device, dtype=torch.float64)[:, None] * base**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


@without_autocast
def _rotary_kernel(x: Tensor, seq_dim: int, base: float, inverse: bool) -> Tensor:
    size = x.shape[-1]
    cos, sin = _rotation(x.shape[seq_dim], size, base, x.device, accumulation_dtype(x.dtype))
    shape = [1] * x.dim()
    shape[seq_dim], shape[-1] = x.shape[seq_dim], size // 2
    cos, sin = cos.view(shape), sin.view(shape)
    if inverse:
        sin = -sin
    first, second = x[..., : size // 2], x[..., size // 2 :]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., : size // 2] = first * cos - second * sin
    out[..., size // 2 :] = second * cos + first * sin
    return out


def _rotary_fake(x: Tensor, seq_dim: int, base: float, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


class _Rotary(torch.autograd.Function):
    """A rotation: its transpose is its inverse, so that the backward saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seq_dim: int, base: float, inverse: bool) -> Tensor:
        ctx.place = (seq_dim, base, not inverse)
        return rotary.below_autograd(x, seq_dim, base, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return rotary(dy, *ctx.place), None, None, None


# --- dropout_attention -----------------------------------------------------------------------------------------------

_BLOCK_ELEMENTS = 1 << 23  # the most scores at one time, of all heads of one batch entry


class _Block:
    """Query rows ``start..stop`` of all heads of one batch entry, against the keys they may see."""

    def __init__(
        self, q: Tensor, k: Tensor, seed: Tensor, p: float, scale: float, causal: bool, first_row: int, rows: slice
    ):
        length, dtype = k.shape[1], q.dtype
        self.keys = slice(0, rows.stop if causal else length)
        self._seed = seed
        row_map = RowMap(rows.stop - rows.start, length, first_row + rows.start)
        self._spec = NormSpec(NormKind.NONE, False, 1.0, p, row_map, dtype, dtype, dtype, dtype)
        scores = torch.matmul(q[:, rows], k[:, self.keys].transpose(1, 2)).mul_(scale)  # [heads, rows, keys]
        if causal:
            ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(1 + rows.start)
            scores.masked_fill_(ahead, -math.inf)
        self.probabilities = torch.softmax(scores, -1)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of [heads, rows, keys]: by (seed, row of the unsharded attention, key)."""
        flat = x.reshape(-1, x.shape[-1])
        dropped = select(None, x.device).norm_forward(NormTensors(flat, seed=self._seed), self._spec).z
        assert dropped is not None
        return dropped.view(x.shape)


def _expanded(x: Tensor, heads: int) -> Tensor:
    """[kv_heads, S, d] -> [heads, S, d]: consecutive query heads share a key head."""
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)


def _summed(dx: Tensor, kv_heads: int) -> Tensor:
    """The adjoint of :func:`_expanded`."""
    return dx if dx.shape[0] == kv_heads else dx.view(kv_heads, -1, *dx.shape[1:]).sum(1)


def _blocks(heads: int, length: int) -> Iterator[slice]:
    rows = max(1, min(length, _BLOCK_ELEMENTS // max(1, heads * length)))
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


@without_autocast
def _attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor,
    p: float,
    scale: float,
    causal: bool,
    heads: int,
    first_head: int,
) -> Tensor:
    wide = accumulation_dtype(q.dtype)
    length = q.shape[2]
    out = torch.empty_like(q)  # laid out like q, so that heads go back into features without a copy
    for entry in range(q.shape[0]):
        qs, ks, vs = (_expanded(t[entry].to(wide), q.shape[1]) for t in (q, k, v))  # [heads, S, d]
        for rows in _blocks(q.shape[1], length):
            block = _Block(qs, ks, seed, p, scale, causal, (entry * heads + first_head) * length, rows)
            out[entry, :, rows] = torch.matmul(block.drop(block.probabilities), vs[:, block.keys])
    return out


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor,
    p: float,
    scale: float,
    causal: bool,
    heads: int,
    first_head: int,
) -> Tensor:
    return torch.empty_like(q)


class _DropoutAttention(torch.autograd.Function):
    """Saves q, k, v and the seed; the backward computes scores and mask again, block by block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, *scalars: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, seed)
        ctx.scalars = scalars
        return dropout_attention.below_autograd(q, k, v, seed, *scalars)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, seed = ctx.saved_tensors
        grads = dropout_attention_backward(dy, q, k, v, seed, *ctx.scalars)
        return (*grads, None, *(None,) * len(ctx.scalars))


@without_autocast
def _attention_backward_kernel(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor,
    p: float,
    scale: float,
    causal: bool,
    heads: int,
    first_head: int,
) -> list[Tensor]:
    wide = accumulation_dtype(q.dtype)
    count, length = q.shape[1], q.shape[2]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    for entry in range(q.shape[0]):
        qs, ks, vs = (_expanded(t[entry].to(wide), count) for t in (q, k, v))
        dys = dy[entry].to(wide)
        dq, dk, dv = (torch.zeros_like(qs) for _ in range(3))
        for rows in _blocks(count, length):
            block = _Block(qs, ks, seed, p, scale, causal, (entry * heads + first_head) * length, rows)
            keys, probabilities = block.keys, block.probabilities
            dv[:, keys] += torch.matmul(block.drop(probabilities).transpose(1, 2), dys[:, rows])
            dprobabilities = block.drop(torch.matmul(dys[:, rows], vs[:, keys].transpose(1, 2)))
            inner = (dprobabilities * probabilities).sum(-1, keepdim=True)
            dscores = (dprobabilities - inner).mul_(probabilities).mul_(scale)
            dq[:, rows] = torch.matmul(dscores, ks[:, keys])
            dk[:, keys] += torch.matmul(dscores.transpose(1, 2), qs[:, rows])
        for grad, total in zip(grads, (dq, dk, dv), strict=True):
            grad[entry] = _summed(total, grad.shape[1])
    return grads


def _attention_backward_fake(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, *scalars: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v)]


#: [..., S, ..., d] rotated by position (Su et al. 2021, arXiv 2104.09864), the halves of a head paired as Llama does.
rotary = register(
    "rotary(Tensor x, int seq_dim, float base, bool inverse) -> Tensor", _rotary_kernel, _rotary_fake, _Rotary.apply
)

_SCALARS = "float p, float scale, bool causal, int heads, int first_head"

#: softmax(q k^T) with dropout, times v. q [B, h, S, d]; k and v may have fewer heads. The mask is that of the unsharded
#: attention: ``heads`` is the number of heads of all ranks, ``first_head`` the index of this rank's first head.
dropout_attention = register(
    f"dropout_attention(Tensor q, Tensor k, Tensor v, Tensor seed, {_SCALARS}) -> Tensor",
    _attention_kernel,
    _attention_fake,
    _DropoutAttention.apply,
)

#: Returns dq, dk, dv.
dropout_attention_backward = register(
    f"dropout_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor seed, {_SCALARS}) -> Tensor[]",
    _attention_backward_kernel,
    _attention_backward_fake,
    None,
)
