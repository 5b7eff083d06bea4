"""Mixtures under torch.compile, in plans of one's own, and the losses that published implementations got wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import World
from .models import assert_same_gradients, assert_same_loss, assert_trains_alike, group
from .test_compile import Recorder, assert_same, some_ids, step
from .test_experts import Mixture, Own, batch, mixtral


def compiled_case(way: str, how: str) -> None:
    """One graph with fullgraph, or where dynamo takes sizes that depend on data; else several, with equal results."""
    ids = some_ids(13, 51)
    model: Any = sp.parallelize(mixtral(num_hidden_layers=1), group(), experts=way)
    expected = step(model, model, ids)
    record = Recorder()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=how == "sizes"):
        assert_same(step(model, torch.compile(model, backend=record, fullgraph=how == "fullgraph"), ids), expected)
    if how != "breaks":
        record.assert_one_graph()


@pytest.mark.parametrize(("way", "how"), [("ep", "fullgraph"), ("tp", "sizes"), ("ep", "breaks"), ("tp", "breaks")])
def test_compiled(world2: World, way: str, how: str) -> None:
    world2.run(compiled_case, way, how)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class WithShared(Mixture):
    """Router, experts and a shared expert are given flattened rows."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).reshape(-1, x.shape[-1])
        weights, index = self.router(rows)
        made = self.experts(rows, index, weights) + self.shared(rows)
        return x + made.reshape(x.shape)


class OwnShared(Own):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.block = WithShared()


ROWS_PLAN = {
    "block": "scatter_input",
    "block.norm": "norm",
    "block.router": "router",
    "block.experts": "experts",
    "block.shared": "rows",
    "block.shared.up": "colwise",
    "block.shared.down": "rowwise",
    "last": "norm+gather_output",
}


def rows_case() -> None:
    for way in ("ep", "tp"):
        model = sp.parallelize(OwnShared(), group(), ROWS_PLAN, experts=way)
        assert_trains_alike(way, OwnShared(), model, torch.randn(3, 11, 16))
    forgotten = {name: style for name, style in ROWS_PLAN.items() if name != "block.router"}
    model = sp.parallelize(OwnShared(), group(), forgotten)
    with pytest.raises(RuntimeError, match=r"parameter 'block\.router\.weight', which the plan does not cover"):
        model(torch.randn(3, 11, 16))


def test_a_plan_with_rows(world2: World) -> None:
    world2.run(rows_case)


def z_loss(router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """One's own loss of logits that the model returns: [B * S, E] of each layer, padding left out."""
    logits, counted = torch.cat(router_logits), mask.reshape(-1).repeat(len(router_logits)).float()
    return (logits.logsumexp(-1).square() * counted).sum() / counted.sum()


def losses_case() -> tuple[float, float]:
    plain, model = mixtral(), sp.parallelize(mixtral(), group())
    found = []
    for some in (plain, model):
        out = some(**batch(), use_cache=False, output_router_logits=True)
        z = z_loss(out.router_logits, batch()["attention_mask"])
        (out.aux_loss + 0.1 * z).backward()  # the auxiliary losses alone: nothing hides their gradients
        found.append((out.aux_loss.item(), z.item()))
    for one, other in zip(*found, strict=True):
        assert_same_loss(one, other)
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert any("gate" in name for name in gradients)
    assert_same_gradients(sp.gather_full_gradients(model), gradients)
    return found[1]


def test_auxiliary_losses_do_not_depend_on_the_number_of_ranks(world2: World, world4: World) -> None:
    """Published: an auxiliary loss, or its gradient, that scales with the ranks, or is the mean of the ranks' own."""
    two, four = world2.run(losses_case), world4.run(losses_case)
    for one in (*two, *four):
        for a, b in zip(one, two[0], strict=True):
            assert_same_loss(a, b)
