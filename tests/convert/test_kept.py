"""What a forward leaves behind, on attributes or in hooks, enters no loss unless it was put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import World
from .models import assert_same_gradients, group, llama

IDS = torch.randint(3, 11, (2, 9), generator=torch.Generator().manual_seed(7))
TOGETHER = "Put it together first"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate = nn.Parameter(torch.ones(16))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + y * self.gate
        self.kept = {
            "entropy": -(weights * weights.log()).sum(-1).mean(),
            "activations": y.pow(2).mean(),
            "gate": self.gate.pow(2).sum(),
            "rows": x,
            "heads": weights,
        }
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb, self.norm, self.head = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.returned = ""

    def forward(self, ids: Tensor) -> Any:
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return (logits, self.blocks[1].kept[self.returned]) if self.returned else logits


PLAN = {
    "blocks.0": "scatter_input+own_parameters", "blocks.*": "own_parameters", "blocks.*.norm": "norm",
    "blocks.*.qkv": "colwise:3", "blocks.*.out": "rowwise", "norm": "norm+gather_output",
}  # fmt: skip


def main_loss(model: Net) -> Tensor:
    out = model(IDS)
    return nn.functional.cross_entropy((out if isinstance(out, Tensor) else out[0]).flatten(0, 1), IDS.flatten())


def penalised(name: str) -> Callable[[Net], Tensor]:
    return lambda model: main_loss(model) + model.blocks[1].kept[name] * 0.1


def with_rows(model: Net) -> Tensor:
    return main_loss(model) + model.blocks[0].kept["rows"][:, 1:].relu().square().mean()


def returned(name: str) -> Callable[[Net], Tensor]:
    def loss(model: Net) -> Tensor:
        model.returned = name
        logits, extra = model(IDS)
        return logits.square().mean() + extra.mean()  # type: ignore[no-any-return]

    return loss


REFUSED = {
    "an attention entropy": (penalised("entropy"), "this rank's rows, heads or features, made by `.*entropy"),
    "an activation penalty": (
        penalised("activations"),
        "this rank's rows, heads or features, made by `.*activations",
    ),
    "a penalty on what is summed": (penalised("gate"), "whose gradients are summed over the ranks, made by `.*gate"),
    "rows": (with_rows, r"a sequence shard, made by `x = x \+ y"),
    "returned entropy": (returned("entropy"), "Net returns what `.*entropy"),
    "returned weights": (returned("heads"), "a tensor-parallel tensor"),
}


def refused_case() -> list[str]:
    found = []
    for loss, message in REFUSED.values():
        model = converted()
        loss(Net()).backward()  # the loss is one
        with pytest.raises(RuntimeError, match=message) as caught:
            loss(model).backward()
        assert TOGETHER in str(caught.value) or "Net returns" in message
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(loss(converted()), list(Net().parameters())[:1], allow_unused=True)
        found.append(str(caught.value))
    return found


def converted() -> Net:
    return sp.parallelize(Net(), group(), PLAN).train()


def test_is_refused_with_the_statement_that_made_it(world2: World) -> None:
    errors = world2.run(refused_case)
    assert errors[0] == errors[1] and len(errors[0]) == len(REFUSED)


def hooked_case() -> None:
    """Hidden states of a Transformers model, kept by a hook."""
    model = sp.parallelize(llama(), group()).train()
    kept: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: kept.append(out))
    loss = model(input_ids=IDS, labels=IDS).loss + kept[-1].pow(2).mean()
    with pytest.raises(RuntimeError, match="LlamaForCausalLM: a sequence shard, made by"):
        loss.backward()


def test_hidden_states_kept_by_a_hook(world2: World) -> None:
    world2.run(hooked_case)


def looked_at(model: Net) -> Tensor:
    """Logged, detached, copied: none of it has a gradient."""
    loss = main_loss(model)
    kept = model.blocks[0].kept
    assert all(type(t.detach()) is Tensor for t in kept.values())
    assert type(kept["rows"].detach().clone().mean()) is Tensor
    with torch.no_grad():
        assert type(kept["heads"].mean()) is Tensor
    kept["entropy"].item()
    return loss


def put_together(model: Net) -> Tensor:
    loss = main_loss(model)
    rows = model.blocks[0].kept["rows"].float()
    if hasattr(model, "is_converted"):
        # The loss that follows is computed alike on every rank.
        rows = sp.gather_sequence(rows, group(), seq_len=9, tensor_parallel_output_grad=False)
    return loss + rows.square().mean()


RIGHT = {"looked at": looked_at, "put together": put_together}


def right_case() -> None:
    for loss in RIGHT.values():
        plain, model = Net(), converted()
        model.is_converted = True  # type: ignore[assignment]
        for _ in range(2):
            expected, got = loss(plain), loss(model)
            assert type(got) is Tensor
            torch.testing.assert_close(got, expected)
            expected.backward()
            got.backward()
        expected_gradients = {name: p.grad for name, p in plain.named_parameters()}
        assert_same_gradients(sp.gather_full_gradients(model), expected_gradients)


def test_what_has_no_gradient_or_was_put_together_is_right(world2: World) -> None:
    world2.run(right_case)
