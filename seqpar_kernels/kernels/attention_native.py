"""The compiled attention kernels (csrc/cpu/attention_*.cpp) on torch tensors. The functions of
:mod:`.attention_reference`, same arguments; CPU only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .attention_spec import (
    NO_MASKS,
    AttentionGrads,
    AttentionMasks,
    AttentionSpec,
    AttentionState,
    empty_like_heads,
    new_grads,
    new_state,
    readable,
    visible,
)
from .native import DTYPE_CODE
from .spec import accumulation_dtype, dropout_scale, dropout_threshold

_FAR = 1 << 40  # larger than any distance of two keys


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``; None when they can."""
    if device.type != "cpu":
        return f"the compiled attention kernels run on cpu, not on {device.type}"
    return native.unavailable(device)


def _rows(t: Tensor | None, like: Tensor) -> Tensor | None:
    """[B, Hq, Sq] contiguous, in the accumulation dtype."""
    return None if t is None else t.to(accumulation_dtype(like.dtype)).contiguous()


def _extras(q: Tensor, k: Tensor, spec: AttentionSpec, masks: AttentionMasks) -> tuple[Any, object]:
    """The kernels' arguments beside q, k and v, and the tensors that must live as long as the call."""
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    see = visible(spec, masks, q.shape[1], k.shape[1])
    first, last = (None if t is None else t.expand(q.shape[0], -1) for t in (see.first, see.last))
    bias, mask, bias_dtype = masks.bias, see.mask, q.dtype
    if bias is not None:
        if bias.dtype not in (q.dtype, accumulation_dtype(q.dtype)):
            bias = bias.to(accumulation_dtype(q.dtype))
        bias, bias_dtype = bias.expand(shape), bias.dtype
    if mask is not None:
        mask = mask.expand(shape)
    left, right = (spec.left, spec.right) if see.by_offsets else (None, None)
    positions = [None if t is None else t.to(torch.int64).contiguous() for t in (masks.q_positions, masks.k_positions)]
    alive = (first, last, bias, mask, positions, masks.seed)
    made = native._native.AttentionExtras(
        DTYPE_CODE[q.dtype],
        spec.scale,
        spec.softcap,
        spec.q_offset - spec.k_offset,
        -1 if left is None else min(left, _FAR),
        -1 if right is None else min(right, _FAR),
        first,
        last,
        DTYPE_CODE[bias_dtype],
        bias,
        mask,
        masks.seed,
        dropout_threshold(spec.p),
        dropout_scale(spec.p),
        spec.first_batch,
        spec.all_heads,
        spec.first_head,
        spec.all_rows,
        spec.q_offset,
        spec.k_offset,
        *positions,
    )
    return made, alive


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
    """See :func:`.attention_reference.attention_forward`; a given state is overwritten and returned."""
    q, k, v = readable(q), readable(k), readable(v)
    extras, _alive = _extras(q, k, spec, masks)
    resume = state is not None
    if state is None and keep_state:
        state = new_state(q, v.shape[3])
    out = lse = None
    if finish:
        out = empty_like_heads(q, v.shape[3], q.dtype)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q.dtype), device=q.device)
    acc, maxima, sums = (None, None, None) if state is None else state
    native._native.attention_forward(torch.get_num_threads(), extras, q, k, v, resume, acc, maxima, sums, out, lse)
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
    out = None if out is None else readable(out)
    extras, _alive = _extras(q, k, spec, masks)
    if into is None:
        dtype = grad_dtype or q.dtype
        grads = new_grads((q, k, v), wants, dtype)
    else:
        dtype, grads = accumulation_dtype(q.dtype), into
    native._native.attention_backward(
        torch.get_num_threads(),
        extras,
        q,
        k,
        v,
        out,
        dout,
        _rows(lse, q),
        _rows(delta, q),
        _rows(dlse, q),
        into is not None,
        DTYPE_CODE[dtype],
        *grads,
    )
    return grads


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`.attention_reference.merge_attention`."""
    first = outs[0]
    out = empty_like_heads(first, first.shape[3], dtype or first.dtype)
    wide = accumulation_dtype(first.dtype)
    lse = torch.empty(lses[0].shape, dtype=wide, device=first.device)
    codes = DTYPE_CODE[first.dtype], DTYPE_CODE[out.dtype]
    read = [readable(t) for t in outs], [t.to(wide).contiguous() for t in lses]
    native._native.attention_merge(torch.get_num_threads(), *codes, *read, out, lse)
    return out, lse
