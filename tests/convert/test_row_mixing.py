"""What mixes or picks rows of a shard is refused by its statement; what treats them one by one stays right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import RankError, World
from .models import assert_same_gradients, group

WIDTH = 16


class Block(nn.Module):
    def __init__(self, extra: Callable[[Tensor], Tensor] | None, where: str = "residual"):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.extra, self.where = extra, where

    def forward(self, x: Tensor) -> Tensor:
        if self.extra is not None and self.where == "stream":
            x = self.extra(x)
        out = x + self.down(F.gelu(self.up(self.norm(x))))
        if self.extra is not None and self.where == "residual":
            out = out + self.extra(x)
        return out


class Model(nn.Module):
    def __init__(self, extra: Any = None, where: str = "residual"):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block(extra, where) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


PLAN = {
    "blocks.0": "scatter_input",
    "blocks.*.norm": "norm",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "norm": "norm+gather_output",
}


def _zeroed(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


def _zeroed_through_a_view(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0].zero_()
    return x


def _shift(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def _running(x: Tensor) -> Tensor:
    total, rows = torch.zeros_like(x[:, 0]), []
    for row in x.unbind(1):
        total = total + row
        rows.append(total)
    return torch.stack(rows, 1)


def _attention(x: Tensor) -> Tensor:
    scores = x @ x.transpose(1, 2) / WIDTH**0.5
    return scores.softmax(-1) @ x


def _checked(x: Tensor) -> Tensor:
    assert x.shape[1] <= 64 and x.shape == torch.relu(x).shape and x.shape[1] + x.shape[0] < 100
    assert x.ndim == 3 and x.numel() < 10_000 and {x.shape[1]: 1}[x.shape[1]] == 1
    return x * 2 if x.shape[1] > 64 or x.size(-1) != WIDTH else x


KERNEL = torch.tensor([[[0.25, 0.5, 0.25]]])


def _convolution(x: Tensor) -> Tensor:
    kernel = KERNEL.expand(WIDTH, 1, 3)
    return F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=WIDTH).transpose(1, 2)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1, keepdim=True),
    "mean of all": lambda x: x - x.mean(),
    "sum": lambda x: x.sum(dim=-2, keepdim=True),
    "norm": lambda x: x / x.norm(),
    "std": lambda x: x / (x.std(1, keepdim=True) + 1),
    "max": lambda x: x - x.max(1, keepdim=True).values,
    "max of all": lambda x: x / x.abs().max(),
    "amax": lambda x: x - torch.amax(x, (1, 2), keepdim=True),
    "roll": lambda x: torch.roll(x, 1, 1),
    "flip": lambda x: x.flip(1),
    "cumsum": lambda x: x.cumsum(1),
    "softmax": lambda x: x.softmax(1),
    "functional softmax": lambda x: F.softmax(x, dim=-2),
    "normalize": lambda x: F.normalize(x, dim=1),
    "sort": lambda x: x.sort(1).values,
    "argmax": lambda x: x * x.argmax(1, keepdim=True),
    "argsort": lambda x: x.gather(1, x.argsort(1)),
    "topk": lambda x: x - x.topk(1, dim=1).values,
    "first row": lambda x: x + x[:, :1],
    "last row": lambda x: x + x[:, -1].unsqueeze(1),
    "all but the first": lambda x: F.pad(x[:, 1:], (0, 0, 0, 1)),
    "pad and cut": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "pad": lambda x: F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).sum(-1),
    "set": _zeroed,
    "set through a view": _zeroed_through_a_view,
    "index_select": lambda x: x.index_select(1, torch.arange(x.shape[1]).flip(0)),
    "indexed": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "narrow": lambda x: x - x.narrow(1, 0, 1),
    "split": lambda x: torch.cat(x.split([1, x.shape[1] - 1], 1)[::-1], 1),
    "chunk": lambda x: torch.cat(tuple(reversed(x.chunk(2, 1))), 1),
    "unbind": _running,
    "shift": _shift,
    "conv1d": _convolution,
    "attention": _attention,
    "sdpa": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "einsum": lambda x: torch.einsum("bsd,btd,btc->bsc", x, x, x) / 9,
    "bmm": lambda x: torch.bmm(x, torch.bmm(x.mT, x)) / 99,
    "transposed": lambda x: x.transpose(1, 2).cumsum(-1).transpose(1, 2),
    "flattened": lambda x: x.flatten(0, 1).cumsum(0).view_as(x),
    "merged": lambda x: x.reshape(x.shape[0], -1).softmax(-1).view_as(x),
    "interpolate": lambda x: F.interpolate(x.mT, scale_factor=2).mT[:, ::2].roll(1, 1),
    "fft": lambda x: torch.fft.fft(x, dim=1).real,
    "tril": lambda x: x.tril(),
    "var over all": lambda x: F.layer_norm(x, x.shape[1:]),
    "positions": lambda x: x * torch.arange(x.shape[1])[None, :, None],
    "positions of a linspace": lambda x: x + torch.linspace(0, 1, x.size(1)).view(1, -1, 1),
    "mask": lambda x: x.masked_fill(torch.ones(x.shape[:2]).cumsum(1).unsqueeze(-1) > 1, 0.0),
    "a number read": lambda x: x / x.abs().max().item(),
    "a branch": lambda x: x if x.mean() > 0 else x * 2,
    "divided by the length": lambda x: x / x.shape[1],
    "mean by hand": lambda x: x * (1 / x.size(1)),
    "root of the length": lambda x: x * math.sqrt(x.shape[-2]),
    "power of the length": lambda x: x * x.shape[1] ** -0.5,
    "numel": lambda x: x * (100 / x.numel()),
    "nelement": lambda x: x * (1 / (x.nelement() // WIDTH)),
    "len": lambda x: x / len(x[0]),
    "length of merged rows": lambda x: x / x.reshape(-1, WIDTH).shape[0],
    "rest of the length": lambda x: x * (1 + x.size(1) % 4),
    "length times a half": lambda x: x / (x.shape[1] * 0.5),
    "a tensor of the length": lambda x: x * (torch.ones(1) / x.shape[1]),
    "a full tensor of the length": lambda x: x / torch.full((1,), x.shape[1]),
    "a branch by the length": lambda x: x * 2 if x.shape[1] > 6 else x,
    "a branch by half the length": lambda x: x * 2 if x.shape[1] / 2 >= 3.5 else x,
    "an equal length": lambda x: x if x.shape[1] == 7 else x * 2,
    "the smaller": lambda x: x * min(x.shape[1], 6),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
}

ROW_BY_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of features": lambda x: x - x.mean(-1, keepdim=True),
    "softmax of features": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "roll of features": lambda x: x.roll(1, -1),
    "flip of features": lambda x: x.flip(-1),
    "chunks of features": lambda x: torch.cat([a * F.silu(b) for a, b in [x.chunk(2, -1)]] * 2, -1),
    "reshaped": lambda x: F.gelu(x.reshape(x.shape[0] * x.shape[1], WIDTH)).view(x.shape),
    "flattened": lambda x: x.flatten(0, 1).softmax(-1).unflatten(0, x.shape[:2]),
    "heads": lambda x: x.unflatten(-1, (4, -1)).softmax(-1).flatten(-2),
    "transposed": lambda x: (x.transpose(0, 1) * 2).transpose(0, 1),
    "matmul": lambda x: x @ torch.ones(WIDTH, WIDTH) / 9,
    "einsum": lambda x: torch.einsum("bsd,dk->bsk", x, torch.ones(WIDTH, WIDTH)) / 9,
    "ones": lambda x: x * torch.ones(x.shape[:2]).unsqueeze(-1),
    "zeros_like": lambda x: torch.zeros_like(x) + x.new_zeros(()),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "set features": lambda x: torch.cat([x[..., :2] * 0, x[..., 2:]], -1),
    "in place": lambda x: x.clone().mul_(0.5).add_(1),
    "all rows": lambda x: x[:, :, :4].sum(-1, keepdim=True) * x[:, : x.shape[1]],
    "sorted features": lambda x: x.sort(-1).values,
    "batch": lambda x: x - x.mean(0, keepdim=True),
    "argmax of features": lambda x: F.one_hot(x.argmax(-1), WIDTH).to(x.dtype),
    "cast": lambda x: x.double().pow(2).to(x.dtype),
    "finite": lambda x: x if torch.isfinite(x).all() else x * 2,
    "norm of a row": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1),
    "dropout of eval": lambda x: F.dropout(x, 0.5, training=False),
    "outer": lambda x: (x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-1) / WIDTH,
    "checked lengths": lambda x: _checked(x),
    "sizes by numel": lambda x: x.view(-1).view(x.shape[0], x.numel() // WIDTH // x.shape[0], WIDTH),
    "len of the batch": lambda x: x / len(x),
    "windows": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1).mean(2),
}


def mixing_case(names: list[str], length: int, where: str) -> dict[str, str]:
    messages = {}
    for name in names:
        model = sp.parallelize(Model(MIXING[name], where), group(), PLAN)
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(2)))
        messages[name] = str(caught.value)
    return messages


@pytest.mark.parametrize("where", ["residual", "stream"])
def test_mixed_rows_are_refused_by_the_statement(world2: World, where: str) -> None:
    for messages in world2.run(mixing_case, list(MIXING), 7, where):
        for name, text in messages.items():
            assert "test_row_mixing.py:" in text and "blocks.0" in text, (name, text)
            assert any(word in text for word in ("rows", "draws random numbers", "meets")), (name, text)


def uneven_case(name: str) -> str:
    model = sp.parallelize(Model(MIXING[name]), group(), PLAN)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    with pytest.raises(RuntimeError) as caught:
        model(x)
    right = sp.parallelize(Model(), group(), PLAN)  # the group goes on
    torch.testing.assert_close(right(x), Model()(x), rtol=1e-4, atol=1e-5)
    return str(caught.value)


@pytest.mark.parametrize("name", ["flip", "cumsum", "a number read"])
def test_ranks_with_one_row_stop_with_the_others(world4: World, name: str) -> None:
    """5 rows on 4 ranks: only the first can see that rows are mixed."""
    for text in world4.run(uneven_case, name):
        assert "test_row_mixing.py:" in text, text


def right_case(length: int, seq_dim: int) -> None:
    for name, extra in ROW_BY_ROW.items():
        if seq_dim == 0 and name in ("reshaped", "len of the batch"):
            continue
        plain, model = Model(extra), sp.parallelize(Model(extra), group(), PLAN, seq_dim=seq_dim)
        x = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(2))
        if seq_dim == 0 and name == "batch":
            continue
        x = x.transpose(0, 1).contiguous() if seq_dim == 0 else x
        for _ in range(2):
            for m in (plain, model):
                m.zero_grad()
            a, b = plain(x), model(x)
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            a.square().mean().backward()
            b.square().mean().backward()
        expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert_same_gradients(sp.gather_full_gradients(model), expected)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_fewer_rows_than_ranks(world4: World, length: int) -> None:
    """Ranks with a row or none cannot try much, and refuse nothing."""
    world4.run(right_case, length, -2)


@pytest.mark.parametrize("seq_dim", [-2, 0], ids=["BSH", "SBH"])
def test_what_treats_rows_one_by_one_is_right(world2: World, seq_dim: int) -> None:
    world2.run(right_case, 7, seq_dim)


# --- hooks and reading ------------------------------------------------------------------------------------------


def hooks_case() -> None:
    seen: list[float] = []
    averages = torch.zeros(WIDTH)

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out.detach().abs().mean().item())
        averages.mul_(0.9).add_(out.detach().mean((0, 1)), alpha=0.1)
        if out.isnan().any():
            raise AssertionError("nan")

    model, plain = sp.parallelize(Model(), group(), PLAN), Model()
    model.blocks[0].register_forward_hook(look)  # type: ignore[union-attr]
    model.blocks[1].norm.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].std())))  # type: ignore
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 2
    changed = sp.parallelize(Model(), group(), PLAN)
    changed.blocks[0].register_forward_hook(lambda m, a, out: out - out.mean(1, keepdim=True))  # type: ignore
    with pytest.raises(RuntimeError, match=r"does not treat rows one by one"):
        changed(x)


def test_hooks_may_look_at_a_shard_but_not_mix_it(world2: World) -> None:
    world2.run(hooks_case)


class Pooled(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x).mean(1))


class Statistics(Model):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return self.norm(out), self.aux

    aux: Tensor


def ends_case() -> None:
    x = torch.randn(2, 7, WIDTH)
    model = sp.parallelize(Pooled(), group(), {**PLAN, "norm": "norm"})
    with pytest.raises(RuntimeError, match=r"mean\(1\).* does not treat rows one by one"):
        model(x)
    pooled = Pooled()
    torch.testing.assert_close(sp.parallelize(Pooled(), group(), PLAN)(x), pooled(x), rtol=1e-4, atol=1e-5)

    class WithLoss(Model):
        def forward(self, x: Tensor) -> Any:
            x = self.blocks[0](x)
            aux = x.pow(2).mean()
            return self.norm(self.blocks[1](x)), aux

    model = sp.parallelize(WithLoss(), group(), PLAN)
    with pytest.raises(RuntimeError, match=r"WithLoss returns what `aux = x.pow\(2\).mean\(\)`"):
        model(x)


def test_what_was_mixed_reaches_neither_head_nor_output(world2: World) -> None:
    world2.run(ends_case)


class Transposing(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return self.norm(self.blocks[1](x.transpose(0, 1))).transpose(0, 1)


def moved_case() -> None:
    model = sp.parallelize(Transposing(), group(), PLAN)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up: takes a sequence shard .* transposed or reshaped"):
        model(torch.randn(2, 8, WIDTH))


def test_a_moved_sequence_dimension_is_refused(world2: World) -> None:
    world2.run(moved_case)


def test_other_errors_are_the_models_own(world2: World) -> None:
    with pytest.raises(RankError, match="of the model's own"):
        world2.run(own_error_case)


def own_error_case() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("of the model's own")

    sp.parallelize(Model(fails), group(), PLAN)(torch.randn(2, 7, WIDTH))
