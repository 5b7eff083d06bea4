"""``seqpar::decode_attention``: new rows attend over sharded keys, position p on rank p mod t. It has no gradient.

h is Hq, or with ``own_heads`` the number of this rank's heads.

| op | result | shape | communication |
|---|---|---|---|
| decode_attention | out, lse | [B, n, h, Dv], [B, h, n] | the softmax state of the n new rows, one message a peer |
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels import attention
from ..kernels.spec import accumulation_dtype
from ..layout import group_rank, group_size
from ..overlap.attention_decode import Masking, attend
from ..overlap.key_owners import heads_of
from .registry import group_named, register, without_autocast


@without_autocast
def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    kv_seq_len: int,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    own_heads: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    attention.require_kernels(q.device, q.dtype, q.shape[3], v.shape[3])  # raises before anything is sent
    masking = Masking(kv_seq_len, scale, softcap, left, right)
    return attend(group_named(group), q, k, v, sinks, bias, mask, masking, own_heads)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, own_heads, name = rest
    group = group_named(name)
    heads = q.shape[2]
    if own_heads:
        heads = len(heads_of(int(heads), group_size(group), group_rank(group)))
    out = q.new_empty((q.shape[0], q.shape[1], heads, v.shape[3]))
    return out, q.new_empty((q.shape[0], heads, q.shape[1]), dtype=accumulation_dtype(q.dtype))


def _no_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("seqpar::decode_attention has no derivative; call it under torch.no_grad()")


#: q [B, n, Hq, D] of all heads, k [B, Sr, Hkv, D] and v [B, Sr, Hkv, Dv] of this rank's keys.
decode_attention = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? mask, SymInt kv_seq_len, "
    "float scale, float softcap, int? left, int? right, bool own_heads, str group) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    _no_gradient,
)
