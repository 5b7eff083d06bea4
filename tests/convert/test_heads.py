"""Head counts that nobody divided, and packed projections cut as one: refused by the attribute, never wrong heads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.convert import ParallelPlan

from ..world import World
from .models import assert_trains_alike, group

WIDTH, HEADS, KV = 32, 4, 2
Heads = Callable[["Attention", Tensor], Tensor]


class Attention(nn.Module):
    """``heads(self, t)`` gives [B, heads, S, head_dim] from a projection."""

    def __init__(self, heads: Heads, kv: int = HEADS):
        super().__init__()
        self.heads_of = heads
        self.n_head, self.n_kv, self.head_dim, self.hidden = HEADS, kv, WIDTH // HEADS, WIDTH
        self.config = SimpleNamespace(n_heads=HEADS, depth=2)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH * kv // HEADS), nn.Linear(WIDTH, WIDTH * kv // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads_of(self, t) for t in (self.q(x), self.k(x), self.v(x)))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """``parts(self, qkv)`` gives q, k, v of a packed projection."""

    def __init__(self, parts: Callable[[Packed, Tensor], Any]):
        super().__init__()
        self.parts = parts
        self.n_head, self.head_dim, self.hidden = HEADS, WIDTH // HEADS, WIDTH
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self, self.qkv(x))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate = gate
        self.w12, self.o = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.gate(self.w12(x)))


class Mlp(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.act = act
        self.up, self.o = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.act(self.up(x)))


class Core(nn.Module):
    """Attention with a parameter of its own, for its heads alone."""

    def __init__(self, size: int = -1):
        super().__init__()
        self.n_head, self.size, self.gain = HEADS, size, nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = -1 if self.size > 0 else self.n_head
        q, k, v = (t.view(*t.shape[:2], count, self.size).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q * self.gain, k, v).transpose(1, 2).flatten(2)


class WithCore(nn.Module):
    def __init__(self, size: int = -1):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.core = Core(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.core(self.q(x), self.k(x), self.v(x)))


class Normalizing(nn.Module):
    """Over all that a rank has: not what the whole model does."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / (x.pow(2).mean(-1, keepdim=True) + 1).sqrt()


class Normalized(Mlp):
    def __init__(self) -> None:
        super().__init__(lambda t: t)
        self.act = Normalizing()


class HeadNorm(nn.Module):
    """Of [B, heads, S, head_dim], over ``dims``."""

    def __init__(self, dims: tuple[int, ...]):
        super().__init__()
        self.dims, self.gain = dims, nn.Parameter(torch.rand(WIDTH // HEADS) + 0.5)

    def forward(self, q: Tensor) -> Tensor:
        return q * self.gain / (q.pow(2).mean(self.dims, keepdim=True) + 1e-3).sqrt()


class WithNorm(Attention):
    def __init__(self, dims: tuple[int, ...]):
        super().__init__(lambda m, t: m.norm(_view(m, t)))
        self.norm = HeadNorm(dims)


class Block(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def model_of(make: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Block(make()), Block(make()), nn.LayerNorm(WIDTH))


def plan_of(styles: dict[str, str], divided: tuple[str, ...] = ()) -> ParallelPlan:
    ends = {"0": "scatter_input", "*.norm": "norm", "2": "norm+gather_output"}
    inner = {f"*.inner.{name}": style for name, style in styles.items()}
    return ParallelPlan({**ends, **inner}, divided={"*.inner": divided} if divided else {})


QKV = {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}
PACKED1, PACKED3 = {"qkv": "colwise", "o": "rowwise"}, {"qkv": "colwise:3", "o": "rowwise"}
HIDDEN1, HIDDEN2 = {"w12": "colwise", "o": "rowwise"}, {"w12": "colwise:2", "o": "rowwise"}
MLP = {"up": "colwise", "o": "rowwise"}


def _view(m: Attention, t: Tensor) -> Tensor:
    return t.view(*t.shape[:2], m.n_head, -1).transpose(1, 2)


def _kv_view(m: Attention, t: Tensor) -> Tensor:
    count = m.n_head if t.shape[-1] * m.n_kv > t.shape[-1] * m.n_head else m.n_kv
    return t.view(*t.shape[:2], count, -1).transpose(1, 2)


def _permuted(m: Packed, qkv: Tensor) -> Any:
    return qkv.reshape(*qkv.shape[:2], 3, m.n_head, m.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def _chunked(m: Packed, qkv: Tensor) -> Any:
    return (t.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for t in qkv.chunk(3, -1))


def _interleaved(m: Packed, qkv: Tensor) -> Any:
    return qkv.view(*qkv.shape[:2], m.n_head, 3 * m.head_dim).transpose(1, 2).chunk(3, -1)


Case = tuple[Callable[[], nn.Module], dict[str, str], tuple[str, ...]]
WRONG: dict[str, tuple[Case, str]] = {
    "view": ((lambda: Attention(_view), QKV, ()), "'n_head'"),
    "unflatten": (
        (lambda: Attention(lambda m, t: t.unflatten(-1, (m.n_head, -1)).transpose(1, 2)), QKV, ()), "'n_head'"),
    "reshape": (
        (lambda: Attention(lambda m, t: t.reshape(t.size(0), t.size(1), m.n_head, -1).transpose(1, 2)), QKV, ()),
        "'n_head'"),
    "divided size": (
        (lambda: Attention(lambda m, t: t.view(*t.shape[:2], m.n_head, t.shape[-1] // m.n_head).mT.mT.transpose(1, 2)),
         QKV, ()), "'n_head'"),
    "inferred count": (
        (lambda: Attention(lambda m, t: t.view(*t.shape[:2], -1, t.size(-1) // m.n_head).transpose(1, 2)), QKV, ()),
        "'n_head'"),
    "config": (
        (lambda: Attention(lambda m, t: t.view(*t.shape[:2], m.config.n_heads, -1).transpose(1, 2)), QKV, ()),
        "'config.n_heads'"),
    "literal": (
        (lambda: Attention(lambda m, t: t.view(*t.shape[:2], 4, -1).transpose(1, 2)), QKV, ()), "'n_head'"),
    "merged rows": (
        (lambda: Attention(lambda m, t: t.reshape(-1, m.n_head, t.shape[-1] // m.n_head).view(
            t.shape[0], -1, m.n_head, t.shape[-1] // m.n_head).transpose(1, 2)), QKV, ()), "'n_head'"),
    "key heads": (
        (lambda: Attention(lambda m, t: t.view(*t.shape[:2], m.n_kv if t is not None else 0, -1).transpose(1, 2)),
         QKV, ("n_head",)), "'n_kv'"),
    "features moved first": (
        (lambda: Attention(lambda m, t: t.mT.unflatten(1, (m.n_head, -1)).mT), QKV, ()), "'n_head'"),
    "one head": ((lambda: Attention(lambda m, t: t.unsqueeze(1)), QKV, ()), "mixes them"),
    "packed as one": ((lambda: Packed(_permuted), PACKED1, ("n_head",)), "inner.qkv"),
    "packed as one, chunk": ((lambda: Packed(_chunked), PACKED1, ()), "'colwise:3'"),
    "packed as one, split": (
        (lambda: Packed(lambda m, t: (u.unflatten(-1, (-1, m.head_dim)).transpose(1, 2)
                                      for u in t.split(t.shape[-1] // 3, -1))), PACKED1, ()), "'colwise:3'"),
    "packed as one, slices": (
        (lambda: Packed(lambda m, t: (t[..., i * t.shape[-1] // 3 : (i + 1) * t.shape[-1] // 3].unflatten(
            -1, (-1, m.head_dim)).transpose(1, 2) for i in range(3))), PACKED1, ()), "'colwise:3'"),
    "interleaved as sections": ((lambda: Packed(_interleaved), PACKED3, ("n_head",)), "3 sections"),
    "sections of all ranks": (
        (lambda: Packed(lambda m, t: [t[..., : m.hidden].unflatten(-1, (-1, m.head_dim)).transpose(1, 2)] * 3),
         PACKED3, ("n_head",)), "'hidden'"),
    "gate as one": ((lambda: Gated(lambda t: F.silu(t.chunk(2, -1)[0]) * t.chunk(2, -1)[1]), HIDDEN1, ()), "colwise:3"),
    "gate as one, glu": ((lambda: Gated(lambda t: F.glu(t, -1)), HIDDEN1, ()), "mixes them"),
    "softmax of features": ((lambda: Mlp(lambda t: t.softmax(-1)), MLP, ()), "mixes them"),
    "norm of features": ((lambda: Mlp(lambda t: F.rms_norm(t, t.shape[-1:])), MLP, ()), "mixes them"),
    "in a tensor_parallel module": ((lambda: WithCore(), {**QKV, "core": "tensor_parallel"}, ()), "'n_head'"),
    "norm in a tensor_parallel module": ((lambda: Normalized(), {**MLP, "act": "tensor_parallel"}, ()), "mixes them"),
    "gate, flipped": ((lambda: Gated(lambda t: F.glu(t.flip(-1), -1)), HIDDEN2, ()), "mixes them"),
    "one of the heads split off": (
        (lambda: Attention(lambda m, t: torch.stack([t.split(m.head_dim, -1)[0]] * 2, 1)), QKV, ()), "head 0 of the 2"),
    "heads by split, exchanged": (
        (lambda: Attention(lambda m, t: torch.stack(t.split(m.head_dim, -1)[::-1], 1)), QKV, ()), "of the 2"),
    "heads as strides": (
        (lambda: Attention(lambda m, t: t.as_strided(
            (*t.shape[:2], 4, t.shape[-1] // 4),
            (t.shape[1] * t.shape[2], t.shape[2], t.shape[-1] // 4, 1)).transpose(1, 2)), QKV, ()), "'n_head'"),
    "norm over heads in a tensor_parallel module": (
        (lambda: WithNorm((1, 3)), {**QKV, "norm": "tensor_parallel"}, ("n_head",)), "it mixes them"),
    "width of features": ((lambda: Mlp(lambda t: F.relu(t) / t.shape[-1] ** 0.5), MLP, ()), "`divided`"),
    "positions of features": (
        (lambda: Mlp(lambda t: t * torch.arange(t.shape[-1])), MLP, ()), "numbered by this rank's heads or features"),
    "mean of features": ((lambda: Mlp(lambda t: t - t.mean(-1, keepdim=True)), MLP, ()), "mixes them"),
}  # fmt: skip

RIGHT: dict[str, Case] = {
    "divided": (lambda: Attention(_view), QKV, ("n_head",)),
    "config divided": (
        lambda: Attention(lambda m, t: t.view(*t.shape[:2], m.config.n_heads, -1).transpose(1, 2)), QKV,
        ("config.n_heads",)),
    "head size": (lambda: Attention(lambda m, t: t.view(*t.shape[:2], -1, m.head_dim).transpose(1, 2)), QKV, ()),
    "counted": (
        lambda: Attention(lambda m, t: t.view(*t.shape[:2], t.size(-1) // m.head_dim, m.head_dim).transpose(1, 2)),
        QKV, ()),
    "size from divided": (
        lambda: Attention(lambda m, t: t.view(*t.shape[:2], m.n_head, t.shape[-1] // m.n_head).transpose(1, 2)), QKV,
        ("n_head",)),
    "size of all": (
        lambda: Attention(lambda m, t: t.unflatten(-1, (-1, m.hidden // HEADS)).transpose(1, 2)), QKV, ()),
    "both": (
        lambda: Attention(lambda m, t: t.view(*t.shape[:2], m.n_head, m.head_dim).transpose(1, 2)), QKV, ("n_head",)),
    "grouped": (
        lambda: Attention(lambda m, t: t.view(*t.shape[:2], -1, m.head_dim).transpose(1, 2), KV), QKV, ()),
    "features moved first": (
        lambda: Attention(lambda m, t: t.mT.unflatten(1, (m.n_head, -1)).mT), QKV, ("n_head",)),
    "packed": (lambda: Packed(_permuted), PACKED3, ("n_head",)),
    "packed, chunk": (lambda: Packed(_chunked), PACKED3, ()),
    "packed, split": (
        lambda: Packed(lambda m, t: (u.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for u in t.split(m.hidden, -1))),
        PACKED3, ("hidden",)),
    "interleaved": (lambda: Packed(_interleaved), PACKED1, ("n_head",)),
    "gate": (lambda: Gated(lambda t: F.silu(t.chunk(2, -1)[0]) * t.chunk(2, -1)[1]), HIDDEN2, ()),
    "gate, unflatten": (
        lambda: Gated(lambda t: t.unflatten(-1, (2, -1))[..., 0, :].sigmoid() * t.unflatten(-1, (2, -1))[..., 1, :]),
        HIDDEN2, ()),
    "elementwise": (lambda: Mlp(lambda t: F.gelu(t.float()).clamp(max=3) * t.sigmoid() + torch.ones_like(t)), MLP, ()),
    "sums of rows": (lambda: Mlp(lambda t: t - t.mean(1, keepdim=True) + t.cumsum(1)), MLP, ()),
    "dropout": (lambda: Mlp(nn.Dropout(0.0)), MLP, ()),
    "tensor_parallel module": (lambda: WithCore(WIDTH // HEADS), {**QKV, "core": "tensor_parallel"}, ()),
    "put together": (
        lambda: Attention(
            lambda m, t: torch.cat([t, t], -1).unflatten(-1, (2, -1, m.head_dim))[:, :, 0].transpose(1, 2)), QKV, ()),
    "gate, glu": (lambda: Gated(lambda t: F.glu(t, -1)), HIDDEN2, ()),
    "gate, sections exchanged": (lambda: Gated(lambda t: F.glu(torch.cat(t.chunk(2, -1)[::-1], -1), -1)), HIDDEN2, ()),
    "heads by split": (lambda: Attention(lambda m, t: torch.stack(t.split(m.head_dim, -1), 1)), QKV, ()),
    "heads by chunk": (lambda: Attention(lambda m, t: torch.stack(t.chunk(m.n_head, -1), 1)), QKV, ("n_head",)),
    "heads by split, each changed": (
        lambda: Attention(lambda m, t: torch.cat(
            [F.normalize(u, dim=-1) for u in t.split(m.head_dim, -1)], -1).unflatten(
                -1, (-1, m.head_dim)).transpose(1, 2)), QKV, ()),
    "norm of its own heads": (lambda: WithNorm((-1,)), {**QKV, "norm": "tensor_parallel"}, ("n_head",)),
    "groups of features": (lambda: Mlp(lambda t: t.unflatten(-1, (-1, 4)).softmax(-1).flatten(-2)), MLP, ()),
}  # fmt: skip


def wrong_case() -> dict[str, str]:
    messages = {}
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    for name, ((make, styles, divided), _) in WRONG.items():
        model = sp.parallelize(model_of(make), group(), plan_of(styles, divided))
        with pytest.raises(RuntimeError) as caught:
            model(x)
        messages[name] = str(caught.value)
        attributes = vars(model[0].inner).values()  # type: ignore[union-attr]
        assert all(type(value) is int for value in attributes if isinstance(value, int) and value is not bool(value))
    return messages


def test_undivided_heads_are_refused_by_the_attribute(world2: World) -> None:
    for messages in world2.run(wrong_case):
        for name, text in messages.items():
            assert WRONG[name][1] in text and "test_heads.py:" in text and "0.inner" in text, (name, text)


def right_case() -> None:
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    for name, (make, styles, divided) in RIGHT.items():
        plain, model = model_of(make), sp.parallelize(model_of(make), group(), plan_of(styles, divided))
        assert_trains_alike(name, plain, model, x)


def test_divided_heads_and_head_sizes_are_right(world2: World) -> None:
    world2.run(right_case)


def dropout_case() -> None:
    """Each rank drops of its own features."""
    model = sp.parallelize(model_of(lambda: Mlp(nn.Dropout(0.5))), group(), plan_of(MLP))
    x = torch.randn(2, 7, WIDTH)
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), first)  # the check of the first forward draws nothing


def test_dropout_of_features_is_each_ranks_own(world2: World) -> None:
    world2.run(dropout_case)
