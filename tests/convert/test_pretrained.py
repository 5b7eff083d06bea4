"""What Transformers and peft do with a converted model: saved whole, adapted only where that is trained right."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import Shard

import seqpar_kernels as sp
from seqpar_kernels.convert.hf.pretrained import describe_ranks

from ..world import World
from .models import MODELS, VOCAB, assert_same_gradients, gpt2, group, llama, transformers
from .test_state import assert_identical


def save_case(kind: str, loss_parallel: bool, folder: str) -> None:
    model = MODELS[kind]()
    own = set(vars(model))
    sp.parallelize(model, group(), loss_parallel=loss_parallel)
    assert model.tp_size == 2
    model.save_pretrained(folder)
    if group().rank() == 0:  # a whole model with the same configuration object saves without the others
        type(model)(model.config).save_pretrained(f"{folder}/whole")
    plain, before = type(model).from_pretrained(folder), MODELS[kind]()
    for (name, got), expected in zip(plain.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(got, expected), name
    sp.unparallelize(model)
    assert set(vars(model)) == own and model.tp_size is None


@pytest.mark.parametrize(("kind", "loss_parallel"), [("gpt2", True), ("llama", False)])
def test_save_pretrained_writes_the_whole_model(world2: World, tmp_path: Path, kind: str, loss_parallel: bool) -> None:
    world2.run(save_case, kind, loss_parallel, str(tmp_path))


def test_models_that_are_not_of_transformers_need_no_configuration() -> None:
    model: Any = nn.Module()
    model.save_pretrained = lambda *args, **kwargs: None
    describe_ranks(model, types.SimpleNamespace(size=lambda: 2))  # type: ignore[arg-type]
    assert model._tp_size == 2 and not hasattr(model, "config")


def phi3() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


def trained(g: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sp.parallelize(phi3(), g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model, optimizer


def unequal_case(folder: str, alone: bool, saves: bool) -> dict[str, torch.Tensor]:
    """Save or load; q|k|v of 32, 8 and 8 rows. The whole model, and the whole first moments under names with ``:``."""
    model, optimizer = trained(None if alone else group())
    if not saves:
        for param in model.parameters():
            param.detach().zero_()
        for entry in optimizer.state.values():
            entry["exp_avg"].zero_()
    state = {"model": sp.sharded_state_dict(model), "optimizer": sp.sharded_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (dcp.save if saves else dcp.load)(state, checkpoint_id=folder)
    if not saves:
        model.load_state_dict(state["model"])
        sp.load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])
    found = sp.full_state_dict(model)
    cuts = model._seqpar.cuts  # type: ignore[union-attr]
    for name, param in model.named_parameters():
        moment = optimizer.state[param]["exp_avg"]
        if not alone:
            spec = cuts[name].spec
            moment = moment.to_local() if spec is None else sp.nn.full_tensor(moment.to_local(), spec, group())
        found[f"{name}:exp_avg"] = moment
    return found


def test_unequal_sections_save_on_two_load_on_one_and_back(world2: World, tmp_path: Path) -> None:
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    saved = world2.run(unequal_case, two, False, True)[0]
    assert_identical(unequal_case(two, True, False), saved)
    saved = unequal_case(one, True, True)
    for got in world2.run(unequal_case, one, False, False):
        assert_identical(got, saved)


def placement_case() -> None:
    """Unequal sections lie in several rectangles: whoever puts the DTensor together gets the whole."""
    model = sp.parallelize(phi3(), group())
    full, plain = sp.full_state_dict(model), phi3().state_dict()
    for name, param in model.named_parameters():
        assert torch.equal(param.full_tensor(), plain[name]), name
        assert torch.equal(full[name], plain[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), plain[name]), name
    for name, value in get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)).items():
        assert torch.equal(value, plain[name]), name
    ids = torch.randint(VOCAB, (2, 9))
    model(ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    gradients = sp.gather_full_gradients(model)
    for name, param in model.named_parameters():
        assert torch.equal(param.grad.full_tensor(), gradients[name]), name
    packed = model.state_dict()["model.layers.0.self_attn.qkv_proj.weight"]
    with pytest.raises(NotImplementedError, match="packed sections"):
        packed.redistribute(placements=[Shard(1)])


def test_unequal_sections_are_put_together(world2: World) -> None:
    world2.run(placement_case)


def adapt_case(before_conversion: bool) -> None:
    import peft

    everywhere = peft.LoraConfig(target_modules=["q_proj", "o_proj"])
    if before_conversion:
        for adapted in (
            peft.get_peft_model(llama(), everywhere),
            peft.get_peft_model(llama(), everywhere).base_model.model,
        ):
            with pytest.raises(ValueError, match=r"of peft, and an adapter on what parallelize cuts"):
                sp.parallelize(adapted, group())
        merged = peft.get_peft_model(llama(), everywhere).merge_and_unload()
        sp.parallelize(merged, group())
        return
    with pytest.raises(ValueError, match="Target module ColumnParallelLinear"):  # peft's own refusal
        peft.get_peft_model(sp.parallelize(llama(), group()), everywhere)
    ids = torch.randint(VOCAB, (2, 9))
    parameters = peft.LoraConfig(target_parameters=["c_fc.weight"], target_modules=["lm_head"])
    model = sp.parallelize(gpt2(), group())
    model(ids)  # has run before
    with pytest.raises(ValueError, match="ParamWrapper of peft"):
        peft.get_peft_model(model, parameters)(input_ids=ids, labels=ids)
    for config in (
        peft.LoraConfig(target_modules=["lm_head", "embed_tokens"]),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):  # what is whole on every rank
        found = []
        for g in (group(), None):
            base = sp.parallelize(llama(), g).eval()
            torch.manual_seed(1)
            adapted = peft.get_peft_model(base, config).eval()
            adapted(input_ids=ids, labels=ids).loss.backward()
            found.append([p.grad for p in adapted.parameters() if p.requires_grad])
        assert len(found[0]) == len(found[1]) > 0
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before_conversion", [True, False])
def test_adapters(world2: World, before_conversion: bool) -> None:
    pytest.importorskip("peft")
    world2.run(adapt_case, before_conversion)


def compiled_case() -> None:
    """Norms on heads take their parameters by name: a listed one is a DTensor that torch.compile takes for plain."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    ids = torch.randint(VOCAB, (2, 9))
    found = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = sp.parallelize(transformers.Qwen3ForCausalLM(config), group())
        call = torch.compile(model, backend="aot_eager") if compiled else model
        torch._dynamo.reset()  # what other tests have compiled here counts against the limit of recompilations
        torch._dynamo.utils.counters.clear()
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert not torch._dynamo.utils.counters["graph_break"], torch._dynamo.utils.counters["graph_break"]
        found.append(sp.gather_full_gradients(model))
    assert_same_gradients(found[1], found[0])


def test_compiled_with_norms_on_heads(world2: World) -> None:
    world2.run(compiled_case)
