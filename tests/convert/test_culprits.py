"""Errors of the first forward name the statement, what the rank holds and what the plan lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.convert import ParallelPlan

from ..world import World
from .models import assert_same_gradients, group

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """As timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(self.merged(out, batch, length, width))

    def merged(self, out: Tensor, batch: int, length: int, width: int) -> Tensor:
        return out.reshape(batch, length, width)


class Merging(Attention):
    def merged(self, out: Tensor, batch: int, length: int, width: int) -> Tensor:
        return out.reshape(batch, length, -1)


class Unpacking(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t for t in self.qkv(x).chunk(3, -1)[: self.num_heads // 2])
        return self.proj(q + k + v)


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module] = Attention, change: Callable[[Tensor], Tensor] = lambda x: x):
        super().__init__()
        self.norm, self.attn, self.change = nn.LayerNorm(WIDTH), attention(), change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.change(self.norm(x)))


def model_of(*options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Block(*options), Block(*options), nn.LayerNorm(WIDTH))


PLAN = {
    "0": "scatter_input",
    "*.norm": "norm",
    "*.attn.qkv": "colwise:3",
    "*.attn.proj": "rowwise",
    "2": "norm+gather_output",
}
WHOLE = {**PLAN, "*.attn": "whole_input"}
DIVIDED = {"*.attn": ("num_heads",)}


def failing(model: nn.Module, plan: Any) -> Exception:
    model = sp.parallelize(model, group(), plan)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which, the callers ask)
        model(torch.randn(2, 9, WIDTH))
    return caught.value


def shapes_case() -> None:
    held = f"rows {'0..5' if group().rank() == 0 else '5..9'} of 9"
    error = failing(model_of(), ParallelPlan(PLAN, divided=DIVIDED))
    text = str(error)
    for part in ("0.attn: ", "test_culprits.py:", "self.qkv(x).reshape", "48 of the 96 features of 0.attn.qkv",
                 "'0.attn' (or the module that reads it) needs the style 'whole_input'"):  # fmt: skip
        assert part in text, (part, text)
    assert isinstance(error.__cause__, RuntimeError) and "invalid for input of size" in str(error.__cause__)
    text = str(failing(model_of(), WHOLE))
    assert "divided={'0.attn': ('num_heads',)}" in text and "whole_input" not in text, text
    text = str(failing(model_of(), ParallelPlan(WHOLE, divided=DIVIDED)))
    assert "self.merged" not in text and "out.reshape(batch, length, width)" in text and "write -1" in text, text
    text = str(failing(model_of(Merging, lambda x: x + torch.zeros(9, WIDTH)), ParallelPlan(WHOLE, divided=DIVIDED)))
    assert "0: " in text and held in text and "a tensor [9, 32] with all 9 rows meets a shard" in text, text
    text = str(failing(model_of(Merging, lambda x: x @ torch.ones(5, 5)), ParallelPlan(WHOLE, divided=DIVIDED)))
    assert "x @ torch.ones(5, 5)" in text and held in text, text
    text = str(
        failing(model_of(Merging, lambda x: x), ParallelPlan({**PLAN, "*.attn.qkv": "colwise"}, divided=DIVIDED))
    )
    assert "'whole_input'" in text, text
    plain, model = model_of(Merging), sp.parallelize(model_of(Merging), group(), ParallelPlan(WHOLE, divided=DIVIDED))
    x = torch.randn(2, 9, WIDTH)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    error = failing(model_of(Unpacking), WHOLE)
    assert isinstance(error, ValueError)
    if sys.version_info >= (3, 11):
        assert "in 0.attn" in error.__notes__[0] and "`divided`" in error.__notes__[0], error.__notes__  # type: ignore


def test_a_shape_error_says_what_the_rank_holds(world2: World) -> None:
    world2.run(shapes_case)


def length_case() -> None:
    """What is made from the length of a shard is not for tensors with all rows."""

    class Sized(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            q = q.reshape(x.shape[0], x.shape[1], -1, self.head_dim)
            return self.proj(q.flatten(2) + k + v)

    # 8 rows: a shard's 4 rows of 16 features look like 4 heads.
    model = sp.parallelize(model_of(Sized), group(), PLAN)
    with pytest.raises(RuntimeError, match=r"`q = q\.reshape\(.*counts only rows .*'whole_input'"):
        model(torch.randn(2, 8, WIDTH))

    class Masking(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            mask = torch.ones(x.shape[1]).mean()
            return self.proj((q + k + v) * mask)

    model = sp.parallelize(model_of(Masking), group(), PLAN)
    with pytest.raises(RuntimeError, match=r"`mask = torch\.ones\(x\.shape\[1\]\)\.mean\(\)`"):
        model(torch.randn(2, 8, WIDTH))

    class Positioned(Block):
        def __init__(self) -> None:
            super().__init__(Merging)
            self.table = nn.Embedding(16, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table(torch.arange(x.shape[1])))

    torch.manual_seed(1)
    model = nn.Sequential(Positioned(), Block(Merging), nn.LayerNorm(WIDTH))
    with pytest.raises(
        RuntimeError, match=r"0: .*self\.table\(torch\.arange\(x\.shape\[1\]\)\).*the rows of a shard, rows "
    ):
        sp.parallelize(model, group(), ParallelPlan(WHOLE, divided=DIVIDED))(torch.randn(2, 8, WIDTH))

    class Computing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.qkv(x * 2).chunk(3, -1)[0])

    model = sp.parallelize(model_of(Computing), group(), WHOLE)
    with pytest.raises(RuntimeError, match=r"0\.attn: .*x \* 2.* 'whole_input', which shows its shape only"):
        model(torch.randn(2, 8, WIDTH))


def test_what_is_made_from_the_length_of_a_shard_is_refused(world2: World) -> None:
    world2.run(length_case)


class DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn = Merging()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.by_hand = False

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c = self.ada(c)
        if self.by_hand:
            c = sp.copy_to_tensor_parallel(c, group())
        s1, c1, g1, s2, c2, g2 = c.unsqueeze(1).chunk(6, -1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + c1) + s1)
        return x + g2 * self.down(F.gelu(self.up(self.norm2(x) * (1 + c2) + s2)))


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.x_embed, self.t_embed = nn.Linear(8, WIDTH), nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))
        self.final, self.ada, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.x_embed(x), self.t_embed(t)
        for block in self.blocks:
            x = block(x, c)
        return self.out(self.final(x) * (1 + self.ada(c)).unsqueeze(1))


DIT = {
    "blocks.0": "scatter_input",
    "blocks.*.norm1": "norm",
    "blocks.*.norm2": "norm",
    "blocks.*.attn": "whole_input",
    "blocks.*.attn.qkv": "colwise:3",
    "blocks.*.attn.proj": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "final": "norm+gather_output",
}


def conditioning_case() -> None:
    divided = {"blocks.*.attn": ("num_heads",)}
    x, t = torch.randn(2, 9, 8), torch.randn(2, 6)

    def refused(match: str, plan: dict[str, str], model: nn.Module | None = None) -> None:
        model = sp.parallelize(model or DiT(), group(), ParallelPlan(plan, divided=divided))
        with pytest.raises(RuntimeError, match=match):
            model(x, t)

    refused(r"(?s)^blocks\.0: a sequence shard meets .*`x = x \+ g1 .*'conditioning'.*copy_to_tensor_parallel", DIT)
    refused(r"blocks\.0\.ada: .* takes 'conditioning'", {**DIT, "blocks.*.ada": "sequence"})
    refused(
        r"blocks\.0: a tensor-parallel tensor meets .*'t_embed.weight' among them.*'conditioning'",
        {**DIT, "blocks.*.ada": "tensor_parallel"},
    )
    for by_hand in (False, True):
        plain, model = DiT(), DiT()
        for m in (plain, model):
            for block in m.blocks:
                block.by_hand = by_hand and m is model  # type: ignore[union-attr]
        plan = DIT if by_hand else {**DIT, "blocks.*.ada": "conditioning"}
        sp.parallelize(model, group(), ParallelPlan(plan, divided=divided))
        for _ in range(2):
            plain.zero_grad()
            model.zero_grad()
            a, b = plain(x, t), model(x, t)
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
            a.square().mean().backward()
            b.square().mean().backward()
            expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
            assert_same_gradients(sp.gather_full_gradients(model), expected)
        model.eval()
        torch.testing.assert_close(model(x, t), plain(x, t), rtol=1e-4, atol=1e-5)

    # What never meets a shard would count once for every rank.
    everywhere = {**DIT, "blocks.*.ada": "conditioning", "ada": "conditioning"}
    refused(r"out: a whole tensor whose gradient is summed .* meets 'out\.weight'", everywhere)
    refused("Returning returns a tensor that has met no shard", {**DIT, "blocks.*.ada": "conditioning"}, Returning())


class Returning(DiT):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return super().forward(x, t), self.blocks[0].ada(self.t_embed(t))  # type: ignore[union-attr]


def test_conditioning_is_named_by_its_block_and_has_a_style(world2: World) -> None:
    world2.run(conditioning_case)
