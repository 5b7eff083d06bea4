"""Experts that ranks do not divide, and states of converted mixtures: checkpoints at other degrees and divisions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import seqpar_kernels as sp

from ..functional.groups import on_ranks
from ..world import World
from .models import assert_same_gradients, assert_same_loss
from .test_experts import MODELS, gpt_oss, mixtral, trained

TWELVE = dict(hidden_size=48, num_attention_heads=12, num_key_value_heads=12)  # heads, for 3 ranks too


def stepped(model: nn.Module, steps: int = 2) -> tuple[list[float], torch.optim.Optimizer]:
    """Gradient norms of steps of AdamW with a clipped gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        trained(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
    return norms, optimizer


def uneven_case(group: dist.ProcessGroup, name: str, count: int) -> None:
    options = dict(TWELVE, num_local_experts=count)
    plain, model = MODELS[name](**options), sp.parallelize(MODELS[name](**options), group, experts="ep")
    expected, gradients = trained(plain)
    got, _ = trained(model)
    assert_same_loss(got.loss.item(), expected.loss.item())
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert_same_gradients(sp.gather_full_gradients(model), gradients)
    for listed, (key, param) in zip(model.parameters(), plain.named_parameters(), strict=True):
        assert isinstance(listed, DTensor) and listed.shape == param.shape
        assert torch.equal(listed.full_tensor(), param), key
        assert torch.equal(listed.redistribute(placements=[dist.tensor.Replicate()]).to_local(), param), key
        assert listed.grad is not None
        torch.testing.assert_close(listed.grad.full_tensor(), param.grad, rtol=1e-4, atol=1e-6)
        penalty = torch.autograd.grad((listed * listed).sum().full_tensor(), listed)[0]  # a listed parameter's
        torch.testing.assert_close(penalty.full_tensor(), 2 * param)
    (norms, _), (plain_norms, _) = stepped(model), stepped(plain)
    for one, other in zip(norms, plain_norms, strict=True):
        assert abs(one - other) <= 1e-4 * other
    whole = sp.full_state_dict(model)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(whole[key], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=key: f"{n}: {m}")
    back = sp.unparallelize(model)
    for key, value in back.state_dict().items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize(("name", "count"), [("mixtral", 5), ("gpt_oss", 3)])
def test_experts_that_ranks_do_not_divide(world4: World, name: str, count: int) -> None:
    """5 experts are 3 2, 2 2 1 and 2 1 1 1; 3 are 2 1, 1 1 1 and 1 1 1 0."""
    world4.run(on_ranks, uneven_case, name, count)


OF_ALL: dict[str, Any] = {
    "sum": lambda t: t.sum(),
    "mean": lambda t: t.mean(),
    "largest": lambda t: t.abs().max(),
    "norm": lambda t: t.norm(1),
    "infinite norm": lambda t: torch.linalg.vector_norm(t, float("inf")),
    "std": lambda t: t.std(),
    "median": lambda t: t.median(),
    "finite": lambda t: t.isfinite().all(),
    "mean of dimension 0": lambda t: t.mean(0),
    "sum of dimension 1": lambda t: t.sum(1),
    "rows": lambda t: t[4],
    "flat": lambda t: t.flatten(),
    "scaled": lambda t: t * 2 + t,
    "foreach": lambda t: torch._foreach_mul([t, t], 3.0)[1],
    "foreach norm": lambda t: torch._foreach_norm([t])[0],
    "zeros": torch.zeros_like,
}


@torch.no_grad()
def functions_case() -> None:
    """6 experts on 4 ranks are 2 2 1 1, for torch 2 2 2 0: what it makes of listed parameters and their gradients."""
    plain = mixtral(num_hidden_layers=1, num_local_experts=6)
    model = sp.parallelize(mixtral(num_hidden_layers=1, num_local_experts=6), dist.group.WORLD, experts="ep")
    for some in (plain, model):
        with torch.enable_grad():
            trained(some)
    name = "model.layers.0.mlp.experts.down_proj"
    listed, whole = (dict(some.named_parameters())[name] for some in (model, plain))
    assert listed.grad is not None and whole.grad is not None
    for what, function in OF_ALL.items():
        for ours, theirs in ((listed, whole), (listed.grad, whole.grad), (model.state_dict()[name], whole)):
            got, expected = function(ours), function(theirs)
            full = got.full_tensor() if isinstance(got, DTensor) else got
            torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-6, msg=lambda m, w=what: f"{w}: {m}")
    with pytest.raises(NotImplementedError, match=r"cut as tensor_split cuts \(experts that ranks do not divide\)"):
        listed.grad.index_fill_(0, torch.tensor([5]), 0.0)


def test_functions_of_uneven_parts(world4: World) -> None:
    world4.run(functions_case)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": sp.sharded_state_dict(model), "optimizer": sp.sharded_optimizer_state_dict(model, optimizer)}


def resumed(folder: str, group: dist.ProcessGroup | None, way: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model of a checkpoint, and what it is after another step with the optimizer's state."""
    model = sp.parallelize(gpt_oss(num_local_experts=6), group, experts=way)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    sp.load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])
    loaded = sp.full_state_dict(model)
    return loaded, further(model, optimizer)


def further(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    optimizer.zero_grad()
    trained(model)
    optimizer.step()
    return sp.full_state_dict(model)


def checkpoint_case(folder: str) -> list[dict[str, Tensor]]:
    """Saved by 4 ranks with 2, 2, 1 and 1 experts; loaded by 4 and by 2, divided the other way too."""
    model = sp.parallelize(gpt_oss(num_local_experts=6), dist.group.WORLD, experts="ep")
    _, optimizer = stepped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    saved = sp.full_state_dict(model)
    after = further(model, optimizer)
    for ranks, way in ((4, "ep"), (4, "tp"), (2, "tp"), (2, "ep")):
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() < ranks:
            loaded, again = resumed(folder, group, way)
            for name, value in saved.items():
                assert torch.equal(loaded[name], value), (ranks, way, name)
                torch.testing.assert_close(again[name], after[name], rtol=2e-3, atol=2e-4)
        dist.barrier()
    return [saved, after]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_loads_at_other_degrees_and_divisions(world4: World, tmp_path: Path) -> None:
    saved, after = world4.run(checkpoint_case, str(tmp_path))[0]
    loaded, again = resumed(str(tmp_path), None, "ep")
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
        torch.testing.assert_close(again[name], after[name], rtol=2e-3, atol=2e-4)


def pretrained_case(folder: str) -> None:
    """save_pretrained of uneven experts and of cut ones is the plain model's; a whole checkpoint loads into each."""
    plain = mixtral(num_local_experts=5)
    for way in ("ep", "tp"):
        model = sp.parallelize(mixtral(num_local_experts=5), dist.group.WORLD, experts=way)
        model.save_pretrained(f"{folder}/{way}")
        read = type(plain).from_pretrained(f"{folder}/{way}")
        for (name, got), want in zip(read.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(got, want), (way, name)
        changed = {name: value + 1 for name, value in plain.state_dict().items()}
        model.load_state_dict(changed)
        for name, value in sp.full_state_dict(model).items():
            assert torch.equal(value, changed[name]), (way, name)
        mine = f"{folder}/{way}{dist.get_rank()}"
        torch.save(model.state_dict(), mine)
        model.load_state_dict(plain.state_dict())
        model.load_state_dict(torch.load(mine))
        for name, value in sp.full_state_dict(model).items():
            assert torch.equal(value, changed[name]), (way, name)


def test_files(world4: World, tmp_path: Path) -> None:
    world4.run(pretrained_case, str(tmp_path))
