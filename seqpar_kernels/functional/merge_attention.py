"""Merges attention results over disjoint keys into one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import ops
from ..checks import check_float, check_same_device, check_tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from results over disjoint parts of the keys.

    The sum runs in the order given, in fp32 (fp64 for fp64), and is rounded once. Where a row sees no key of a part,
    the part has lse -inf and is ignored, whatever its out holds. Where a row sees no key at all, out is 0 and lse -inf.
    A sink must be in one part at most.

    Args:
        outs: one [B, S, H, D] for each part.
        lses: the log-sum-exp of its scores, [B, H, S] each, as flash-attn and PyTorch's flash op give it.

    Returns:
        tuple: out [B, S, H, D] in the dtype of ``outs``, and lse [B, H, S] in fp32 (fp64). Both have gradients.

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16).unbind(0)
        >>> halves = [
        ...     sp.sequence_parallel_attention(q, keys, values, group=None, return_lse=True)
        ...     for keys, values in zip(k.split(4, 1), v.split(4, 1))
        ... ]
        >>> out, lse = sp.merge_attention(*zip(*halves))
        >>> torch.allclose(out, sp.sequence_parallel_attention(q, k, v, group=None), atol=1e-6)
        True
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: expected one for each of one or more outs, got {len(outs)} outs and {len(lses)} lses")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        for name, t in ((f"outs[{i}]", out), (f"lses[{i}]", lse)):
            check_tensor(name, t)
            check_float(name, t)
            check_same_device(name, t, "outs[0]", outs[0])
        if out.dim() != 4 or out.shape != outs[0].shape or out.dtype != outs[0].dtype:
            raise ValueError(
                f"outs[{i}]: expected {outs[0].dtype} [B, S, H, D] of one shape, got {out.dtype} {tuple(out.shape)} "
                f"beside {tuple(outs[0].shape)}"
            )
        shape = (out.shape[0], out.shape[2], out.shape[1])
        if lse.shape != shape:
            raise ValueError(f"lses[{i}]: expected [B, H, S] = {shape}, got {tuple(lse.shape)}")
    return ops.merge_attention(outs, lses)
