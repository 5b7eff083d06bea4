"""A transformer layer in plain torch: whole, tensor-parallel, and sequence-parallel with collectives by hand.

It computes what ``seqpar_kernels.nn.TransformerLayer`` computes, under the same parameter names, and keeps what
Megatron keeps: each norm's input and result, the activation beside its pre-activation, a mask byte an element.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .linear_providers import LinearThenScatter, _gathered, _scattered, _weight_gradient

EPS = 1e-5
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # cut along their outputs; rows along their inputs
ROWS = ("out_proj", "down_proj")


@dataclass(frozen=True)
class LayerCase:
    """One layer: the paper's s, b, h, a; heads of keys and values; features inside the MLP."""

    kind: str
    s: int
    b: int
    h: int
    a: int
    kv: int
    f: int
    dtype: str
    p: float

    @property
    def llama(self) -> bool:
        return self.kind == "llama"

    def shape(self) -> list[int]:
        return [self.s, self.b, self.h, self.a]

    def linears(self) -> dict[str, tuple[int, int]]:
        """name -> (out, in) of the whole layer."""
        kv = self.h // self.a * self.kv
        sizes = {"q_proj": (self.h, self.h), "k_proj": (kv, self.h), "v_proj": (kv, self.h)}
        sizes |= {"out_proj": (self.h, self.h), "up_proj": (self.f, self.h), "down_proj": (self.h, self.f)}
        return sizes | ({"gate_proj": (self.f, self.h)} if self.llama else {})

    def flops(self, direction: str, ranks: int) -> int:
        """Of one rank: the linears, and the half of the scores that causal attention needs."""
        linear = sum(2 * out * into for out, into in self.linears().values()) * self.s * self.b
        attention = 2 * self.s * self.s * self.b * self.h
        return (linear + attention) // ranks * (1 if direction == "fwd" else 3)


def whole_weights(case: LayerCase, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """fp64, alike on all ranks; no vector at its initial value. A second call gives the same tensors: leave them be."""
    return _weights(case.llama, case.h, tuple(case.linears().items()), torch.device(device).type)


@functools.lru_cache(maxsize=1)
def _weights(llama: bool, h: int, linears: tuple[tuple[str, tuple[int, int]], ...], device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    found = {}
    for name in ("norm1", "norm2"):
        found[f"{name}.weight"] = 1 + random(h) / 4
        if not llama:
            found[f"{name}.bias"] = random(h) / 4
    for name, (out, into) in linears:
        found[f"{name}.weight"] = random(out, into) / into**0.5
        if not llama:
            found[f"{name}.bias"] = random(out) / 4
    return found


def part_of(name: str, whole: Tensor, ranks: int, rank: int) -> Tensor:
    """What a tensor-parallel rank has of a parameter."""
    module, leaf = name.split(".")
    if module in COLUMNS:
        return whole.chunk(ranks, 0)[rank]
    return whole.chunk(ranks, 1)[rank] if module in ROWS and leaf == "weight" else whole


class _Copy(torch.autograd.Function):
    """Identity; the backward sums over ranks."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def,override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        dy = dy.clone()
        dist.all_reduce(dy, group=ctx.group)
        return dy, None


class _Reduce(torch.autograd.Function):
    """Sums over ranks; the backward is the identity."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def,override]
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        return dy, None


class _GatherThenLinears(torch.autograd.Function):
    """One gather for linears of the same rows, again in the backward; one reduce-scatter of the sum of their dx.

    So many collectives as Megatron has with its fused QKV, and as little kept: the shard.
    """

    @staticmethod
    def forward(ctx, x, group, *weights):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, *weights)
        ctx.group = group
        whole = _gathered(x, group)
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *dys):  # type: ignore[no-untyped-def,override]
        x, *weights = ctx.saved_tensors
        whole = _gathered(x, ctx.group)
        rows = [dy.flatten(0, 1) for dy in dys]
        dx = rows[0] @ weights[0]
        for dy, weight in zip(rows[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        dweights = [_weight_gradient(dy, whole) for dy in dys]
        return _scattered(dx.view_as(whole), ctx.group), None, *dweights


class _CopyVectors(torch.autograd.Function):
    """Identity of [H] parameters; the backward sums all their gradients over ranks at once."""

    @staticmethod
    def forward(ctx, group, *params):  # type: ignore[no-untyped-def,override]
        ctx.group = group
        return tuple(param.view_as(param) for param in params)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        packed = torch.cat(grads)
        dist.all_reduce(packed, group=ctx.group)
        return None, *packed.split([grad.numel() for grad in grads])


def _rotation(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    angles = (torch.arange(length, dtype=torch.float64, device=device)[:, None] * inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """The linears and what stands between them; how a linear communicates is the layer's business."""

    def __init__(self, layer: PlainLayer):
        super().__init__()
        self.case, self.column, self.row = layer.case, layer.column, layer.row
        layer.add_linears(self, ("q_proj", "k_proj", "v_proj", "out_proj"))
        if layer.case.llama:
            cos, sin = _rotation(layer.case.s, layer.case.h // layer.case.a, layer.device)
            exact = torch.promote_types(layer.dtype, torch.float32)
            self.register_buffer("cos", cos.to(exact), persistent=False)
            self.register_buffer("sin", sin.to(exact), persistent=False)

    def _rotated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x * self.cos + turned * self.sin).to(x.dtype)

    def forward(self, y: Tensor) -> Tensor:
        """[B, S or S/t, H] -> the same"""
        size = self.case.h // self.case.a
        outs = self.column((self.q_proj, self.k_proj, self.v_proj), y)
        q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in outs)  # [B, heads/t, S, d]
        if self.case.llama:
            q, k = self._rotated(q), self._rotated(k)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.row(self.out_proj, out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, layer: PlainLayer):
        super().__init__()
        self.case, self.column, self.row = layer.case, layer.column, layer.row
        layer.add_linears(self, ("gate_proj", "up_proj", "down_proj") if self.case.llama else ("up_proj", "down_proj"))

    def forward(self, y: Tensor) -> Tensor:
        """[B, S or S/t, H] -> the same"""
        if self.case.llama:
            gate, up = self.column((self.gate_proj, self.up_proj), y)
            return self.row(self.down_proj, F.silu(gate) * up)
        (up,) = self.column((self.up_proj,), y)
        return self.row(self.down_proj, F.gelu(up))


class PlainLayer(nn.Module):
    """``mode``: "whole"; "tp" (norms and dropout on every row, all-reduces); "sp" (on a shard, gathers and scatters).

    ``partial_sums`` splits the row-parallel sums of a whole layer into so many rounded parts, as t ranks must.
    """

    def __init__(
        self,
        case: LayerCase,
        dtype: torch.dtype,
        device: str,
        mode: str = "whole",
        group: dist.ProcessGroup | None = None,
        partial_sums: int = 1,
    ):
        super().__init__()
        self.case, self.dtype, self.device = case, dtype, torch.device(device)
        self.mode, self.group, self.partial_sums = mode, group, partial_sums
        self._ranks, self._rank = (group.size(), group.rank()) if group is not None and mode != "whole" else (1, 0)
        self._weights = whole_weights(case, device)
        for name in ("norm1", "norm2"):
            norm = (nn.RMSNorm if case.llama else nn.LayerNorm)(case.h, EPS, device=device, dtype=dtype)
            self._fill(norm, name)
            setattr(self, name, norm)
        self.attention, self.mlp = Attention(self), MLP(self)
        del self._weights

    def add_linears(self, module: nn.Module, names: tuple[str, ...]) -> None:
        for name in names:
            out, into = part_of(f"{name}.weight", self._weights[f"{name}.weight"], self._ranks, self._rank).shape
            linear = nn.Linear(into, out, bias=not self.case.llama, device=self.device, dtype=self.dtype)
            self._fill(linear, name)
            module.add_module(name, linear)

    @torch.no_grad()
    def _fill(self, module: nn.Module, name: str) -> None:
        for leaf, param in module.named_parameters():
            key = f"{name}.{leaf}"
            param.copy_(part_of(key, self._weights[key], self._ranks, self._rank))

    def column(self, linears: Sequence[nn.Linear], y: Tensor) -> list[Tensor]:
        """Column-parallel, of the same rows: [B, S, F/t] each"""
        if self.mode == "whole":
            return [linear(y) for linear in linears]
        if self.mode == "tp":
            y = _Copy.apply(y, self.group)
            return [F.linear(y, linear.weight, linear.bias) for linear in linears]
        outs = _GatherThenLinears.apply(y, self.group, *(linear.weight for linear in linears))
        pairs = zip(outs, linears, strict=True)
        return [out if linear.bias is None else out + linear.bias for out, linear in pairs]

    def row(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Row-parallel: [B, S or S/t, H]"""
        if self.partial_sums > 1:
            pairs = zip(x.chunk(self.partial_sums, -1), linear.weight.chunk(self.partial_sums, 1), strict=True)
            parts = [F.linear(a, w) for a, w in pairs]
            out = sum(parts[1:], parts[0])
        elif self.mode == "whole":
            return linear(x)
        elif self.mode == "tp":
            out = _Reduce.apply(F.linear(x, linear.weight), self.group)
        else:
            out = LinearThenScatter.apply(x, linear.weight, self.group)
        return out if linear.bias is None else out + self._shared(linear.bias)

    def _share(self) -> None:
        """Before a forward: what each rank uses on its own rows, its gradients to be summed over ranks."""
        modules = (self.norm1, self.norm2, self.attention.out_proj, self.mlp.down_proj)
        params = [p for module in modules for p in module.parameters() if p.dim() == 1]
        self._copies = dict(zip(params, _CopyVectors.apply(self.group, *params), strict=True))

    def _shared(self, param: Tensor) -> Tensor:
        return self._copies[param] if self.mode == "sp" else param

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        if self.mode != "sp":
            return norm(x)
        weight = self._shared(norm.weight)
        if self.case.llama:
            return F.rms_norm(x, weight.shape, weight, EPS)
        return F.layer_norm(x, weight.shape, weight, self._shared(norm.bias), EPS)

    def _dropped(self, x: Tensor) -> Tensor:
        # What F.dropout is on a GPU; on a CPU that keeps two bytes an element for the mask.
        return torch.native_dropout(x, self.case.p, True)[0] if self.case.p else x

    def forward(self, x: Tensor) -> Tensor:
        """[B, S or S/t, H] -> the same"""
        if self.mode == "sp":
            self._share()
        x = x + self._dropped(self.attention(self._norm(self.norm1, x)))
        return x + self._dropped(self.mlp(self._norm(self.norm2, x)))

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Under the names of ``seqpar_kernels.nn.TransformerLayer``."""
        return {".".join(name.split(".")[-2:]): param for name, param in self.named_parameters()}
