"""The arguments of a block of attention, the same for every backend, and the keys that a row sees.

Tensors: q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], out [B, Sq, Hq, Dv], lse [B, Hq, Sq] in the
accumulation dtype. Hq is a multiple of Hkv; query head h reads key head h // (Hq // Hkv). Any strides, the last one 1:
a [B, H, S, D] tensor comes as its transpose(1, 2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import accumulation_dtype


class AttentionSpec(NamedTuple):
    """The scalars of a block of attention.

    Row ``i`` of the block stands at position ``q_offset + i`` of the sequence, or at ``q_positions[i]`` where that
    tensor is given; keys likewise. A row at position P sees keys at positions P - ``left`` .. P + ``right``; None is no
    bound, causal is ``right=0``.

    A weight is dropped by (seed, row, column) as :func:`.reference.dropout_mask` says, with
    row = ((first_batch + b) * all_heads + first_head + h) * all_rows + position of the row, column = position of the
    key. ``all_heads`` and ``all_rows`` are those of the unsharded attention, so that a shard has the mask of the whole.
    """

    scale: float
    softcap: float = 0.0  # scores become softcap * tanh(scores / softcap); 0 leaves them alone
    left: int | None = None
    right: int | None = None
    q_offset: int = 0
    k_offset: int = 0
    p: float = 0.0  # dropout probability, used with a seed
    first_batch: int = 0
    all_heads: int = 0
    first_head: int = 0
    all_rows: int = 0
    ordered: bool = False  # keys' positions and documents are known to ascend: asking a GPU would wait for it


class AttentionMasks(NamedTuple):
    """Tensors that, with the spec, give the keys that a row sees, the additive bias and the dropout mask."""

    q_positions: Tensor | None = None  # [Sq] int64
    k_positions: Tensor | None = None  # [Sk] int64
    q_documents: Tensor | None = None  # [Sq] or [B, Sq] integers: rows see the keys of their own document alone
    k_documents: Tensor | None = None  # [Sk] or [B, Sk]
    mask: Tensor | None = None  # bool, broadcast to [B, Hq, Sq, Sk]: True is seen
    bias: Tensor | None = None  # q's or the accumulation dtype, broadcast to [B, Hq, Sq, Sk]: added to the scores
    seed: Tensor | None = None  # 0-d int64: dropout


NO_MASKS = AttentionMasks()


class AttentionState(NamedTuple):
    """A row's softmax so far: p = 2 ** (s * log2(e) - maxima) with integer maxima, sums of p, and acc = sum of p v.

    Rescaling by powers of two is exact and sums run key by key. So calls over several blocks of keys, each resumed from
    the last, give the bits of a single call, where the keys are cut at multiples of :data:`CANONICAL_KEYS`.
    Triton's kernels sum a tile of keys at a time, are cut at multiples of it (:func:`.attention.canonical_keys`), and
    leave maxima as they are.
    """

    acc: Tensor  # [B, Sq, Hq, Dv] accumulation dtype
    maxima: Tensor  # [B, Hq, Sq] fp64
    sums: Tensor  # [B, Hq, Sq] fp64


#: Where the sizes of all blocks of keys but the last are multiples of this, the bits of the CPU kernels do not depend
#: on the blocks.
CANONICAL_KEYS = 8


class AttentionGrads(NamedTuple):
    """dq, dk, dv: as q, k, v; None where not wanted."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None


class Visible(NamedTuple):
    """The masks of a kernel call: row i sees key j where ``first[i] <= j < last[i]`` and ``mask`` has True.

    ``first`` and ``last`` are int32 [B or 1, Sq]; the bounds of the spec hold beside them where ``by_offsets`` is True.
    """

    first: Tensor | None
    last: Tensor | None
    mask: Tensor | None
    by_offsets: bool


def _ascending(t: Tensor) -> bool:
    return bool((t[..., 1:] >= t[..., :-1]).all())


def _positions(given: Tensor | None, offset: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(offset, offset + rows, device=device) if given is None else given.to(torch.int64)


def _spans(keys: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ``keys``, ascending along its last dimension, the values ``low`` .. ``high`` begin and end."""
    return torch.searchsorted(keys, low, right=False), torch.searchsorted(keys, high, right=True)


def visible(spec: AttentionSpec, masks: AttentionMasks, q_rows: int, k_rows: int) -> Visible:
    """Positions and documents as one span of keys a row, where keys are in ascending order; else as a boolean mask."""
    first = last = None
    mask = masks.mask
    by_offsets = masks.q_positions is None and masks.k_positions is None
    if not by_offsets and (spec.left is not None or spec.right is not None):
        given = masks.q_positions if masks.q_positions is not None else masks.k_positions
        assert given is not None
        queries = _positions(masks.q_positions, spec.q_offset, q_rows, given.device)
        keys = _positions(masks.k_positions, spec.k_offset, k_rows, given.device)
        far = torch.iinfo(torch.int64)
        low = torch.full_like(queries, far.min) if spec.left is None else queries - spec.left
        high = torch.full_like(queries, far.max) if spec.right is None else queries + spec.right
        if spec.ordered or _ascending(keys):
            first, last = (t[None] for t in _spans(keys, low, high))
        else:
            seen = (keys >= low[:, None]) & (keys <= high[:, None])
            mask = seen if mask is None else mask & seen
    if masks.q_documents is not None and masks.k_documents is not None:
        queries, keys = masks.q_documents, masks.k_documents
        if queries.dim() != keys.dim():
            batch = max(t.shape[0] for t in (queries, keys) if t.dim() == 2)
            queries, keys = queries.expand(batch, q_rows), keys.expand(batch, k_rows)
        if spec.ordered or _ascending(keys):
            begin, end = _spans(keys.contiguous(), queries.contiguous(), queries.contiguous())
            begin, end = (t if t.dim() == 2 else t[None] for t in (begin, end))
            first = begin if first is None else torch.maximum(first, begin)
            last = end if last is None else torch.minimum(last, end)
        else:
            same = queries[..., :, None] == keys[..., None, :]
            same = same[:, None] if same.dim() == 3 else same
            mask = same if mask is None else mask & same
    if first is not None and last is not None:
        first, last = (t.to(torch.int32).contiguous() for t in (first, last))
    return Visible(first, last, mask, by_offsets)


def empty_like_heads(like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """[B, S, H, columns] with the memory layout of ``like``: by rows, or by heads where ``like`` is a transpose."""
    batch, rows, heads, _ = like.shape
    if not like.is_contiguous() and like.transpose(1, 2).is_contiguous():
        return torch.empty(batch, heads, rows, columns, dtype=dtype, device=like.device).transpose(1, 2)
    return torch.empty(batch, rows, heads, columns, dtype=dtype, device=like.device)


def new_state(q: Tensor, value_dim: int) -> AttentionState:
    """An uninitialised state."""
    acc = empty_like_heads(q, value_dim, accumulation_dtype(q.dtype))
    maxima, sums = torch.empty(2, q.shape[0], q.shape[2], q.shape[1], dtype=torch.float64, device=q.device)
    return AttentionState(acc, maxima, sums)


def new_grads(tensors: Sequence[Tensor], wants: Sequence[bool], dtype: torch.dtype) -> AttentionGrads:
    """Uninitialised gradients of q, k and v: None where not wanted."""
    made = (empty_like_heads(t, t.shape[3], dtype) if want else None for t, want in zip(tensors, wants, strict=True))
    return AttentionGrads(*made)


def readable(t: Tensor) -> Tensor:
    """A tensor with contiguous columns; a copy only where they are not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
