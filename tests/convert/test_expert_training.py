"""Converted mixtures in training: explain, verify, fully_shard, Trainer, adapters, recomputation, extreme routing."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import seqpar_kernels as sp
from seqpar_kernels.convert import conversion_of
from seqpar_kernels.overlap import moe_exchange
from seqpar_kernels.overlap.messages import Messages

from ..functional.groups import on_ranks
from ..world import World
from .models import assert_same_gradients, assert_same_loss, group, transformers
from .test_experts import batch, gpt_oss, mixtral, qwen2_moe, trained
from .test_fsdp import sharded, steps
from .test_recompute import checkpointed, policy
from .test_training_loops import launched, mesh_of


def to_first(model: nn.Module) -> nn.Module:
    """Every token chooses experts 0 and 1."""
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(_first_two)
    return model


def _first_two(module: nn.Module, args: Any, output: Any) -> Any:
    logits, weights, index = output
    return logits, weights, torch.arange(index.shape[-1]).expand_as(index)


def explained_case() -> list[Any]:
    found = []
    for way, choose in (("ep", False), ("tp", False), ("ep", True)):
        model = sp.parallelize(mixtral(), group(), experts=way)
        before = next(row for row in sp.explain(model).rows if row.module == "model.layers.1.mlp.experts")
        assert "not run yet" in before.why and before.engine == way
        if choose:
            to_first(model)
        trained(model)
        assert "the fullest rank has" in str(sp.explain(model))
        found.append(next(row for row in sp.explain(model).rows if row.module == "model.layers.1.mlp.experts"))
    return found


def test_explain_says_what_travelled_and_how_full_ranks_are(world2: World) -> None:
    rows, others = world2.run(explained_case)
    assert rows == others
    ep, tp, first = rows
    assert ep.style == "experts" and (ep.engine, tp.engine) == ("ep", "tp")
    # 2 x 7 and 2 x 6 tokens: every one goes to the other rank. 32 features in fp32, 8 bytes for each of 2 experts.
    assert "tokens sent by the ranks: 14, 12; the fullest rank has 1.00 x the mean" in tp.why
    assert tp.wire == f"{(14 * (128 + 16) + 12 * 128) / 1024:.1f} KiB"
    assert "tokens sent by the ranks: 0, 12; the fullest rank has 2.00 x the mean" in first.why
    assert "tokens sent by the ranks: " in ep.why


def unsummed_router(model: nn.Module) -> None:
    """What an implementation that forgets the sum over ranks does: each rank's router gets its own tokens' part."""
    region, router = conversion_of(model).region, model.model.layers[0].mlp.gate.weight
    summing = region.summing

    def some(*params: Any) -> list[Any]:
        return list(params) if any(param is router for param in params) else summing(*params)

    region.summing = some


def verified_case() -> tuple[list[str], list[tuple[str, str, str]]]:
    ids = batch()
    worst = []
    for make, way in ((mixtral, "ep"), (qwen2_moe, "tp"), (gpt_oss, "ep")):
        plain = make()
        model = sp.parallelize(copy.deepcopy(plain), group(), experts=way)
        found = sp.verify(model, plain, {**ids, "output_router_logits": True}, verbose=False)
        assert found.ok, str(found)
        gradients = {row.name for row in found.rows if row.what == "gradient"}
        assert gradients == {name for name, _ in plain.named_parameters()}
        worst.append(found.worst.verdict)
    plain = mixtral()
    model = sp.parallelize(copy.deepcopy(plain), group())
    unsummed_router(model)
    found = sp.verify(model, plain, ids, verbose=False)
    assert not found.ok
    return worst, [(row.what, row.name, row.verdict) for row in found.rows if row.verdict != "ok"]


def test_verify_finds_a_router_whose_gradient_is_not_summed(world2: World) -> None:
    """The published mistake: loss and logits are right, and every gradient but the router's."""
    for worst, wrong in world2.run(verified_case):
        assert worst == ["ok"] * 3
        assert [(what, name) for what, name, _ in wrong] == [("gradient", "model.layers.0.mlp.gate.weight")], wrong


def fsdp_case(way: str, count: int, folder: str) -> dict[str, Tensor]:
    """2 x 2 ranks: losses, gradients (that of an expert is neither halved nor doubled), norms, steps."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    ids = torch.randint(3, 51, (2, 2, 9))
    expected = steps(sp.parallelize(mixtral(num_local_experts=count), None), list(ids))
    model = sp.parallelize(mixtral(num_local_experts=count), mesh["tp"], experts=way)
    model = sharded(model, mesh)
    mine = mesh["dp"].get_local_rank()
    got = steps(model, [part[mine : mine + 1] for part in ids])
    assert_same_gradients(got[1], expected[1])
    for a, b in zip(got[2], expected[2], strict=True):
        assert abs(a - b) <= 1e-4 * b
    for name, tensor in expected[3].items():
        torch.testing.assert_close(got[3][name], tensor, rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    dcp.save(sp.sharded_state_dict(model), checkpoint_id=folder)
    fresh = sharded(sp.parallelize(mixtral(num_local_experts=count), mesh["tp"], experts=way), mesh)
    fresh.load_state_dict(got[3])  # a plain checkpoint
    again = sp.full_state_dict(fresh)
    assert all(torch.equal(again[name], value) for name, value in got[3].items())
    return got[3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "count"), [("ep", 5), ("tp", 4)])
def test_fully_shard_over_another_axis(world4: World, tmp_path: Path, way: str, count: int) -> None:
    full = world4.run(fsdp_case, way, count, str(tmp_path))[0]
    model = sp.parallelize(mixtral(num_local_experts=count), None)
    dcp.load(sp.sharded_state_dict(model), checkpoint_id=str(tmp_path))
    for name, tensor in full.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def trainer_case(folder: str, ranks: bool) -> list[float]:
    """Losses with the auxiliary one, and gradient norms, of two steps of Trainer."""
    from seqpar_kernels.convert.hf.trainer import SaveOptimizer, parallelism_config

    launched()
    model = mixtral(output_router_logits=True)
    sp.parallelize(model, mesh_of(1)["tp"] if ranks else None)
    args = transformers.TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        max_grad_norm=0.3, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
        parallelism_config=parallelism_config(model),
    )  # fmt: skip
    ids = torch.randint(3, 51, (4, 9), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[SaveOptimizer()])
    trainer.train()
    history = trainer.state.log_history
    return [entry[key] for key in ("loss", "grad_norm") for entry in history if key in entry]


@pytest.mark.filterwarnings("ignore")
def test_trainer(world2: World, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    expected = trainer_case(str(tmp_path), False)
    assert len(expected) == 4
    for got in world2.run(trainer_case, str(tmp_path), True):
        for one, other in zip(got, expected, strict=True):
            assert abs(one - other) <= 1e-4 * abs(other), (got, expected)


def adapters_case() -> None:
    import peft

    ids, drawn = batch(), {"init_lora_weights": False}
    experts = peft.LoraConfig(
        target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], **drawn
    )
    router = peft.LoraConfig(target_modules=[], target_parameters=["gate.weight"], **drawn)
    attention = peft.LoraConfig(target_modules=["q_proj", "o_proj"], **drawn)
    for config in (experts, router, attention):
        with pytest.raises(ValueError, match="of peft, and an adapter on what parallelize cuts would be trained wrong"):
            sp.parallelize(peft.get_peft_model(mixtral(), config), group())
        merged = peft.get_peft_model(mixtral(), config).merge_and_unload()
        expected = copy.deepcopy(merged)(**ids).loss.item()
        assert_same_loss(sp.parallelize(merged, group())(**ids).loss.item(), expected)
    for config in (experts, router):
        model = peft.get_peft_model(sp.parallelize(mixtral(), group()), config)
        with pytest.raises(ValueError, match=r"mlp\.(experts|gate).*ParamWrapper of peft"):
            model(**ids)
    with pytest.raises(ValueError, match="Target module ColumnParallelLinear"):  # peft's own
        peft.get_peft_model(sp.parallelize(mixtral(), group()), attention)
    found = []
    for converted in (False, True):
        base = sp.parallelize(mixtral(), group()) if converted else mixtral()
        torch.manual_seed(5)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"], **drawn))
        model(**ids).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()})
    assert len(found[0]) == 2
    assert_same_gradients(found[1], found[0])


def test_adapters(world2: World) -> None:
    pytest.importorskip("peft")
    world2.run(adapters_case)


def counted(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """Gradients, how often tokens and gradients were dispatched, and the bytes that this rank sent for it."""
    begun, bytes_sent = {"forward": 0, "backward": 0}, 0
    messages, post = moe_exchange.Call.messages, Messages.post

    def counting(self: Any, direction: str, details: str) -> Any:
        begun[direction] += 1
        return messages(self, direction, details)

    def weighing(self: Any, sends: Any, receives: Any) -> None:
        nonlocal bytes_sent
        bytes_sent += sum(t.numel() * t.element_size() for *_, t in sends)
        post(self, sends, receives)

    moe_exchange.Call.messages, Messages.post = counting, weighing  # type: ignore[method-assign]
    try:
        trained(model)
    finally:
        moe_exchange.Call.messages, Messages.post = messages, post  # type: ignore[method-assign]
    return sp.gather_full_gradients(model), begun, bytes_sent


def recompute_case(way: str) -> None:
    """A policy that keeps what our ops return keeps the dispatched tokens: they are not sent again."""
    found = {}
    keep = functools.partial(create_selective_checkpoint_contexts, policy)
    ways: dict[str, dict[str, Any] | None] = {
        "none": None,
        "full": {"use_reentrant": False},
        "selective": {"use_reentrant": False, "context_fn": keep},
    }
    for name, options in ways.items():
        model = sp.parallelize(mixtral(), group(), experts=way).train()
        trained(model)  # the check's forward calls more than a forward does
        model.zero_grad()
        if options is not None:
            checkpointed(model, **options)
            trained(model)
            model.zero_grad()
        found[name] = counted(model)
    for name in ("full", "selective"):
        assert_same_gradients(found[name][0], found["none"][0])
    layers = 2
    assert found["none"][1] == found["selective"][1] == {"forward": layers, "backward": layers}
    assert found["none"][2] == found["selective"][2] < found["full"][2]
    assert found["full"][1] == {"forward": 2 * layers, "backward": layers}


@pytest.mark.parametrize("way", ["ep", "tp"])
def test_recomputation_that_keeps_our_ops_dispatches_once(world2: World, way: str) -> None:
    world2.run(recompute_case, way)


def extreme_case(group: dist.ProcessGroup, way: str) -> None:
    """A rank without a token, experts without one, all tokens to two experts of one rank."""
    heads = dict(hidden_size=48, num_attention_heads=12, num_key_value_heads=12, intermediate_size=24)
    for length, choose in ((1, False), (group.size() + 1, True), (group.size() - 1, False)):
        ids = torch.randint(3, 51, (1, length), generator=torch.Generator().manual_seed(4))
        plain, model = mixtral(**heads), sp.parallelize(mixtral(**heads), group, experts=way)
        for some in (plain, model):
            if choose:
                to_first(some)
            out = some(input_ids=ids, use_cache=False, output_router_logits=True)
            (out.logits.square().mean() + out.aux_loss).backward()
        gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert_same_gradients(sp.gather_full_gradients(model), gradients)


@pytest.mark.parametrize("way", ["ep", "tp"])
def test_ranks_and_experts_without_tokens(world4: World, way: str) -> None:
    world4.run(on_ranks, extreme_case, way)


def converted_case() -> None:
    """Experts of a converted mixture that accumulate over two micro-batches; all else has its gradients as before."""
    for way in ("ep", "tp"):
        plain = gpt_oss(num_local_experts=5)
        model = sp.parallelize(gpt_oss(num_local_experts=5), dist.group.WORLD, experts=way)
        experts = [module for module in model.modules() if isinstance(module, sp.Experts)]
        for module in experts:
            module.accumulate_into_main_grad = True
            for weight in (module.gate_up_proj, module.down_proj):
                weight.main_grad = torch.zeros_like(weight)
        for _ in range(2):
            trained(plain)
            trained(model)
        for module in experts:
            for weight in (module.gate_up_proj, module.down_proj):
                assert weight.grad is None
                weight.grad = weight.main_grad
        gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert len(experts) == 2
        assert_same_gradients(sp.gather_full_gradients(model), gradients)


def test_a_converted_mixture(world2: World) -> None:
    world2.run(converted_case)
