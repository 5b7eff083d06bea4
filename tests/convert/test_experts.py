"""Converted mixtures of experts against the unsharded model: losses, gradients, training, saving, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.convert import conversion_of
from seqpar_kernels.convert.hf.experts import experts_form

from ..world import World
from .models import assert_same_gradients, assert_same_loss, assert_trains_alike, group

transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=51, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=64, pad_token_id=0, attn_implementation="eager",
)  # fmt: skip


def spread(model: nn.Module) -> nn.Module:
    """Random numbers in every parameter: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.05)
    return model


def mixtral(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    given = dict(intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.5)
    return spread(transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**SMALL, **given, **options})))


def qwen2_moe(**options: Any) -> nn.Module:
    """A shared expert with a gate, fed flattened rows."""
    torch.manual_seed(3)
    given = dict(
        intermediate_size=24, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=8,
        num_experts_per_tok=3, router_aux_loss_coef=0.5,
    )  # fmt: skip
    return spread(transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**{**SMALL, **given, **options})))


def gpt_oss(**options: Any) -> nn.Module:
    """Interleaved, transposed, limited, with biases and sinks."""
    torch.manual_seed(3)
    given = dict(intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, head_dim=8, layer_types=None)
    return spread(transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**SMALL, **given, **options})))


MODELS = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "gpt_oss": gpt_oss}


def batch(rows: int = 2, length: int = 13) -> dict[str, Tensor]:
    """The second text is padded at its end; the length divides by no number of ranks."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 51, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trained(model: nn.Module, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    out = model(**batch(), use_cache=False, **options)
    out.loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return out, grads


def alike_case(name: str, way: str, options: dict[str, Any]) -> None:
    plain, model = MODELS[name](), sp.parallelize(MODELS[name](), group(), experts=way)
    if options.pop("recompute", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    for _ in range(2):  # the first forward is checked, the second is not
        model.zero_grad()
        plain.zero_grad()
        expected, gradients = trained(plain, **options)
        got, _ = trained(model, **options)
        assert_same_loss(got.loss.item(), expected.loss.item())
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert_same_gradients(sp.gather_full_gradients(model), gradients)
        if options.get("output_router_logits"):
            assert_same_loss(got.aux_loss.item(), expected.aux_loss.item())
            for ours, theirs in zip(got.router_logits, expected.router_logits, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["ep", "tp"])
def test_logits_losses_and_gradients(world: World, name: str, way: str) -> None:
    world.run(alike_case, name, way, {})


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_auxiliary_loss_is_that_of_all_tokens(world4: World, name: str) -> None:
    world4.run(alike_case, name, "auto", {"output_router_logits": True})


def test_recomputed_blocks(world2: World) -> None:
    world2.run(alike_case, "mixtral", "ep", {"recompute": True})


def steps_case(way: str) -> None:
    """Five steps of AdamW: parameters as on one rank, and every rank's router the same to the bit."""
    plain, model = mixtral(), sp.parallelize(mixtral(), group(), experts=way)
    for some in (plain, model):
        optimizer = torch.optim.AdamW(some.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            trained(some, output_router_logits=True)
            optimizer.step()
    whole = sp.full_state_dict(model)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(whole[name], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    ours = model.model.layers[0].mlp.gate.weight.detach().view(1, -1)
    theirs = sp.gather_tensor_parallel(ours, group(), 0)
    assert all(torch.equal(row, theirs[0]) for row in theirs)


@pytest.mark.parametrize("way", ["ep", "tp"])
def test_steps_keep_the_router_alike(world4: World, way: str) -> None:
    world4.run(steps_case, way)


def saved_case(folder: str) -> None:
    """There and back: unparallelize, a state of whole tensors, and one loaded after another division."""
    plain = gpt_oss()
    for way, other in (("ep", "tp"), ("tp", "ep")):
        model = sp.parallelize(gpt_oss(), group(), experts=way)
        for name, value in sp.full_state_dict(model).items():
            assert torch.equal(value, plain.state_dict()[name]), name
        second = sp.parallelize(spread(gpt_oss()), group(), experts=other)
        second.load_state_dict(sp.full_state_dict(model))
        got, expected = (m(**batch(), use_cache=False).loss.item() for m in (second, plain))
        assert_same_loss(got, expected)
        back = sp.unparallelize(model)
        for name, value in plain.state_dict().items():
            assert torch.equal(back.state_dict()[name], value), name
        assert_same_loss(back(**batch(), use_cache=False).loss.item(), expected)


def test_states_and_the_way_back(world2: World) -> None:
    world2.run(saved_case, "")


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16) * 0.2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = F.linear(x, self.weight).softmax(-1).topk(2)
        return weights, index


class Mixture(nn.Module):
    """A mixture of one's own, with nn.Experts on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.router = Router()
        self.experts = sp.Experts(8, 16, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weights, index = self.router(y)
        return x + self.experts(y, index, weights)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(16, 16)
        self.block = Mixture()
        self.last = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


PLAN = {
    "block": "scatter_input",
    "block.norm": "norm",
    "block.router": "router",
    "block.experts": "experts",
    "last": "norm+gather_output",
}


def own_case(way: str) -> None:
    model = sp.parallelize(Own(), group(), PLAN, experts=way)
    assert_trains_alike(way, Own(), model, torch.randn(3, 11, 16))


@pytest.mark.parametrize("way", ["ep", "tp"])
def test_a_plan_of_ones_own(world2: World, way: str) -> None:
    world2.run(own_case, way)


def refused_case() -> None:
    forgotten = {name: style for name, style in PLAN.items() if name != "block.router"}
    model = sp.parallelize(Own(), group(), forgotten)
    with pytest.raises(RuntimeError, match=r"reaches parameter 'block\.router\.weight', which the plan does not cover"):
        model(torch.randn(3, 11, 16))
    with pytest.raises(ValueError, match=rf"multiple of the {group().size()} ranks for the .*inner dimension, got 25"):
        sp.parallelize(mixtral(intermediate_size=25), group(), experts="tp")
    with pytest.raises(ValueError, match="experts: expected 'auto', 'ep' or 'tp'"):
        sp.parallelize(mixtral(), group(), experts="both")
    for count, way in ((9, "ep"), (1, "tp")):
        model = sp.parallelize(mixtral(num_local_experts=count, num_experts_per_tok=1), group())
        assert {chosen for _, chosen in conversion_of(model).expert_forms.values()} == {way}
    with pytest.raises(ValueError, match="style 'experts': expected experts that are written for"):
        sp.parallelize(Own(), group(), {**PLAN, "first": "experts"})


def test_refused(world2: World) -> None:
    world2.run(refused_case)


def test_gates_are_told_by_what_they_compute() -> None:
    oss = experts_form(gpt_oss().model.layers[0].mlp.experts)
    assert oss.transposed and oss.bias and oss.activation.interleaved
    assert (oss.activation.alpha, oss.activation.limit, oss.activation.up_shift) == (1.702, 7.0, 1.0)
    plain = experts_form(mixtral().model.layers[0].mlp.experts)
    assert not plain.transposed and plain.activation.name == "silu" and plain.activation.limit is None
    changed = mixtral(hidden_act="gelu_pytorch_tanh").model.layers[0].mlp.experts
    assert experts_form(changed).activation.name == "gelu_tanh"
    changed.act_fn = nn.Tanh()
    with pytest.raises(ValueError, match="computes nothing that moe_mlp knows"):
        experts_form(changed)


def test_experts_that_take_rows_by_expert_are_told_by_what_they_compute() -> None:
    sizes = dict(intermediate_size=24, intermediate_size_mlp=24, num_local_experts=4, moe_layers=[0, 1], head_dim=8)
    config = transformers.Llama4TextConfig(**{**SMALL, **sizes})
    experts = spread(transformers.Llama4ForCausalLM(config)).model.layers[0].feed_forward.experts
    form = experts_form(experts)
    assert form.by_expert and form.transposed and form.activation.name == "silu"
    forward = experts.forward
    experts.forward = lambda hidden_states: 2 * forward(hidden_states)
    with pytest.raises(ValueError, match="Llama4TextExperts computes nothing that moe_mlp knows"):
        experts_form(experts)
