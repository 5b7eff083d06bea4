"""GradScaler on a converted model: an overflow that one rank alone sees skips the step on all, with one new scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, VOCAB, group, llama

SCALE = 1024.0
SCALERS: dict[str, Any] = {
    "GradScaler": lambda: torch.amp.GradScaler("cpu", init_scale=SCALE),
    "ShardedGradScaler": lambda: ShardedGradScaler("cpu", init_scale=SCALE),
}


def scaled_backward(model: nn.Module, optimizer: Any, scaler: Any) -> None:
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))
    optimizer.zero_grad()
    scaler.scale(model(ids, labels=ids).loss).backward()


def stepped(model: nn.Module, optimizer: Any, scaler: Any, poisoned: float | None, clip: bool) -> tuple[float, bool]:
    """The scale after a step in which the last rank's part of one cut gradient is ``poisoned``, and whether it moved
    any weight."""
    scaled_backward(model, optimizer, scaler)
    params = dict(model.named_parameters())
    if poisoned is not None and dist.get_rank() == dist.get_world_size() - 1:
        grad = next(p.grad for n, p in params.items() if n.endswith(("q_proj.weight", "c_attn.weight")))
        grad.to_local().view(-1)[3] = poisoned
    before = {name: param.to_local().detach().clone() for name, param in params.items()}
    if clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    moved = any(not torch.equal(before[name], param.to_local()) for name, param in params.items())
    return scaler.get_scale(), moved


def same_everywhere(value: Any) -> Any:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    assert all(other == found[0] for other in found), found
    return value


def overflow_case(kind: str, loss_parallel: bool, scaler: str, reverse: bool, fused: bool) -> None:
    model = sp.parallelize(MODELS[kind](), group(), loss_parallel=loss_parallel)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params[::-1] if reverse else params, 1e-2, fused=fused)
    made = SCALERS[scaler]()
    scale = SCALE
    for poisoned, clip in ((float("inf"), False), (float("nan"), True), (None, False), (float("-inf"), True)):
        scale = scale if poisoned is None else scale / 2
        assert same_everywhere(stepped(model, optimizer, made, poisoned, clip)) == (scale, poisoned is None)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("kind", "loss_parallel", "scaler", "fused"),
    [
        ("llama", False, "GradScaler", False),
        ("gpt2", True, "GradScaler", True),
        ("gpt2", False, "ShardedGradScaler", False),
    ],
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    world2: World, kind: str, loss_parallel: bool, scaler: str, fused: bool, reverse: bool
) -> None:
    world2.run(overflow_case, kind, loss_parallel, scaler, reverse, fused)


def data_parallel_case() -> None:
    """The rank that sees it shares neither row nor column of the mesh with rank 0."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = sp.parallelize(llama(), mesh["tp"])
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = SCALERS["GradScaler"]()
    assert same_everywhere(stepped(model, optimizer, scaler, float("inf"), False)) == (SCALE / 2, False)
    assert same_everywhere(stepped(model, optimizer, scaler, None, True)) == (SCALE / 2, True)


def test_an_overflow_with_fully_shard(world4: World) -> None:
    world4.run(data_parallel_case)


def alike_case() -> None:
    """Steps with a scale are those without; ranks that hold no row of the vocabulary take part."""
    found = []
    for scaler in (None, SCALERS["GradScaler"]()):
        model = sp.parallelize(llama(vocab_size=VOCAB), group(), loss_parallel=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            scaled_backward(model, optimizer, scaler or torch.amp.GradScaler("cpu", enabled=False))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        found.append(sp.full_state_dict(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6)
    model = sp.parallelize(llama(vocab_size=5), group(), loss_parallel=True)
    ids = torch.tensor([[1, 2, 3, 4, 0]])
    model(ids, labels=ids).loss.backward()
    empty = model.lm_head.weight.numel() == 0
    assert empty == (dist.get_rank() == 3)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), SCALERS["GradScaler"]()
    scaler.scale(torch.ones(()))
    if dist.get_rank() == 1:
        grad = next(model.parameters()).grad
        assert isinstance(grad, DTensor)
        grad.to_local()[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert same_everywhere(scaler.get_scale()) == SCALE / 2


def test_scaled_steps_are_the_steps(world4: World) -> None:
    world4.run(alike_case)
