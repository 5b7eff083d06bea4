"""fully_shard over the data-parallel dimension of a 2-D mesh, on top of a converted model: 2 x 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import seqpar_kernels as sp

from ..world import RankError, World
from .models import MODELS, VOCAB, assert_same_gradients, assert_same_loss
from .test_parallelize import PLAN, Own

CASES = [("gpt2", False), ("gpt2", True), ("llama", False), ("llama", True)]


def blocks(model: Any) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def sharded(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in blocks(model):
        fully_shard(block, mesh=mesh["dp"], **options)
    return fully_shard(model, mesh=mesh["dp"], **options)


def options_of(kind: str) -> dict[str, Any]:
    """Dropout masks follow the rows of a rank's own batch: the data-parallel ranks of a run of one have other rows."""
    return {"resid_pdrop": 0.0, "embd_pdrop": 0.0} if kind == "gpt2" else {}


def steps(model: nn.Module, batches: list[Tensor], clip: float | None = None) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients, norms = [], {}, []
    for step in range(2):
        for batch in batches:  # accumulated
            loss = model(batch, labels=batch).loss / len(batches)
            loss.backward()
            losses.append(loss.item())
        if step == 0:
            gradients = sp.gather_full_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, norms, sp.full_state_dict(model)


def training_case(kind: str, loss_parallel: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    options = options_of(kind)
    ids = torch.randint(VOCAB, (2, 2, 9))  # two accumulated batches of two sequences
    whole = sp.parallelize(MODELS[kind](**options), None)
    expected = steps(whole, list(ids))
    model = sp.parallelize(MODELS[kind](**options), mesh["tp"], loss_parallel=loss_parallel)
    model = sharded(model, mesh)
    mine = mesh["dp"].get_local_rank()
    got = steps(model, [batch[mine : mine + 1] for batch in ids])
    mean = torch.tensor(got[0])
    torch.distributed.all_reduce(mean, group=mesh["dp"].get_group())
    for a, b in zip((mean / 2).tolist(), expected[0], strict=True):
        assert_same_loss(a, b)
    assert_same_gradients(got[1], expected[1])
    for a, b in zip(got[2], expected[2], strict=True):
        assert abs(a - b) <= 1e-4 * b
    for name, tensor in expected[3].items():
        torch.testing.assert_close(got[3][name], tensor, rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert all(isinstance(p, DTensor) and p.device_mesh.ndim == 2 for p in model.parameters())


@pytest.mark.parametrize(("kind", "loss_parallel"), CASES)
def test_two_by_two_equals_the_unsharded_run(world4: World, kind: str, loss_parallel: bool) -> None:
    world4.run(training_case, kind, loss_parallel)


def mixed_case(kind: str) -> None:
    """bfloat16 compute, float32 gradients: as near to fp32 as the unsharded model under the same policy is."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    options = options_of(kind)
    batch = torch.randint(VOCAB, (2, 9))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mine = mesh["dp"].get_local_rank()
    results = []
    for cut, mp in ((False, None), (False, policy), (True, policy)):
        model = MODELS[kind](**options)
        if cut:
            model = sharded(sp.parallelize(model, mesh["tp"], loss_parallel=True), mesh, mp_policy=mp)
        elif mp is not None:
            model = sp.parallelize(model, None)
            for block in blocks(model):
                fully_shard(block, mesh=mesh["dp"], mp_policy=mp)
            model = fully_shard(model, mesh=mesh["dp"], mp_policy=mp)
        else:
            model = sp.parallelize(model, None)
        part = batch if mp is None else batch[mine : mine + 1]
        model(part, labels=part).loss.backward()
        results.append({n: g.double() for n, g in sp.gather_full_gradients(model).items()})
    exact, reference, got = results
    for name in exact:
        scale = exact[name].abs().max()
        budget = 2 * ((reference[name] - exact[name]).abs().max() + 2.0**-8 * scale)
        assert (got[name] - exact[name]).abs().max() <= budget, name


@pytest.mark.parametrize("kind", MODELS)
def test_mixed_precision(world4: World, kind: str) -> None:
    world4.run(mixed_case, kind)


def save_case(kind: str, folder: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = sharded(sp.parallelize(MODELS[kind](), mesh["tp"], loss_parallel=True), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.randint(VOCAB, (1, 9))
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    state = {"model": sp.sharded_state_dict(model), "optimizer": sp.sharded_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    full = sp.full_state_dict(model)
    for param in model.parameters():
        param.detach()._local_tensor.zero_()
    dcp.load({"model": sp.sharded_state_dict(model)}, checkpoint_id=folder)
    again = sp.full_state_dict(model)
    assert all(torch.equal(again[name], full[name]) for name in full)
    fresh = sharded(sp.parallelize(MODELS[kind](), mesh["tp"], loss_parallel=True), mesh)
    fresh.load_state_dict(full)  # a plain checkpoint
    again = sp.full_state_dict(fresh)
    assert all(torch.equal(again[name], full[name]) for name in full)
    return full


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_of_two_by_two_loads_on_one(world4: World, tmp_path: Path, kind: str) -> None:
    full = world4.run(save_case, kind, str(tmp_path))[0]
    model = sp.parallelize(MODELS[kind](), None, loss_parallel=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": sp.sharded_state_dict(model), "optimizer": sp.sharded_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=str(tmp_path))
    for name, tensor in full.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(entry["exp_avg"].any() for entry in state["optimizer"]["state"].values())


def missed_case() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {pattern: style for pattern, style in PLAN.items() if pattern != "blocks.*.scale"}
    model = sp.parallelize(Own(), mesh["tp"], plan)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])(torch.randint(11, (2, 8)))


def test_what_the_plan_misses_is_named_behind_fully_shard_too(world4: World) -> None:
    """Its parameters are tensors made anew at each use, in memory that was and will be other tensors'."""
    with pytest.raises(RankError) as caught:
        world4.run(missed_case)
    message = "blocks.0.scale: a sequence shard reaches parameter 'blocks.0.scale.gain'"
    assert all(not ok and message in text for ok, text in caught.value.outcomes), caught.value
