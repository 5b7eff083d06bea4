"""Calls the attention kernels of a device, and adds negative bounds, calls without heads, and the bias gradient."""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from . import attention_native
from .attention_reference import Scores
from .attention_spec import (
    CANONICAL_KEYS,
    AttentionGrads,
    AttentionMasks,
    AttentionSpec,
    AttentionState,
    empty_like_heads,
)
from .spec import accumulation_dtype

_BLOCK_ELEMENTS = 1 << 22  # the most scores at one time for the gradient of a bias


#: Keys, where Triton's tiles have up to 128: see :func:`canonical_keys`.
_CANONICAL_KEYS_ON_CUDA = 128


def canonical_keys(device_type: str) -> int:
    """Keys given in several calls, cut at multiples of this, come to the bits of a single call."""
    return _CANONICAL_KEYS_ON_CUDA if device_type == "cuda" else CANONICAL_KEYS


@functools.cache
def select_attention(device: torch.device) -> ModuleType:
    """The module with :mod:`.attention_reference`'s functions for tensors on ``device``: Triton's on CUDA.

    Raises:
        RuntimeError: no attention kernel can run there, with the reason.
    """
    if device.type != "cuda":
        module, reason = attention_native, attention_native.unavailable(device)
    else:
        try:
            module = importlib.import_module(".triton_attention", __package__)
            reason = module.unavailable(device)
        except ImportError as error:
            reason = f"the Triton attention kernels could not be imported: {error}"
    if reason is None:
        return module
    raise RuntimeError(f"no attention kernel can run on {device}: {reason}")


def require_kernels(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    """Return where there are kernels for heads of these sizes on ``device``; to be asked before anything is sent.

    Raises:
        RuntimeError: no kernel can run on ``device``, with the reason.
        ValueError: those that can do not take such heads.
    """
    module = select_attention(device)
    reason = module.refused(device, dtype, head_dim, value_dim) if hasattr(module, "refused") else None
    if reason is not None:
        raise ValueError(f"attention: {reason}")


def with_bounds(
    spec: AttentionSpec, masks: AttentionMasks, q: Tensor, k: Tensor
) -> tuple[AttentionSpec, AttentionMasks]:
    """``masks`` with positions where a bound is negative: kernels take negative bounds with positions only."""
    negative = any(bound is not None and bound < 0 for bound in (spec.left, spec.right))
    if not negative or masks.q_positions is not None or masks.k_positions is not None:
        return spec, masks
    queries = torch.arange(spec.q_offset, spec.q_offset + q.shape[1], device=q.device)
    keys = torch.arange(spec.k_offset, spec.k_offset + k.shape[1], device=q.device)
    return spec._replace(ordered=masks.k_documents is None), masks._replace(q_positions=queries, k_positions=keys)


def no_work(q: Tensor, k: Tensor) -> bool:
    """Whether there is no batch entry or no head."""
    return q.shape[0] == 0 or q.shape[2] == 0 or k.shape[2] == 0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    masks: AttentionMasks,
    *,
    state: AttentionState | None = None,
    keep_state: bool = False,
    finish: bool = True,
) -> tuple[Tensor | None, Tensor | None, AttentionState | None]:
    """:func:`.attention_reference.attention_forward` by the kernels of q's device."""
    if no_work(q, k):
        out = empty_like_heads(q, v.shape[3], q.dtype).zero_()
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=accumulation_dtype(q.dtype))
        return (out, lse.to(q.device), state) if finish else (None, None, state)
    spec, masks = with_bounds(spec, masks, q, k)
    found: tuple[Tensor | None, Tensor | None, AttentionState | None] = select_attention(q.device).attention_forward(
        q, k, v, spec, masks, state=state, keep_state=keep_state, finish=finish
    )
    return found


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    spec: AttentionSpec,
    masks: AttentionMasks,
    *,
    into: AttentionGrads | None = None,
    grad_dtype: torch.dtype | None = None,
) -> AttentionGrads:
    """:func:`.attention_reference.attention_backward` by the kernels of q's device.

    ``delta`` is rowsum(dout * out), less the gradient of lse where there is one. [B, Hq, Sq]
    """
    if no_work(q, k):
        if into is not None:
            return into
        dtype = grad_dtype or q.dtype
        return AttentionGrads(*(empty_like_heads(t, t.shape[3], dtype).zero_() for t in (q, k, v)))
    spec, masks = with_bounds(spec, masks, q, k)
    grads: AttentionGrads = select_attention(q.device).attention_backward(
        dout, q, k, v, None, lse, spec, masks, delta=delta, into=into, grad_dtype=grad_dtype
    )
    return grads


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Sums of x * y over the last dimension in the accumulation dtype: [B, S, H, D] -> [B, H, S]."""
    batch, rows, heads, columns = x.shape
    wide = accumulation_dtype(x.dtype)
    out = torch.empty(batch, heads, rows, dtype=wide, device=x.device)
    elements = 1 << (18 if x.device.type == "cpu" else 26)  # at a time: what a cache holds, or what fills a GPU
    step = max(1, elements // max(1, heads * columns))
    for b in range(batch):
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            product = x[b, some].to(wide) * y[b, some].to(wide)
            out[b, :, some] = product.sum(-1).t()
    return out


def bias_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    spec: AttentionSpec,
    masks: AttentionMasks,
    shape: torch.Size,
) -> Tensor:
    """Gradient of an additive bias that was broadcast from ``shape``, 4-D, in the accumulation dtype.

    There is no kernel for it: plain torch computes the scores again, some rows at a time. ``delta`` as in
    :func:`backward`.
    """
    wide = accumulation_dtype(q.dtype)
    grad = torch.zeros(shape, dtype=wide, device=q.device)
    if no_work(q, k) or k.shape[1] == 0:
        return grad
    spec, masks = with_bounds(spec, masks, q, k)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    step = max(1, _BLOCK_ELEMENTS // (q.shape[2] * k.shape[1]))
    for b in range(q.shape[0]):
        for start in range(0, q.shape[1], step):
            rows = slice(start, min(start + step, q.shape[1]))
            some, their_spec = (
                _part(masks, spec, full, b, rows),
                spec._replace(first_batch=spec.first_batch + b, q_offset=spec.q_offset + start),
            )
            s = Scores(q[b : b + 1, rows], k[b : b + 1], v[b : b + 1], their_spec, some)
            row_lse = lse[b : b + 1, :, rows].to(wide)[..., None]
            weights = torch.exp(s.scores - row_lse.masked_fill(row_lse == -math.inf, math.inf))
            douts = dout[b : b + 1, rows].to(wide).transpose(1, 2)
            ds = weights * (s.drop(douts @ s.v.transpose(-1, -2)) - delta[b : b + 1, :, rows].to(wide)[..., None])
            target = grad[b : b + 1] if shape[0] > 1 else grad
            target = target[:, :, rows] if shape[2] > 1 else target
            target += ds.sum_to_size(target.shape)
    return grad


def _part(
    masks: AttentionMasks, spec: AttentionSpec, full: tuple[int, int, int, int], b: int, rows: slice
) -> AttentionMasks:
    """The part of a tensor for some rows of one batch entry."""

    def documents(t: Tensor | None, some: slice) -> Tensor | None:
        return None if t is None else (t[b : b + 1, some] if t.dim() == 2 else t[some])

    def scores(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(full)[b : b + 1, :, rows]

    return masks._replace(
        q_positions=None if masks.q_positions is None else masks.q_positions[rows],
        q_documents=documents(masks.q_documents, rows),
        k_documents=documents(masks.k_documents, slice(None)),
        mask=scores(masks.mask),
        bias=scores(masks.bias),
    )
