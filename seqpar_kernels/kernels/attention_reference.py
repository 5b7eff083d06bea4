"""The specification of the attention kernels, in plain torch: slow, on any device, exact in fp64.

A sink is a logit that takes part in a row's softmax and has no value. It is not part of a block: it is added once,
after all blocks are merged, as out * sigmoid(lse - sink) and logaddexp(lse, sink). The backward takes this out and this
lse, without another change; d(sink) = -sum over rows of exp(sink - lse) * delta.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_spec import NO_MASKS, AttentionGrads, AttentionMasks, AttentionSpec, AttentionState
from .reference import philox_words
from .spec import accumulation_dtype, dropout_scale, dropout_threshold


def unavailable(device: torch.device) -> str | None:
    """None: the reference runs on every device."""
    return None


def seen(spec: AttentionSpec, masks: AttentionMasks, q_rows: int, k_rows: int, device: torch.device) -> Tensor:
    """Which keys each row sees, [.., .., Sq, Sk] bool, to be broadcast."""
    queries = _positions(masks.q_positions, spec.q_offset, q_rows, device)[:, None]
    keys = _positions(masks.k_positions, spec.k_offset, k_rows, device)
    see = torch.ones(1, 1, q_rows, k_rows, dtype=torch.bool, device=device)
    if spec.left is not None:
        see = see & (keys >= queries - spec.left)
    if spec.right is not None:
        see = see & (keys <= queries + spec.right)
    if masks.q_documents is not None and masks.k_documents is not None:
        q_documents, k_documents = (t.view(-1, 1, t.shape[-1]) for t in (masks.q_documents, masks.k_documents))
        see = see & (q_documents[..., :, None] == k_documents[..., None, :])
    return see if masks.mask is None else see & masks.mask


def _positions(given: Tensor | None, offset: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(offset, offset + rows, device=device) if given is None else given.to(torch.int64)


def kept(spec: AttentionSpec, masks: AttentionMasks, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Which weights [B, Hq, Sq, Sk] dropout keeps."""
    batch, heads, q_rows, k_rows = shape
    assert masks.seed is not None
    index = torch.arange(batch, device=device)[:, None, None] + spec.first_batch
    index = index * spec.all_heads + torch.arange(heads, device=device)[:, None] + spec.first_head
    rows = index * spec.all_rows + _positions(masks.q_positions, spec.q_offset, q_rows, device)
    columns = _positions(masks.k_positions, spec.k_offset, k_rows, device)
    words = torch.stack(philox_words(masks.seed, rows[..., None], columns // 8), -1)
    which = (columns % 8 // 2).expand(shape)[..., None]
    word = words.gather(-1, which)[..., 0]
    return (word >> (columns % 2 * 16) & 0xFFFF) >= dropout_threshold(spec.p)


class Scores:
    """Scores [B, Hq, Sq, Sk] in the accumulation dtype, -inf where a row sees no key, and factors for the gradients."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, masks: AttentionMasks):
        self.wide = accumulation_dtype(q.dtype)
        group = q.shape[2] // k.shape[2]
        self.q = q.to(self.wide).transpose(1, 2)
        self.k, self.v = (t.to(self.wide).transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
        product = self.q @ self.k.transpose(-1, -2) * spec.scale
        self.slope = torch.full_like(product, spec.scale)
        if spec.softcap > 0:
            capped = torch.tanh(product / spec.softcap)
            self.slope = self.slope * (1 - capped * capped)
            product = capped * spec.softcap
        if masks.bias is not None:
            product = product + masks.bias.to(self.wide)
        see = seen(spec, masks, q.shape[1], k.shape[1], q.device)
        self.scores = product.masked_fill(~see, -math.inf)
        self.factor: Tensor | None = None
        if masks.seed is not None:
            self.factor = kept(spec, masks, tuple(product.shape), q.device).to(self.wide) * dropout_scale(spec.p)

    def drop(self, weights: Tensor) -> Tensor:
        return weights if self.factor is None else weights * self.factor


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
    """softmax(scale * q k^T, ...) v over the keys of this block, and over those in ``state``.

    Returns:
        out, lse and the new state: the first two unless ``finish=False``, the state where ``state`` or ``keep_state``
        is given. A row that sees no key has out 0 and lse -inf.
    """
    s = Scores(q, k, v, spec, masks)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    if state is None:
        maxima = torch.full(shape, -1e30, dtype=torch.float64, device=q.device)
        sums, acc = torch.zeros_like(maxima), torch.zeros((*shape, v.shape[3]), dtype=s.wide, device=q.device)
    else:
        acc, maxima, sums = state.acc.transpose(1, 2), state.maxima, state.sums
    scores = s.scores * math.log2(math.e)
    highest = scores.amax(-1) if k.shape[1] else torch.full(shape, -math.inf, device=q.device)
    new = torch.maximum(maxima, highest.round().to(torch.float64))
    weights = torch.exp2(scores - new[..., None].to(s.wide))
    factor = torch.exp2(maxima - new)
    sums = sums * factor + weights.sum(-1, dtype=torch.float64)
    acc = acc * factor[..., None].to(s.wide) + s.drop(weights) @ s.v
    kept_state = AttentionState(acc.transpose(1, 2), new, sums) if keep_state or state is not None else None
    if not finish:
        return None, None, kept_state
    nothing = sums == 0
    out = acc / torch.where(nothing, 1.0, sums)[..., None].to(s.wide)
    lse = torch.where(nothing, -math.inf, (new + torch.log2(sums)) * math.log(2)).to(s.wide)
    return out.transpose(1, 2).to(q.dtype), lse, kept_state


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
    """Gradients of this block, given the lse of all keys that its rows ever see.

    Args:
        out: the merged result, for delta = rowsum(dout * out) where ``delta`` [B, Hq, Sq] is not given.
        dlse: gradient of lse, [B, Hq, Sq].
        into: gradients in the accumulation dtype that are added to, in place; without it they are new, in
            ``grad_dtype``: q's dtype, or the accumulation dtype.
    """
    s = Scores(q, k, v, spec, masks)
    douts = dout.to(s.wide).transpose(1, 2)
    if delta is None:
        assert out is not None
        delta = (douts * out.to(s.wide).transpose(1, 2)).sum(-1)
    weights = torch.exp(s.scores - torch.where(lse == -math.inf, math.inf, lse.to(s.wide))[..., None])
    inner = delta if dlse is None else delta - dlse
    dscores = weights * (s.drop(douts @ s.v.transpose(-1, -2)) - inner[..., None]) * s.slope
    grads = (dscores @ s.k, dscores.transpose(-1, -2) @ s.q, s.drop(weights).transpose(-1, -2) @ douts)
    results: list[Tensor | None] = []
    for i, (grad, like) in enumerate(zip(grads, (q, k, v), strict=True)):
        if i > 0:
            grad = grad.unflatten(1, (like.shape[2], -1)).sum(2)
        grad = grad.transpose(1, 2)
        total = None if into is None else into[i]
        if into is not None:
            results.append(None if total is None else total.add_(grad))
        else:
            results.append(grad.to(grad_dtype or q.dtype) if wants[i] else None)
    return AttentionGrads(*results)


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Merge results over disjoint keys: outs [B, S, H, Dv], lses [B, H, S]; ``dtype``: that of the merged out."""
    wide = accumulation_dtype(outs[0].dtype)
    stacked = torch.stack([lse.to(torch.float64) for lse in lses])
    lse = torch.logsumexp(stacked, 0)  # -inf where all lses are -inf
    total = torch.zeros_like(outs[0], dtype=wide)
    for out, part in zip(outs, stacked, strict=True):
        weight = torch.where(part == -math.inf, 0.0, torch.exp(part - lse)).to(wide).transpose(1, 2)[..., None]
        total = total + torch.where(weight == 0, 0.0, weight * out.to(wide))
    return total.to(dtype or outs[0].dtype), lse.to(wide)
