"""Who is timed in ``bench attention``, on one rank: ours by engine, K and V gathered by hand, torch's ring, others'.

Everybody gets this rank's rows of q [1, S/t, Hq, D] and k, v [1, S/t, Hkv, D] and gives its rows of the causal
attention over the whole sequence, [1, S/t, Hq, D]. A peer that knows one layout alone gets its shards in that one.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp

from .linear_providers import _gathered, _scattered
from .providers import Absent

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """One question: causal attention over S rows, of which each sees ``window`` keys at most, or all before it.

    With ``documents`` > 1 these are packed, i parts long for the i-th, and rows see the keys of their own.
    """

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    layout: str
    documents: int = 1

    @property
    def is_masked(self) -> bool:
        """Whether SDPA needs a mask for it, which it pays for in full."""
        return self.window is not None or self.documents > 1

    def ends(self) -> list[int]:
        """cu_seqlens."""
        n = self.documents
        return [self.seq * i * (i + 1) // (n * (n + 1)) for i in range(n + 1)]

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor | None:
        return None if self.documents == 1 else torch.tensor(self.ends(), dtype=torch.int32, device=device)

    def bounds(self) -> tuple[int, int]:
        """(left, right) in the package's words."""
        return (-1 if self.window is None else self.window - 1), 0

    def mask(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Which of the positions ``keys`` each of the positions ``rows`` sees: booleans [rows, keys]."""
        behind = rows[:, None] - keys
        seen = behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)
        if self.documents == 1:
            return seen
        ends = torch.tensor(self.ends()[1:], device=rows.device)
        mine, theirs = (torch.searchsorted(ends, at, right=True) for at in (rows, keys))
        return seen & (mine[:, None] == theirs)

    def pairs(self) -> int:
        """Pairs of a row and a key that it sees, of one head."""
        total = 0
        for start, stop in itertools.pairwise(self.ends()):
            w = min(self.window or self.seq, stop - start)
            total += w * (w + 1) // 2 + (stop - start - w) * w
        return total


#: The layout of those who attend over the whole sequence on every rank.
WHOLE = "whole"


@dataclass
class Provider:
    """``attend`` and the layout of the shards that it takes, or :data:`WHOLE`."""

    attend: Attend
    layout: str


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, D] -> [B, H, S, D], without a copy."""
    return [t.transpose(1, 2) for t in tensors]


def whole_mask(case: AttentionCase, device: torch.device | str = "cpu") -> Tensor | None:
    """What SDPA needs beside its causal flag: None where that says everything. A mask it pays for in full."""
    every = torch.arange(case.seq, device=device)
    return case.mask(every, every) if case.is_masked else None


def sdpa(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention, [B, rows, Hq, D]; without a mask the causal one of a square."""
    out = F.scaled_dot_product_attention(
        *heads_first(q, k, v), attn_mask=mask, is_causal=mask is None, enable_gqa=case.heads != case.kv_heads
    )
    return out.transpose(1, 2)


def unsharded(case: AttentionCase) -> Provider:
    """SDPA over the whole sequence, each rank for itself: the ideal is this over the ranks."""
    masks: dict[torch.device, Tensor | None] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device not in masks:
            masks[q.device] = whole_mask(case, q.device)
        return sdpa(case, q, k, v, masks[q.device])

    return Provider(attend, WHOLE)


def ours_unsharded(case: AttentionCase, group: dist.ProcessGroup | None, always: bool = False) -> Provider:
    """Ours without a group: with a mask the better measure of the work, since SDPA pays for its mask in full."""
    if not case.is_masked and not always:
        raise Absent("without a window or documents the unsharded one is SDPA's causal attention")
    return Provider(_ours(case, None, "auto"), WHOLE)


def ours(case: AttentionCase, group: dist.ProcessGroup, engine: str = "auto", save_kv: bool | None = None) -> Provider:
    return Provider(_ours(case, group, engine, save_kv), case.layout)


def _ours(case: AttentionCase, group: dist.ProcessGroup | None, engine: str, save_kv: bool | None = None) -> Attend:
    layout = "contiguous" if group is None else case.layout

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sp.sequence_parallel_attention(
            q,
            k,
            v,
            group=group,
            is_causal=True,
            window_size=case.bounds(),
            cu_seqlens=case.cu_seqlens(q.device),
            layout=layout,
            engine=engine,
            save_kv=save_kv,
        )
        assert isinstance(out, Tensor)
        return out

    return attend


class _Gather(torch.autograd.Function):
    """[1, S/t, ...] -> [1, S, ...] in rank order; the backward adds the ranks' gradients, each its own rows."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def,override]
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return _scattered(grad, ctx.group), None


def by_hand(case: AttentionCase, group: dist.ProcessGroup) -> Provider:
    """One all-gather of K and V together, then SDPA with the mask of this rank's rows."""
    ranks, rank = group.size(), group.rank()
    # Contiguous shards: what comes before a rank's last row is a prefix of what was gathered, the rest is cut off.
    rows = torch.arange(case.seq).chunk(ranks)[rank]
    last = int(rows[-1]) + 1
    mask = case.mask(rows, torch.arange(last))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = _Gather.apply(torch.cat([k, v], -1), group)[:, :last]
        return sdpa(case, q, *kv.split(case.head_dim, -1), mask)

    return Provider(attend, "contiguous")


class _TorchRing(torch.autograd.Function):
    """torch's ring around its CPU flash op; ``context_parallel`` itself dispatches CUDA ops alone."""

    @staticmethod
    def forward(ctx, q, k, v, group):  # type: ignore[no-untyped-def,override]
        from torch.distributed.tensor.experimental._attention import _templated_ring_attention

        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = _templated_ring_attention(group, 2, op, q, k, v, is_causal=True, dropout_p=0.0, scale=None)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        from torch.distributed.tensor.experimental._context_parallel._attention import (
            _templated_ring_attention_backward,
        )

        q, k, v, out, lse = ctx.saved_tensors
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = _templated_ring_attention_backward(
            ctx.group, 2, op, grad, "grad_out", q, k, v, out, lse, True, dropout_p=0.0, scale=None
        )
        return *found[:3], None


def torch_ring(case: AttentionCase, group: dist.ProcessGroup) -> Provider:
    """``_templated_ring_attention`` with torch's own default: K and V gathered at once, load balanced if zigzag."""
    if case.is_masked:
        raise Absent("torch's ring has no window and no documents")
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention
    except ImportError as error:
        raise Absent(f"this torch has no ring to be driven on a CPU: {error}") from None
    balanced = case.layout == "zigzag"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One option of the process for forward and backward: nobody else here reads it.
        _attention._cp_options.enable_load_balance = balanced
        out: Tensor = _TorchRing.apply(*heads_first(q, k, v), group)
        return out.transpose(1, 2)

    return Provider(attend, case.layout)


def _need(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{name} is not installed")


def deepspeed(case: AttentionCase, group: dist.ProcessGroup) -> Provider:
    """DeepSpeed's Ulysses around SDPA."""
    _need("deepspeed", "deepspeed")
    if case.heads % group.size() or case.kv_heads % group.size():
        raise Absent("its Ulysses wants numbers of heads that the ranks divide")
    import deepspeed as package
    from deepspeed.sequence.layer import DistributedAttention

    package.init_distributed("gloo")  # takes the group that there is

    mask = whole_mask(case)

    def local(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return sdpa(case, q, k, v, mask).contiguous()

    attention = DistributedAttention(local, group, scatter_idx=2, gather_idx=1)
    batch_dim = (0,) if "batch_dim_idx" in inspect.signature(attention.forward).parameters else ()
    return Provider(lambda q, k, v: attention(q, k, v, *batch_dim), "contiguous")


def yunchang(case: AttentionCase, group: dist.ProcessGroup) -> Provider:
    """Its ring over torch's attention, the one of its kernels that a CPU has."""
    _need("yunchang", "yunchang")
    if case.is_masked:
        raise Absent("its ring over torch's attention has no window and no documents")
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    set_seq_parallel_pg(1, group.size(), group.rank(), group.size())
    attention = LongContextAttention(ring_impl_type="basic_pytorch", attn_type=AttnType.TORCH)
    return Provider(lambda q, k, v: attention(q, k, v, causal=True), "contiguous")


def ring_flash_attn(case: AttentionCase, group: dist.ProcessGroup) -> Provider:
    """Listed, for those who look for it."""
    _need("ring_flash_attn", "ring-flash-attn")
    raise Absent("its one kernel, flash-attn's, runs on CUDA alone")


Build = Callable[[AttentionCase, dist.ProcessGroup], Provider]
PEERS: dict[str, Build] = {
    "by-hand": by_hand,
    "torch-ring": torch_ring,
    "deepspeed": deepspeed,
    "yunchang": yunchang,
    "ring-flash-attn": ring_flash_attn,
}
