"""A mixture of experts and its inputs, unsharded in fp64 and plain PyTorch, and what each rank has of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp

from ..oracle import assert_within_budget

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}
NAMES = ("x", "weights", "w1", "w2", "b1", "b2")


class Problem:
    """``tokens``: of each rank in turn; ``choose(T, E, K)``: the experts of each token."""

    def __init__(
        self,
        tokens: tuple[int, ...],
        experts: int = 6,
        top_k: int = 2,
        features: int = 20,
        inner: int = 14,
        dtype: torch.dtype = F32,
        biases: bool = False,
        transposed: bool = False,
        choose: str = "random",
        **options: Any,
    ):
        generator = torch.Generator().manual_seed(sum(tokens) * 31 + experts)

        def made(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=F64) * scale).to(dtype)

        self.tokens, self.experts, self.dtype, self.options = tokens, experts, dtype, options
        self.transposed = transposed
        total, width = sum(tokens), 2 * inner if options.get("gated", True) else inner
        self.tensors = {
            "x": made(total, features),
            "weights": torch.rand(total, top_k, generator=generator, dtype=F64).to(F64 if dtype == F64 else F32),
            "w1": made(experts, width, features, scale=features**-0.5),
            "w2": made(experts, features, inner, scale=inner**-0.5),
        }
        if biases:
            self.tensors |= {"b1": made(experts, width), "b2": made(experts, features)}
        self.dout = made(total, features)
        self.index = torch.rand(total, experts, generator=generator).argsort(1)[:, :top_k]
        match choose:
            case "one":
                self.index = torch.full_like(self.index, experts - 1)
            case "some":  # no expert at all, on some tokens and in some places
                self.index[::3] = experts
                self.index[1::4, 0] = -1
            case "first":
                self.index = self.index % max(1, experts // 3)

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """out and gradients in plain PyTorch, one expert after the other."""
        t = {name: value.to(dtype).requires_grad_() for name, value in self.tensors.items()}
        options = self.options
        out = torch.zeros_like(t["x"])
        for e in range(self.experts):
            token, k = (self.index == e).nonzero(as_tuple=True)
            h = t["x"][token] @ t["w1"][e].t()
            if "b1" in t:
                h = h + t["b1"][e]
            name, limit, alpha = options.get("activation", "silu"), options.get("limit"), options.get("alpha", 1.0)
            if options.get("gated", True):
                gate, up = (h[:, ::2], h[:, 1::2]) if options.get("interleaved") else h.chunk(2, -1)
                if limit is not None:
                    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                a = gate * torch.sigmoid(alpha * gate) if alpha != 1.0 else FUNCTIONS[name](gate)
                a = a * (up + options.get("up_shift", 0.0))
            else:
                a = FUNCTIONS[name](h)
            y = a @ t["w2"][e].t()
            if "b2" in t:
                y = y + t["b2"][e]
            out = out.index_add(0, token, (y * t["weights"][token, k, None].to(dtype)))
        grads = torch.autograd.grad(out, list(t.values()), self.dout.to(dtype))
        return {"out": out.detach()} | dict(zip(t, grads, strict=True))

    def mine(self, name: str, whole: Tensor, group: dist.ProcessGroup | None, way: str) -> Tensor:
        """What this rank has of one of the tensors, or of its gradient."""
        if group is None:
            return whole
        ranks, rank = group.size(), group.rank()
        if name in ("out", "x", "weights", "index", "dout"):
            return whole.split(list(self.tokens))[rank]
        if way == "ep":
            return whole.tensor_split(ranks)[rank]
        if name == "b2":
            return whole
        if name == "w2":
            return whole.tensor_split(ranks, 2)[rank]
        gated, interleaved = self.options.get("gated", True), self.options.get("interleaved", False)
        if not gated:
            return whole.tensor_split(ranks, 1)[rank]
        if interleaved:
            return whole.unflatten(1, (-1, 2)).tensor_split(ranks, 1)[rank].flatten(1, 2)
        return torch.cat([part.tensor_split(ranks, 1)[rank] for part in whole.chunk(2, 1)], 1)

    def sharded(self, group: dist.ProcessGroup | None, way: str = "ep", **asked: Any) -> dict[str, Tensor]:
        """out and gradients of this rank, by moe_mlp."""
        t = {name: self.mine(name, value, group, way).clone() for name, value in self.tensors.items()}
        leaves = {name: value.requires_grad_() for name, value in t.items()}
        if self.transposed:
            leaves |= {n: t[n].detach().transpose(1, 2).contiguous().requires_grad_() for n in ("w1", "w2")}
        given = {n: v.transpose(1, 2) if self.transposed and n in ("w1", "w2") else v for n, v in leaves.items()}
        out = sp.moe_mlp(
            given["x"],
            self.mine("index", self.index, group, way),
            given["weights"],
            given["w1"],
            given["w2"],
            given.get("b1"),
            given.get("b2"),
            group=group,
            num_experts=self.experts,
            experts=way,
            **self.options,
            **asked,
        )
        dout = self.mine("dout", self.dout, group, way)
        grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))
        if self.transposed:
            grads |= {n: grads[n].transpose(1, 2) for n in ("w1", "w2")}
        return {"out": out.detach()} | grads

    def check(self, group: dist.ProcessGroup | None, way: str = "ep", **asked: Any) -> None:
        got, oracle, reference = self.sharded(group, way, **asked), self.plain(F64), self.plain(self.dtype)
        for name, value in got.items():
            want, same = (self.mine(name, found[name], group, way) for found in (oracle, reference))
            # What cancels in a sum is as large as the largest of all ranks' entries. In fp64 the oracle is no better.
            magnitude = float(oracle[name].abs().max()) if oracle[name].numel() else 0.0
            magnitude *= 16 if self.dtype == F64 else 1
            assert_within_budget(value, same, want, f"{name} by {way} {asked}", magnitude)
