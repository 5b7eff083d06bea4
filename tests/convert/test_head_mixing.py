"""What mixes, picks or numbers this rank's heads is refused by its statement; what treats each alike stays right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.convert import ParallelPlan

from ..world import World
from .models import assert_trains_alike, group
from .test_heads import HEADS, WIDTH, model_of

SIZE = WIDTH // HEADS
Change = Callable[["Attention", Tensor, Tensor, Tensor], Any]


def _plain(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Attention(nn.Module):
    """``core`` makes [B, heads, S, head_dim] of q, k, v; ``after`` changes that, merged."""

    def __init__(
        self, core: Change = _plain, after: Callable[[Attention, Tensor], Tensor] | None = None, kv: int = HEADS
    ):
        super().__init__()
        self.core, self.after = core, after
        self.num_heads, self.num_kv, self.all_heads, self.head_dim, self.hidden = HEADS, kv, HEADS, SIZE, WIDTH
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v, self.gate = nn.Linear(WIDTH, kv * SIZE), nn.Linear(WIDTH, kv * SIZE), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.gated = self.gate(x)
        y = self.core(self, q, k, v).transpose(1, 2).flatten(2)
        return self.o(y if self.after is None else self.after(self, y))


PLAN = ParallelPlan(
    {
        "0": "scatter_input",
        "*.norm": "norm",
        **{f"*.inner.{name}": "colwise" for name in ("q", "k", "v", "gate")},
        "*.inner.o": "rowwise",
        "*.inner": "whole_input",
        "2": "norm+gather_output",
    },
    divided={"*.inner": ("num_heads", "num_kv", "hidden")},
    cut={"*.inner": ("gain",)},
)


def _mid(change: Callable[[Attention, Tensor], Tensor]) -> Callable[[], Attention]:
    return lambda: Attention(lambda m, q, k, v: change(m, _plain(m, q, k, v)))


def _pre(change: Callable[[Attention, Tensor], Tensor]) -> Callable[[], Attention]:
    return lambda: Attention(lambda m, q, k, v: _plain(m, change(m, q), k, v))


def _after(change: Callable[[Attention, Tensor], Tensor]) -> Callable[[], Attention]:
    return lambda: Attention(after=change)


def _eager(m: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """As Transformers' eager attention: repeat_kv, a mask, fp32 softmax."""
    groups = q.shape[1] // k.shape[1]
    k, v = (
        t[:, :, None].expand(t.shape[0], t.shape[1], groups, *t.shape[2:]).reshape(t.shape[0], -1, *t.shape[2:])
        for t in (k, v)
    )
    scores = torch.matmul(q, k.transpose(2, 3)) * m.head_dim**-0.5
    scores = scores + torch.full(scores.shape[-2:], torch.finfo(q.dtype).min).triu(1)[None, None]
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), p=0.0, training=True)
    return torch.matmul(weights, v)


def _rope(t: Tensor) -> Tensor:
    angle = torch.arange(t.shape[2])[:, None] * torch.linspace(0.1, 1.0, SIZE // 2).repeat(2)
    half = torch.cat((-t[..., SIZE // 2 :], t[..., : SIZE // 2]), dim=-1)
    return t * angle.cos()[None, None] + half * angle.sin()[None, None]


def _alibi(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = 2.0 ** (-8.0 / m.num_heads * torch.arange(1, m.num_heads + 1))
    rel = torch.arange(q.shape[2])[None] - torch.arange(q.shape[2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(slopes[:, None, None] * rel).masked_fill(rel > 0, -1e9))


def _grouped(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (m.num_kv, -1))
    scores = torch.einsum("bkgsd,bktd->bkgst", q, k) / math.sqrt(m.head_dim)
    return torch.einsum("bkgst,bktd->bkgsd", scores.softmax(-1), v).flatten(1, 2)


def _bmm(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = q.shape
    q, k, v = (t.reshape(t.shape[0] * m.num_heads, -1, m.head_dim) for t in (q, k, v))
    scores = torch.baddbmm(
        torch.zeros(q.shape[0], q.shape[1], k.shape[1]), q, k.transpose(1, 2), alpha=m.head_dim**-0.5
    )
    return torch.bmm(scores.softmax(-1), v).view(shape)


def _each_head(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([_plain(m, *(t.unsqueeze(1) for t in each)).squeeze(1) for each in zip(
        q.unbind(1), k.unbind(1), v.unbind(1), strict=True)], 1)  # fmt: skip


def _into_a_buffer(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros(q.shape[0], m.num_heads, *q.shape[2:])
    out[:, :, 1:] = _plain(m, q, k, v)[:, :, 1:]
    return out


def _indexed(m: Attention, y: Tensor) -> Tensor:
    return y[:, torch.arange(y.shape[1])]


def _swapped(m: Attention, y: Tensor) -> Tensor:
    heads = list(y.unbind(1))
    return torch.stack(heads[::-1], 1)


MIXING: dict[str, Callable[[], Attention]] = {
    "ALiBi": lambda: Attention(_alibi),
    "slopes by a shape": _mid(lambda m, y: y * (1 + torch.arange(y.shape[1]).float())[None, :, None, None]),
    "slopes of a whole buffer": _mid(lambda m, y: y * torch.linspace(0, 1, HEADS)[: m.num_heads, None, None]),
    "rms_norm of merged heads": _after(lambda m, y: F.rms_norm(y, y.shape[-1:])),
    "layer_norm of merged heads": _after(lambda m, y: F.layer_norm(y, y.shape[-1:])),
    "norm by hand": _after(lambda m, y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "normalize": _after(lambda m, y: F.normalize(y, dim=-1)),
    "softmax of merged heads": _after(lambda m, y: y.softmax(-1)),
    "largest of all": _after(lambda m, y: y / y.abs().max()),
    "largest of all, read": _after(lambda m, y: y / y.abs().max().item()),
    "mean of heads": _mid(lambda m, y: y - y.mean(1, keepdim=True)),
    "norm over heads and features": _pre(lambda m, q: q / (q.pow(2).mean((1, 3), keepdim=True) + 1e-3).sqrt()),
    "std": _pre(lambda m, q: q / q.std()),
    "roll": _mid(lambda m, y: y.roll(1, 1) + y),
    "first head": _mid(lambda m, y: y * torch.sigmoid(y[:, :1])),
    "second to last head": _mid(lambda m, y: y + y[:, -1].unsqueeze(1)),
    "talking heads": _mid(lambda m, y: torch.einsum("bhnd,hg->bgnd", y, torch.eye(y.shape[1]) + 0.1)),
    "softmax over heads": lambda: Attention(lambda m, q, k, v: (q @ k.mT).softmax(1) @ v),
    "another order": _mid(_swapped),
    "divided by their number": _mid(lambda m, y: y / m.num_heads),
    "root of their number": _mid(lambda m, y: y * y.shape[1] ** -0.5),
    "root of the width": _after(lambda m, y: y / math.sqrt(y.shape[-1])),
    "a mask by their number": lambda: Attention(
        lambda m, q, k, v: _eager(m, q, k, v, torch.ones(q.shape[2], q.shape[2]).cumsum(1) / m.num_heads)),
    "branch by their number": _mid(lambda m, y: y * 2 if m.num_heads > HEADS // 2 else y),
    "scale of sdpa": lambda: Attention(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1 / m.num_heads)),
}  # fmt: skip

RIGHT: dict[str, Callable[[], Attention]] = {
    "eager": lambda: Attention(_eager),
    "eager, grouped": lambda: Attention(_eager, kv=2),
    "sdpa, grouped": lambda: Attention(kv=2),
    "grouped einsum": lambda: Attention(_grouped, kv=2),
    "repeat_interleave": lambda: Attention(
        lambda m, q, k, v: _plain(m, q, *(t.repeat_interleave(2, 1) for t in (k, v))), kv=2),
    "rope": lambda: Attention(lambda m, q, k, v: _plain(m, _rope(q), _rope(k), v)),
    "rms_norm of each head": _pre(lambda m, q: F.rms_norm(q, (m.head_dim,))),
    "normalize each head": _mid(lambda m, y: F.normalize(y, dim=-1)),
    "norm of each head by hand": _mid(lambda m, y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "norm of each head, merged": _after(
        lambda m, y: F.layer_norm(y.unflatten(-1, (m.num_heads, -1)), (m.head_dim,)).flatten(-2)),
    "bmm": lambda: Attention(_bmm),
    "each head": lambda: Attention(_each_head),
    "a buffer": lambda: Attention(_into_a_buffer),
    "index of all": _mid(_indexed),
    "mean of rows and of the batch": _mid(lambda m, y: y - y.mean(2, keepdim=True) + y.mean(0, keepdim=True)),
    "a gate": _after(lambda m, y: y * torch.sigmoid(m.gated)),
    "a gate of each head": _mid(lambda m, y: y * m.gated.unflatten(-1, (m.num_heads, -1)).mean(-1).mT[..., None]),
    "a parameter of each head": _mid(lambda m, y: y * m.gain[:, None, None]),
    "sinks": lambda: Attention(
        lambda m, q, k, v: torch.cat(
            [q @ k.mT, m.gain.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1
        ).softmax(-1)[..., :-1] @ v),
    "a mask for each head": lambda: Attention(
        lambda m, q, k, v: _eager(m, q, k, v, torch.zeros(1, m.num_heads, q.shape[2], 1) + torch.ones(q.shape[2]))),
    "finite": _mid(lambda m, y: y if torch.isfinite(y).all() else y * 2),
    "clamped": _mid(lambda m, y: y.clamp(min=-1).masked_fill(y > 3, 0.0) * m.head_dim**-0.5),
    "sizes": _mid(
        lambda m, y: y.view(y.size(0), m.num_heads, -1, m.head_dim).reshape(y.shape[0], y.shape[1], -1).view_as(y)),
    "ratios": _mid(lambda m, y: y * (m.hidden // m.num_heads) ** -0.5 / (m.num_heads // m.num_kv)),
    "compared": _mid(lambda m, y: y if y.size() == (y.shape[0], m.num_heads, y.shape[2], m.head_dim) else y[0]),
    "number of all": _mid(lambda m, y: y / m.all_heads),
    "dropout": _mid(lambda m, y: F.dropout(y, 0.0, True)),
}  # fmt: skip


def mixing_case(names: list[str]) -> dict[str, str]:
    messages = {}
    for name in names:
        model = sp.parallelize(model_of(MIXING[name]), group(), PLAN)
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2)))
        messages[name] = str(caught.value)
    return messages


def test_mixed_heads_are_refused_by_the_statement(world2: World) -> None:
    for messages in world2.run(mixing_case, list(MIXING)):
        for name, text in messages.items():
            assert "test_head_mixing.py:" in text and "0.inner" in text, (name, text)
            assert "heads" in text and any(w in text for w in ("'replicated'", "`divided`")), (name, text)


#: Of these a rank with one head sees nothing wrong.
UNSEEN = ("another order",)


def test_a_single_head_on_each_rank(world4: World) -> None:
    for messages in world4.run(mixing_case, [name for name in MIXING if name not in UNSEEN]):
        for name, text in messages.items():
            assert "test_head_mixing.py:" in text and "0.inner" in text, (name, text)


def right_case(names: list[str]) -> None:
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    for name in names:
        plain, model = model_of(RIGHT[name]), sp.parallelize(model_of(RIGHT[name]), group(), PLAN)
        assert_trains_alike(name, plain, model, x)


def test_what_treats_heads_one_by_one_is_right(world2: World) -> None:
    world2.run(right_case, list(RIGHT))


def test_what_treats_a_single_head_is_right(world4: World) -> None:
    names = [name for name in RIGHT if RIGHT[name]().num_kv == HEADS and name != "index of all"]
    world4.run(right_case, names)
