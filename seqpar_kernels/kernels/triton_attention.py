"""The Triton attention kernels on torch tensors. The functions of :mod:`.attention_reference`, same arguments.

On CUDA tensors in fp16, bf16 or fp32; on CPU tensors too where ``TRITON_INTERPRET=1`` was set before this module was
first imported. fp32 is multiplied in fp32, or as TF32 where ``torch.backends.cuda.matmul`` allows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention_reference, triton_attention_forward, triton_attention_keys, triton_attention_queries
from .attention_spec import (
    NO_MASKS,
    AttentionGrads,
    AttentionMasks,
    AttentionSpec,
    AttentionState,
    Visible,
    empty_like_heads,
    new_grads,
    new_state,
    readable,
    visible,
)
from .spec import dropout_scale, dropout_threshold
from .triton_attention_config import MOST_KEYS, AttentionTiles, Widths, attention_tiles, widths
from .triton_config import LAUNCH
from .triton_interpreter import as_on_a_gpu, interpreted

_INTERPRETED = interpreted(triton_attention_forward.attention_forward_kernel)
attention_forward_kernel = as_on_a_gpu(triton_attention_forward.attention_forward_kernel)
attention_queries_kernel = as_on_a_gpu(triton_attention_queries.attention_queries_kernel)
attention_keys_kernel = as_on_a_gpu(triton_attention_keys.attention_keys_kernel)

#: See :data:`.attention_spec.CANONICAL_KEYS`.
CANONICAL_KEYS = MOST_KEYS
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FAR = 1 << 30  # farther than any key, and as far again still within 32 bits
_LOG2E = math.log2(math.e)


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``; None when they can."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the Triton attention kernels are for NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        return "the Triton attention kernels need compute capability 8.0 or newer"
    if device.type == "cpu":
        return None if _INTERPRETED else "Triton runs on the CPU only where TRITON_INTERPRET=1 was set before import"
    return f"there are Triton attention kernels for cuda, not for {device.type}"


def refused(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why these kernels cannot take heads of such sizes; None when they can."""
    if dtype not in _DTYPES:
        return f"q: expected float16, bfloat16 or float32 on {device.type}, got {dtype}"
    if _tiles(widths(head_dim, value_dim), dtype, device) is None:
        capability = ".".join(map(str, _capability(device)))
        return (
            f"q: expected heads whose sizes have room on a multiprocessor of compute capability {capability}, got "
            f"{head_dim} for queries and keys and {value_dim} for values in {dtype}"
        )
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _tiles(wide: Widths, dtype: torch.dtype, device: torch.device) -> AttentionTiles | None:
    return attention_tiles(wide, dtype, _tf32(dtype), _capability(device))


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    """Of batch entries, rows and heads."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def _score_strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else t.stride()


class _Block(NamedTuple):
    """What all three kernels are told beside q, k and v."""

    tensors: tuple[Tensor | None, ...]  # bias, mask, first, last, seed, positions of queries and of keys
    strides: tuple[int, ...]  # of bias, mask and spans
    sizes: tuple[int, ...]
    bounds: tuple[int, int]
    inner: float
    factor: float
    dropout: tuple[Any, ...]  # threshold, scale and what tells where in the whole this block lies
    flags: tuple[Any, ...]  # compile-time: bounds, softcap, aligned dropout, precision
    wide: tuple[int, ...]  # compile-time: head dimensions
    tiles: AttentionTiles
    see: Visible


def _block(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, masks: AttentionMasks) -> _Block:
    q_heads, kv_heads, head_dim, value_dim = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    if kv_heads == 0 or q_heads % kv_heads or k.shape[3] != head_dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: sizes: expected v as k, heads of q a multiple of those of k and as wide, got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    reason = refused(q.device, q.dtype, head_dim, value_dim)
    if reason is not None:
        raise ValueError(f"attention: {reason}")
    wide = widths(head_dim, value_dim)
    tiles = _tiles(wide, q.dtype, q.device)
    assert tiles is not None
    shape = (q.shape[0], q_heads, q.shape[1], k.shape[1])
    see = visible(spec, masks, q.shape[1], k.shape[1])
    bias, mask = masks.bias, see.mask
    if bias is not None:
        bias = (bias if bias.dtype in (q.dtype, torch.float32) else bias.to(torch.float32)).expand(shape)
    if mask is not None:
        mask = mask.expand(shape).view(torch.uint8)
    span_batch = see.first.stride(0) if see.first is not None and see.first.shape[0] > 1 else 0
    shift = spec.q_offset - spec.k_offset
    left, right = (spec.left, spec.right) if see.by_offsets else (None, None)
    low = 0 if left is None else min(max(shift - left, -_FAR), _FAR)
    high = 0 if right is None else min(max(shift + right + 1, -_FAR), _FAR)
    positions: list[Tensor | None] = [None, None]
    if masks.seed is not None:
        given = (masks.q_positions, masks.k_positions)
        positions = [None if t is None else t.to(torch.int64).contiguous() for t in given]
    capped = spec.softcap > 0
    return _Block(
        (bias, mask, see.first, see.last, masks.seed, *positions),
        (*_score_strides(bias), *_score_strides(mask), span_batch),
        (q.shape[1], k.shape[1], q_heads, q_heads // kv_heads),
        (low, high),
        spec.scale / spec.softcap if capped else 0.0,
        (spec.softcap if capped else spec.scale) * _LOG2E,
        (
            *(dropout_threshold(spec.p), dropout_scale(spec.p)),
            *(spec.first_batch, spec.all_heads, spec.first_head, spec.all_rows, spec.q_offset, spec.k_offset),
        ),
        (
            *(left is not None, right is not None, capped),
            positions[1] is None and spec.k_offset % 8 == 0,
            "tf32" if _tf32(q.dtype) else "ieee",
        ),
        (head_dim, wide.first, wide.second, value_dim, wide.value),
        tiles,
        see,
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    masks: AttentionMasks = NO_MASKS,
    *,
    state: AttentionState | None = None,
    keep_state: bool = False,
    finish: bool = True,
) -> tuple[Tensor | None, Tensor | None, AttentionState | None]:
    """See :func:`.attention_reference.attention_forward`; a state given is written over and comes back."""
    q, k, v = readable(q), readable(k), readable(v)
    block = _block(q, k, v, spec, masks)
    resume = state is not None
    if state is None and keep_state:
        state = new_state(q, v.shape[3])
    out = lse = None
    if finish:
        out = empty_like_heads(q, v.shape[3], q.dtype)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    acc, maxima, sums = (None, None, None) if state is None else state
    tile = block.tiles.forward
    programs = -(-q.shape[1] // tile.rows) * q.shape[2] * q.shape[0]
    if programs:
        with torch.cuda.device_of(q):
            attention_forward_kernel[(programs,)](
                q, k, v, *block.tensors, acc, maxima, sums, out, lse,
                *_strides(q), *_strides(k), *_strides(v), *_strides(acc), *_strides(out), *block.strides,
                *block.sizes, *block.bounds, block.inner, block.factor, *block.dropout,
                resume, *block.flags, *block.wide, tile.rows, tile.keys,
                num_warps=tile.warps, num_stages=tile.stages, **LAUNCH,
            )  # fmt: skip
    return out, lse, state


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    spec: AttentionSpec,
    masks: AttentionMasks = NO_MASKS,
    *,
    delta: Tensor | None = None,
    dlse: Tensor | None = None,
    wants: tuple[bool, bool, bool] = (True, True, True),
    into: AttentionGrads | None = None,
    grad_dtype: torch.dtype | None = None,
) -> AttentionGrads:
    """See :func:`.attention_reference.attention_backward`."""
    dout, q, k, v = readable(dout), readable(q), readable(k), readable(v)
    block = _block(q, k, v, spec, masks)
    if delta is None:
        assert out is not None
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    delta = (delta if dlse is None else delta - dlse).float().contiguous()
    lse = lse.float().contiguous()
    if into is None:
        dtype = grad_dtype or q.dtype
        if dtype not in (q.dtype, torch.float32):
            raise ValueError(f"attention: grad_dtype: expected {q.dtype} as q, or torch.float32, got {dtype}")
        dq, dk, dv = new_grads((q, k, v), wants, dtype)
    else:
        dq, dk, dv = into
    fraction, exponent = math.frexp(spec.scale)
    scales = (block.inner, block.factor, fraction, 2.0**exponent, 2.0**-exponent)
    read = (q, k, v, dout, lse, delta, *block.tensors)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(dout))
    rest = (*block.strides, *block.sizes, *block.bounds, *scales, *block.dropout, into is not None, *block.flags)
    tile = block.tiles.keys
    programs = -(-k.shape[1] // tile.keys) * k.shape[2] * k.shape[0]
    if programs and (dk is not None or dv is not None):
        rows = _rows_of_tiles(block.see, k.shape[1], tile.keys)
        with torch.cuda.device_of(q):
            attention_keys_kernel[(programs,)](
                *read, rows, dk, dv, *strides, *_strides(dk), *_strides(dv), *rest, *block.wide, tile.rows, tile.keys,
                num_warps=tile.warps, num_stages=tile.stages, **LAUNCH,
            )  # fmt: skip
    tile = block.tiles.queries
    programs = -(-q.shape[1] // tile.rows) * q.shape[2] * q.shape[0]
    if programs and dq is not None:
        with torch.cuda.device_of(q):
            attention_queries_kernel[(programs,)](
                *read, dq, *strides, *_strides(dq), *rest, *block.wide, tile.rows, tile.keys,
                num_warps=tile.warps, num_stages=tile.stages, **LAUNCH,
            )  # fmt: skip
    return AttentionGrads(dq, dk, dv)


def _rows_of_tiles(see: Visible, k_rows: int, keys: int) -> Tensor | None:
    """The first row whose span meets a tile of ``keys`` keys and the one after the last. int32 [B or 1, tiles, 2]"""
    if see.first is None or see.last is None:
        return None
    rows = see.first.shape[1]
    starts = torch.arange(0, k_rows, keys, device=see.first.device, dtype=torch.int32)[:, None]
    step = max(1, -(-rows // _MOST_GROUPS))  # of rows that are looked at together
    padded = torch.nn.functional.pad
    short = -rows % step
    first = padded(see.first, (0, short), value=k_rows).unflatten(1, (-1, step)).amin(2)
    last = padded(see.last, (0, short), value=0).unflatten(1, (-1, step)).amax(2)
    meets = (first[:, None] < starts + keys) & (last[:, None] > starts)
    groups = torch.arange(meets.shape[2], device=meets.device, dtype=torch.int32)
    begin = torch.where(meets, groups, meets.shape[2]).amin(2) * step
    end = (torch.where(meets, groups, -1).amax(2) + 1) * step
    return torch.stack([begin, end], -1).to(torch.int32)


_MOST_GROUPS = 1024


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`.attention_reference.merge_attention`, whose operations on the device these are."""
    merged, lse = attention_reference.merge_attention(outs, lses, dtype)
    out = empty_like_heads(outs[0], outs[0].shape[3], merged.dtype)
    return (merged if merged.stride() == out.stride() else out.copy_(merged)), lse
