"""Modules that a plan calls 'sequence' are tried: rows in another order, and in another number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import World
from .models import assert_same_gradients, group
from .test_row_mixing import PLAN, WIDTH, Model


class TokenShift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x + F.pad(x, (0, 0, 1, 0))[:, :-1])


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT)[..., : x.shape[1]].mT


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class ByLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / x.shape[1]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(F.silu(self.a(x.reshape(-1, x.shape[-1])))).view(x.shape))


WRONG_MODULES = (TokenShift, Convolved, Recurrent, Attending, Batched, Positioned)


class WithModule(Model):
    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        for block in self.blocks:
            block.module = kind()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = x + block.module(x)
        return self.norm(x)


def modules_case() -> None:
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    plan = {**PLAN, "blocks.*.module": "sequence"}
    for kind in WRONG_MODULES:
        model = sp.parallelize(WithModule(kind), group(), plan)
        with pytest.raises(RuntimeError, match=rf"blocks\.0\.module: .* but {kind.__name__} mixes them"):
            model(x)
    model = sp.parallelize(WithModule(ByLength), group(), plan)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.module: .* what ByLength makes of a row depends on how many"):
        model(x)
    model = sp.parallelize(WithModule(Dropping), group(), plan)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.module: .* but Dropping draws random numbers"):
        model(x)
    model.eval()(x)
    model, plain = sp.parallelize(WithModule(Gated), group(), plan), WithModule(Gated)
    a, b = plain(x), model(x)
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    a.square().mean().backward()
    b.square().mean().backward()
    assert_same_gradients(sp.gather_full_gradients(model), {n: p.grad for n, p in plain.named_parameters()})  # type: ignore
    whole = sp.parallelize(WithModule(Recurrent), group(), {**PLAN, "blocks.*.module": "replicated"})
    torch.testing.assert_close(whole(x), WithModule(Recurrent)(x), rtol=1e-4, atol=1e-5)


def test_modules_called_sequence_are_tried(world2: World) -> None:
    world2.run(modules_case)


def mamba_case() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.MambaConfig(
                hidden_size=WIDTH, state_size=4, num_hidden_layers=1, intermediate_size=32
            )
            self.mixer = MambaMixer(config, layer_idx=0)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixer(x)

    model = sp.parallelize(WithModule(Mixer), group(), {**PLAN, "blocks.*.module": "sequence"})
    with pytest.raises(RuntimeError, match=r"blocks\.0\.module: .* mixes them"):
        model(torch.randn(2, 7, WIDTH))


def test_a_mamba_mixer_is_no_sequence_module(world2: World) -> None:
    world2.run(mamba_case)
