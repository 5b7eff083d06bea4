"""Attention over a whole sequence in plain torch, and the same over shards: results and gradients of both."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import attention_reference
from seqpar_kernels.kernels.attention_spec import AttentionMasks, AttentionSpec
from seqpar_kernels.kernels.spec import dropout_scale

from ..oracle import assert_within_budget

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SEED = -0x123456789ABCDEF
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks", "dbias")


class Problem:
    """Whole tensors, alike on all ranks, and options of sequence_parallel_attention."""

    def __init__(
        self,
        rows: tuple[int, int] = (37, 37),
        heads: tuple[int, int] = (4, 2),
        dims: tuple[int, int] = (16, 8),
        dtype: torch.dtype = F32,
        batch: int = 2,
        *,
        sinks: bool = False,
        bias: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ):
        g = torch.Generator().manual_seed(rows[0] * 31 + rows[1])

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=F64).to(dtype)

        self.dtype, self.options = dtype, options
        self.q, self.dout = made(batch, rows[0], heads[0], dims[0]), made(batch, rows[0], heads[0], dims[1])
        self.k, self.v = made(batch, rows[1], heads[1], dims[0]), made(batch, rows[1], heads[1], dims[1])
        self.dlse = made(batch, heads[0], rows[0]).to(F64 if dtype == F64 else F32)
        self.sinks = made(heads[0]) if sinks else None
        self.bias = made(*bias).float() if bias else None
        self.mask = mask
        self._found: dict[tuple[torch.dtype, bool], dict[str, Tensor]] = {}

    @property
    def layout(self) -> str:
        return str(self.options.get("layout", "contiguous"))

    def seen(self) -> Tensor:
        """[B, Hq, Sq, Sk]"""
        q_len, k_len = self.q.shape[1], self.k.shape[1]
        rows, keys = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)
        left, right = self.options.get("window_size", (-1, -1))
        right = 0 if self.options.get("is_causal") else right
        see = torch.ones(q_len, k_len, dtype=torch.bool)
        if left >= 0:
            see = see & (keys >= rows - left)
        if right >= 0:
            see = see & (keys <= rows + right)
        ends = self.options.get("cu_seqlens")
        if ends is not None:
            documents = torch.searchsorted(ends[1:], torch.arange(q_len), right=True)
            see = see & (documents[:, None] == documents)
        see = see.expand(self.q.shape[0], self.q.shape[2], -1, -1)
        return see if self.mask is None else see & self.mask

    def plain(self, dtype: torch.dtype, with_lse: bool = False) -> dict[str, Tensor]:
        """PyTorch in ``dtype``: SDPA where it can, else operation by operation."""
        wide = F64 if dtype == F64 else F32
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.q, self.k, self.v)]
        sinks = None if self.sinks is None else self.sinks.detach().to(dtype).requires_grad_()
        bias = None if self.bias is None else self.bias.detach().to(wide).requires_grad_()
        group = self.q.shape[2] // self.k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in leaves)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        see, cap = self.seen(), self.options.get("softcap", 0.0)
        scale = self.options.get("scale") or self.q.shape[3] ** -0.5
        p = self.options.get("dropout_p", 0.0)

        def scores(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
            s = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
            s = torch.tanh(s / cap) * cap if cap else s
            s = s if bias is None else s + bias.to(dtype)
            s = s.masked_fill(~see, -math.inf)
            return s if sinks is None else torch.cat([s, sinks.to(dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)

        lse = torch.logsumexp(scores(q, k, wide), -1)
        if dtype not in (F32, F64) and not (cap or p or sinks is not None or with_lse):
            width = max(q.shape[-1], v.shape[-1])
            padded = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
            added = torch.zeros(see.shape, dtype=dtype) if bias is None else bias.to(dtype).expand(see.shape)
            out = F.scaled_dot_product_attention(*padded, added.masked_fill(~see, -math.inf), scale=scale)
            out = out[..., : v.shape[-1]].nan_to_num(0)
        else:
            weights = torch.softmax(scores(q, k, dtype), -1)[..., : see.shape[-1]].masked_fill(~see, 0)
            if p:
                spec = AttentionSpec(1.0, p=p, all_heads=q.shape[1], all_rows=q.shape[2])
                masks = AttentionMasks(seed=torch.tensor(SEED))
                kept = attention_reference.kept(spec, masks, tuple(see.shape), q.device)
                weights = torch.where(kept, weights * dropout_scale(p), 0)
            out = weights @ v
        blind = lse == -math.inf
        inputs = [*leaves, *(t for t in (sinks, bias) if t is not None)]
        results, upstream = [out], [self.dout.to(dtype).transpose(1, 2).masked_fill(blind[..., None], 0)]
        if with_lse:
            results.append(lse)
            upstream.append(self.dlse.to(wide).masked_fill(blind, 0))
        grads = [g.nan_to_num(0) for g in torch.autograd.grad(results, inputs, upstream)]
        found = {"out": out.detach().transpose(1, 2), "lse": lse.detach()}
        found.update(zip(("dq", "dk", "dv"), grads))
        if sinks is not None:
            found["dsinks"] = grads[3]
        if bias is not None:
            found["dbias"] = grads[-1]
        return found

    def shard(self, t: Tensor, dim: int, group: Any) -> Tensor:
        return sp.shard_sequence(t, group, dim, layout=self.layout)

    def sharded(self, group: dist.ProcessGroup | None, with_lse: bool = False, **asked: Any) -> dict[str, Tensor]:
        """This rank's rows of everything; sums over ranks of what is replicated."""
        q, k, v = (self.shard(t, 1, group).detach().clone().requires_grad_() for t in (self.q, self.k, self.v))
        inputs, extra = [q, k, v], {}
        if self.sinks is not None:
            extra["sinks"] = self.sinks.detach().clone().requires_grad_()
        attn = self.bias if self.mask is None else self.mask
        if attn is not None:
            attn = attn if attn.shape[-2] == 1 else self.shard(attn, -2, group)
            extra["attn_bias"] = attn.detach().clone().requires_grad_(attn.is_floating_point())
        inputs += [t for t in extra.values() if t.requires_grad]
        lengths = dict(seq_len=self.q.shape[1], kv_seq_len=self.k.shape[1])
        found = sp.sequence_parallel_attention(
            q, k, v, group=group, **lengths, **extra, **self.options, **asked, return_lse=True, seed=SEED
        )
        out, lse = found
        blind = lse.detach() == -math.inf
        dout = self.shard(self.dout, 1, group).masked_fill(blind.transpose(1, 2)[..., None], 0)
        results, upstream = [out], [dout]
        if with_lse:
            results.append(lse)
            upstream.append(self.shard(self.dlse, 2, group).masked_fill(blind, 0))
        grads = torch.autograd.grad(results, inputs, upstream)
        names = ["dq", "dk", "dv", *(["dsinks"] if "sinks" in extra else []), "dbias"]
        got = dict(zip(names, grads)) | {"out": out.detach(), "lse": lse.detach()}
        for name in ("dsinks", "dbias"):
            if name in got and (name == "dsinks" or extra["attn_bias"].shape[-2] == 1):
                got[name] = sp.reduce_from_tensor_parallel(got[name], group)
        return got

    def check(self, group: dist.ProcessGroup | None, with_lse: bool = False, **asked: Any) -> dict[str, Tensor]:
        """Errors against fp64 are at most twice those of PyTorch in the same dtype."""
        got = self.sharded(group, with_lse, **asked)
        for dtype in (F64, self.dtype):
            if (dtype, with_lse) not in self._found:
                self._found[dtype, with_lse] = self.plain(dtype, with_lse)
        exact, plain = self._found[F64, with_lse], self._found[self.dtype, with_lse]
        for name in NAMES:
            assert (name in got) == (name in exact), name
            if name not in got:
                continue
            mine, theirs, true = got[name], plain[name], exact[name]
            if name not in ("dsinks",) and not (name == "dbias" and true.shape[-2] == 1):
                dim = {"lse": 2, "dbias": -2}.get(name, 1)
                theirs, true = self.shard(theirs, dim, group), self.shard(true, dim, group)
            if name == "lse":
                assert torch.equal(mine == -math.inf, true == -math.inf)
                mine, theirs, true = (t.masked_fill(true == -math.inf, 0) for t in (mine, theirs, true))
            what = f"{name} of {self.options} {asked} {tuple(self.q.shape)}, {tuple(self.k.shape)}, {self.dtype}"
            magnitude = 16.0 if self.dtype == F64 else 4.0
            if true.numel():
                assert_within_budget(mine, theirs, true, what, magnitude)
        return got
