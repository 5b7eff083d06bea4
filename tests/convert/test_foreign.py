"""Modules that are not what their class says, and plans that do not fit: converted right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.convert import ParallelPlan

from ..world import RankError, World
from .models import VOCAB, assert_same_gradients, gpt2, group, llama


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclassed(model: Any) -> None:
    old = model.model.layers[0].mlp.up_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.model.layers[0].mlp.up_proj = new


def patched(model: Any) -> None:
    for module in (model.model.layers[0].mlp.gate_proj, model.model.layers[1].self_attn.o_proj):
        forward = module.forward
        module.forward = lambda x, forward=forward: 2 * forward(x)


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


CHANGES: dict[str, Callable[[Any], None]] = {"subclass": subclassed, "patch": patched, "weight_norm": parametrized}


def changed_case(change: str) -> None:
    ids = torch.randint(VOCAB, (2, 9))
    plain, model = llama(), llama()
    for m in (plain, model):
        CHANGES[change](m)
    sp.parallelize(model, group())
    a, b = plain(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-4, atol=1e-5)
    a.loss.backward()
    b.loss.backward()
    expected = {name: param.grad for name, param in plain.named_parameters()}
    assert_same_gradients(sp.gather_full_gradients(model), expected)
    assert "runs whole on every rank" in str(sp.explain(model))


@pytest.mark.parametrize("change", CHANGES)
def test_a_linear_that_computes_something_else_runs_whole(world2: World, change: str) -> None:
    world2.run(changed_case, change)


class Attention(nn.Module):
    """Head size by inference: the wrong number of heads would look right."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


PLAN = {"0": "scatter_input+gather_output", "0.norm": "norm", "0.qkv": "colwise:3", "0.out": "rowwise"}


def attention(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Attention())


def plans_case() -> None:
    x = torch.randn(2, 8, 16)

    def refused(
        message: str, change: Callable[[Any], None] = lambda _: None, styles: Any = None, **fields: Any
    ) -> None:
        model = attention()
        change(model)
        before = {name: param.shape for name, param in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            sp.parallelize(model, group(), ParallelPlan({**PLAN, **(styles or {})}, **fields))
        assert before == {name: param.shape for name, param in model.named_parameters()}, "the model was changed"
        assert model[0].heads == 4

    refused(r"plan.divided\['0.attn'\]: matches no module of Sequential", divided={"0.attn": ("heads",)})
    refused(r"plan.divided\['0'\]: 0 has no integer attribute 'num_heads'", divided={"0": ("num_heads",)})
    refused(r"plan.assigned\['1'\]: matches no module", assigned={"1": {"heads": 2}})
    refused(r"plan.cut\['0'\]: 0 has no parameter 'sinks'", cut={"0": ("sinks",)})
    refused(r"plan.scattered\['0'\]: 0.forward has no argument 'rows'", scattered={"0": ("rows",)})
    refused(r"plan.heads: expected integer attributes of model.config, it has no 'n'", heads=("n",))
    refused(
        "0.qkv: style 'shared_heads:3' takes a divisor of the 2 ranks and of the 48 output features",
        styles={"0.qkv": "shared_heads:3"}, divided={"0": ("heads",)},
    )  # fmt: skip
    refused(
        "0.qkv: style 'colwise': module: expected a weight that is a parameter, got ParametrizedLinear",
        lambda model: nn.utils.parametrizations.weight_norm(model[0].qkv),
    )
    refused(
        "0.out: style 'rowwise': module: expected torch.nn.Linear with its own forward, got Linear",
        lambda model: setattr(model[0].out, "forward", lambda x: x),
    )
    model = attention()
    model[0].norm.forward = lambda x: 3 * nn.functional.layer_norm(x, (16,), model[0].norm.weight)  # type: ignore
    with pytest.raises(ValueError, match=r"0\.norm: style 'norm'"):
        sp.parallelize(model, group(), ParallelPlan(PLAN, divided={"0": ("heads",)}))
    right = sp.parallelize(attention(), group(), ParallelPlan(PLAN, divided={"0": ("heads",)}))
    torch.testing.assert_close(right(x), attention()(x), rtol=1e-5, atol=1e-6)


def test_plans_that_do_not_fit(world2: World) -> None:
    world2.run(plans_case)


class Twice(nn.Module):
    """One norm in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.LayerNorm(16)
        nn.init.normal_(self.first.weight)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.down(self.up(self.first(x)).tanh()))


def shared_case(alone: bool) -> None:
    plan = {"0": "scatter_input+gather_output", "0.first": "norm", "0.up": "colwise", "0.down": "rowwise"}
    x = torch.randn(2, 8, 16)
    torch.manual_seed(1)
    plain = nn.Sequential(Twice())
    torch.manual_seed(1)
    model = sp.parallelize(nn.Sequential(Twice()), None if alone else group(), plan)
    a, b = plain(x), model(x)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    a.square().sum().backward()
    b.square().sum().backward()
    assert_same_gradients(sp.gather_full_gradients(model), {n: p.grad for n, p in plain.named_parameters()})  # type: ignore
    sp.unparallelize(model)
    assert model[0].first is model[0].second  # type: ignore[index]
    torch.testing.assert_close(model(x), a)


def test_a_module_that_serves_twice(world2: World) -> None:
    world2.run(shared_case, False)
    shared_case(True)


def ranks_differ_case(option: str) -> None:
    options: dict[str, Any] = {
        "loss_parallel": {"loss_parallel": bool(group().rank())},
        "plan": {"plan": {"transformer.h.0": "scatter_input"} if group().rank() else None},
        "seq_dim": {"seq_dim": -2 - group().rank()},
    }[option]
    sp.parallelize(gpt2(), group(), **options)


@pytest.mark.parametrize("option", ["loss_parallel", "plan", "seq_dim"])
def test_ranks_that_convert_differently_are_refused(world2: World, option: str) -> None:
    with pytest.raises(RankError) as caught:
        world2.run(ranks_differ_case, option)
    assert all(
        not ok and "the ranks disagree" in text and "parallelize number" in text for ok, text in caught.value.outcomes
    )


def attentions_case() -> None:
    model = sp.parallelize(llama(attn_implementation="eager"), group())
    ids = torch.randint(VOCAB, (2, 9))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="output_attentions: expected False, the attention weights of a tensor-par"
        ):
            model(ids, output_attentions=True)
    model(ids)


def test_attention_weights_of_some_heads_are_refused(world2: World) -> None:
    world2.run(attentions_case)


def arguments_case() -> None:
    g = group()

    def refused(message: str, model: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            sp.parallelize(model, g, *args, **options)

    refused("model: expected a torch.nn.Module, got 3", 3)
    refused("seq_dim: expected a dimension other than the last, or None, got 'a'", llama(), seq_dim="a")
    refused("seq_dim: expected a dimension other than the last, or None, got -1", llama(), seq_dim=-1)
    refused("loss_parallel: expected True or False, got 'yes'", llama(), loss_parallel="yes")
    refused(r"plan\['norm'\]: expected a name pattern and its styles as text, got 3", llama(), {"norm": 3})
    with torch.device("meta"):
        model = llama()
    refused("got model.embed_tokens.weight on the meta device; materialise it first", model)
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"  # type: ignore[union-attr]


def test_arguments_are_checked(world2: World) -> None:
    world2.run(arguments_case)


def backward_hooks_case() -> None:
    """Hooks of the user's around a row-parallel layer: on its output, and on gradients."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    plain: Any = gpt2(**off)
    model: Any = sp.parallelize(gpt2(**off), group())
    ids = torch.randint(VOCAB, (2, 9))
    for _ in range(2):  # without, then with
        for m in (plain, model):
            m.zero_grad()
            m(ids, labels=ids).loss.backward()
        expected = {name: param.grad for name, param in plain.named_parameters()}
        assert_same_gradients(sp.gather_full_gradients(model), expected)
        for m in (plain, model):
            block = m.transformer.h[0]
            block.attn.c_proj.register_forward_hook(lambda module, args, out: out * 1.5)
            block.mlp.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))


def test_hooks_around_a_rowwise_layer(world2: World) -> None:
    world2.run(backward_hooks_case)
