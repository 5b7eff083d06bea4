"""``seqpar::block_attention``, attention over a block of keys, and ``seqpar::merge_attention``, which merges blocks.

A row that sees no key of a block has out 0 and lse -inf, and a merge ignores it. Both ops take gradients of out and
lse. Inputs are q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]; a merge has n outs and lses.

| op | result | shape | communication |
|---|---|---|---|
| block_attention | out, lse | [B, Sq, Hq, Dv], [B, Hq, Sq] | none |
| | dq, dk, dv | those of q, k, v | none |
| | dbias | that of the bias | none |
| merge_attention | out, lse | [B, S, H, D], [B, H, S] | none |
| | douts, dlses | n of [B, S, H, D], n of [B, H, S] | none |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import attention
from ..kernels.attention_spec import AttentionMasks, AttentionSpec, empty_like_heads
from ..kernels.spec import accumulation_dtype
from .registry import register, without_autocast

_SCALARS = (
    "Tensor? q_positions, Tensor? k_positions, Tensor? q_documents, Tensor? k_documents, Tensor? mask, Tensor? bias, "
    "Tensor? seed, float scale, float softcap, int? left, int? right, SymInt q_offset, SymInt k_offset, float p, "
    "int first_batch, int all_heads, int first_head, SymInt all_rows, bool ordered=False"
)
_MASKS = len(AttentionMasks._fields)


def _taken(rest: tuple[Any, ...]) -> tuple[AttentionSpec, AttentionMasks]:
    """The arguments after q, k and v in the schema: the fields of AttentionMasks, then those of AttentionSpec."""
    return AttentionSpec(*rest[_MASKS:]), AttentionMasks(*rest[:_MASKS])


@without_autocast
def _kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse, _ = attention.forward(q, k, v, *_taken(rest))
    assert out is not None and lse is not None
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))
    return empty_like_heads(q, v.shape[3], q.dtype), lse


@without_autocast
def _backward_kernel(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, masks = _taken(rest)
    delta = attention.row_dots(dout, out)
    if dlse is not None:
        delta -= dlse
    grads = attention.backward(dout, q, k, v, lse, delta, spec, masks)
    if masks.bias is None or not bias_grad:
        dbias = q.new_empty(0)
    else:
        shape = torch.Size([1] * (4 - masks.bias.dim()) + list(masks.bias.shape))
        dbias = attention.bias_gradient(dout, q, k, v, lse, delta, spec, masks, shape)
        dbias = dbias.to(masks.bias.dtype).reshape(masks.bias.shape)
    dq, dk, dv = (g for g in grads if g is not None)
    return dq, dk, dv, dbias


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *rest: Any
) -> tuple[Tensor, ...]:
    bias = rest[3 + AttentionMasks._fields.index("bias")]
    dbias = rest[0].new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    return (*(empty_like_heads(t, t.shape[3], t.dtype) for t in rest[:3]), dbias)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = block_attention.below_autograd(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[: 3 + _MASKS], out, lse)
        ctx.scalars = args[3 + _MASKS :]
        ctx.wants = args[3 + AttentionMasks._fields.index("bias")] is not None
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        place = 3 + AttentionMasks._fields.index("bias")
        bias_grad = bool(ctx.needs_input_grad[place])
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dbias = block_attention_backward(dout, dlse, out, lse, bias_grad, *tensors, *ctx.scalars)
        grads: list[Tensor | None] = [None] * (len(tensors) + len(ctx.scalars))
        grads[:3] = dq, dk, dv
        grads[place] = dbias if bias_grad else None
        return tuple(grads)


block_attention = register(
    f"block_attention(Tensor q, Tensor k, Tensor v, {_SCALARS}) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    _BlockAttention.apply,
)
block_attention_backward = register(
    "block_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool bias_grad, Tensor q, Tensor k, "
    f"Tensor v, {_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
    None,
)


# --- merge -----------------------------------------------------------------------------------------------------------


def _merge_kernel(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    if outs[0].shape[0] == 0 or outs[0].shape[2] == 0:
        return torch.empty_like(outs[0]), torch.empty_like(lses[0], dtype=accumulation_dtype(outs[0].dtype))
    merged: tuple[Tensor, Tensor] = attention.select_attention(outs[0].device).merge_attention(outs, lses)
    return merged


def _merge_fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = outs[0]
    lse = lses[0].new_empty(lses[0].shape, dtype=accumulation_dtype(first.dtype))
    return empty_like_heads(first, first.shape[3], first.dtype), lse


def _weight(part: Tensor, lse: Tensor) -> Tensor:
    """exp(part - lse), 0 where part is -inf."""
    return torch.where(part == -torch.inf, 0.0, torch.exp(part.to(lse.dtype) - lse))


def _merge_backward_kernel(
    dout: Tensor, dlse: Tensor | None, outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """With w_i = exp(lse_i - lse): dout_i = w_i dout, dlse_i = w_i (dout . (out_i - out) + dlse)."""
    wide, douts, dlses = lse.dtype, [], []
    total = attention.row_dots(dout, out)
    for part_out, part in zip(outs, lses, strict=True):
        weight = _weight(part, lse)
        columns = weight.transpose(1, 2)[..., None]
        douts.append((columns * dout.to(wide)).to(part_out.dtype))
        inner = attention.row_dots(dout, part_out) - total
        if dlse is not None:
            inner = inner + dlse
        dlses.append(torch.where(weight == 0, 0.0, weight * inner).to(part.dtype))
    return douts, dlses


def _merge_backward_fake(
    dout: Tensor, dlse: Tensor | None, outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    return [t.new_empty(t.shape) for t in outs], [t.new_empty(t.shape) for t in lses]


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *parts: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge_attention.below_autograd(list(parts[:count]), list(parts[count:]))
        ctx.set_materialize_grads(False)
        ctx.count = count
        ctx.save_for_backward(*parts, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *parts, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        outs, lses = parts[: ctx.count], parts[ctx.count :]
        douts, dlses = merge_attention_backward(dout, dlse, list(outs), list(lses), out, lse)
        return (None, *douts, *dlses)


merge_attention = register(
    "merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)",
    _merge_kernel,
    _merge_fake,
    lambda outs, lses: _Merge.apply(len(outs), *outs, *lses),
)
merge_attention_backward = register(
    "merge_attention_backward(Tensor dout, Tensor? dlse, Tensor[] outs, Tensor[] lses, Tensor out, Tensor lse) "
    "-> (Tensor[], Tensor[])",
    _merge_backward_kernel,
    _merge_backward_fake,
    None,
)
