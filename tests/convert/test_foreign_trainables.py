"""Trainable tensors that the conversion does not own, and that meet a shard or this rank's heads."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

import seqpar_kernels as sp

from ..world import World
from .models import VOCAB, assert_same_gradients, gpt2, group, llama, transformers
from .test_parallelize import PLAN, Own

Model = Any
APART = "would be a different part of the sum on every rank"


def ids_of(length: int = 8) -> Tensor:
    return torch.randint(3, 11, (2, length), generator=torch.Generator().manual_seed(7))


def loss_of(model: Model) -> Tensor:
    ids = ids_of()
    if isinstance(model, Own):
        out: Tensor = model(ids).square().mean()
        return out
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.8, 1.2, size))


class Gain(nn.Module):
    def __init__(self, inner: nn.Module, size: int):
        super().__init__()
        self.inner, self.gain = inner, vector(size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.gain
        return out


class Lora(nn.Module):
    def __init__(self, inner: nn.Module, into: int, out: int):
        super().__init__()
        self.inner, self.a, self.b = inner, nn.Linear(into, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.b(self.a(x))
        return out


class Scaled(torch.autograd.Function):
    """Its arguments are not seen by torch functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return torch.from_numpy(x.detach().numpy() * gain.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        return grad * gain, (grad * x).flatten(0, -2).sum(0)


ALIAS = Scaled.apply


def at(model: Model, path: str) -> tuple[Any, str, nn.Module]:
    parent, _, child = path.rpartition(".")
    return model.get_submodule(parent), child, model.get_submodule(path)


def wrapped(path: str, size: int) -> Callable[[Model], None]:
    def add(model: Model) -> None:
        parent, child, module = at(model, path)
        setattr(parent, child, Gain(module, size))

    return add


def adapted(path: str, into: int, out: int) -> Callable[[Model], None]:
    def add(model: Model) -> None:
        parent, child, module = at(model, path)
        setattr(parent, child, Lora(module, into, out))

    return add


def patched(path: str, size: int) -> Callable[[Model], None]:
    def add(model: Model) -> None:
        module: Any = at(model, path)[2]
        module.gain, forward = vector(size), module.forward
        module.forward = lambda x: forward(x) * module.gain

    return add


def hooked(path: str, size: int, before: bool = False, registered: bool = True) -> Callable[[Model], None]:
    def add(model: Model) -> None:
        module, gain = at(model, path)[2], vector(size)
        if registered:
            module.register_parameter("gain", gain)
        if before:
            module.register_forward_pre_hook(lambda m, args: (args[0] * gain,))
        else:
            module.register_forward_hook(
                lambda m, args, out: (out[0] * gain, *out[1:]) if isinstance(out, tuple) else out * gain
            )

    return add


def steered(path: str, make: Callable[[], Tensor]) -> Callable[[Model], None]:
    """By a tensor that is no parameter of the model."""

    def add(model: Model) -> None:
        steering = make()
        at(model, path)[2].register_forward_hook(lambda m, args, out: out + steering)

    return add


def through_function(path: str, size: int) -> Callable[[Model], None]:
    def add(model: Model) -> None:
        gain = vector(size)
        at(model, path)[2].register_forward_hook(lambda m, args, out: ALIAS(out.clone(), gain))

    return add


def replaced(path: str) -> Callable[[Model], None]:
    """As libraries of fused kernels do: another class's forward, bound to the module."""

    class FusedNorm(nn.Module):
        weight: nn.Parameter

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-6)

    def add(model: Model) -> None:
        module: Any = at(model, path)[2]
        module.forward = types.MethodType(FusedNorm.forward, module)

    return add


def parametrized(path: str) -> Callable[[Model], None]:
    class Doubled(nn.Module):
        def __init__(self, like: Tensor):
            super().__init__()
            self.delta = nn.Parameter(torch.zeros_like(like))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.delta

    def add(model: Model) -> None:
        module: Any = at(model, path)[2]
        parametrize.register_parametrization(module, "weight", Doubled(module.weight), unsafe=True)

    return add


def whole_linear(path: str) -> Callable[[Model], None]:
    """A planned module replaced by one that knows nothing of ranks."""

    def add(model: Model) -> None:
        parent, child, _ = at(model, path)
        setattr(parent, child, nn.Linear(32, 24, bias=False))

    return add


def leaf() -> Tensor:
    return torch.linspace(-0.1, 0.1, 32).requires_grad_()


LAYER = "model.layers.0"
LLAMA = {
    **{
        f"{way.__name__} {spot}": (way(f"{LAYER}.{spot}", size), f"{spot}.gain")
        for way in (wrapped, patched, hooked)
        for spot, size in (
            ("mlp.down_proj", 32), ("self_attn.o_proj", 32), ("input_layernorm", 32),
            ("post_attention_layernorm", 32), ("mlp.up_proj", 24), ("mlp", 32),
        )
    },
    "before o_proj": (hooked(f"{LAYER}.self_attn.o_proj", 16, before=True), "self_attn.o_proj.gain"),
    "before gate_proj": (hooked(f"{LAYER}.mlp.gate_proj", 32, before=True), "mlp.gate_proj.gain"),
    "behind the attention": (hooked(f"{LAYER}.self_attn", 32), "self_attn.gain"),
    "LoRA on q_proj": (adapted(f"{LAYER}.self_attn.q_proj", 32, 16), "self_attn.q_proj.a.weight"),
    "LoRA on up_proj": (adapted(f"{LAYER}.mlp.up_proj", 32, 24), "mlp.up_proj.a.weight"),
    "LoRA on down_proj": (adapted(f"{LAYER}.mlp.down_proj", 24, 32), "mlp.down_proj.a.weight"),
    "steering, a leaf": (steered(LAYER, leaf), "a trainable tensor of shape (32,)"),
    "steering behind a norm": (steered(f"{LAYER}.input_layernorm", leaf), "a trainable tensor of shape (32,)"),
    "steering, computed": (steered(LAYER, lambda: leaf() * 2), "a trainable tensor of shape (32,)"),
    "steering v_proj": (steered(f"{LAYER}.self_attn.v_proj", lambda: leaf()[:8]), "a trainable tensor of shape (32,)"),
    "autograd function": (through_function(f"{LAYER}.mlp", 32), "a trainable tensor of shape (32,)"),
    "autograd function at a norm": (through_function(f"{LAYER}.input_layernorm", 32), "a trainable tensor of shape"),
    "fused norm": (replaced(f"{LAYER}.input_layernorm"), "its forward has been replaced by"),
    "parametrization": (parametrized(f"{LAYER}.self_attn.q_proj"), "'weight' is computed from other tensors"),
    "parametrized norm": (parametrized("model.norm"), "'weight' is computed from other tensors"),
    "plain linear": (whole_linear(f"{LAYER}.mlp.up_proj"), "mlp.up_proj.weight"),
}  # fmt: skip
GPT2 = {
    "wrapped c_proj": (wrapped("transformer.h.1.attn.c_proj", 32), "attn.c_proj.gain"),
    "hook on ln_1": (hooked("transformer.h.1.ln_1", 32), "ln_1.gain"),
    "hook on a dropout": (hooked("transformer.h.1.mlp.dropout", 32), "mlp.dropout.gain"),
    "steering": (steered("transformer.h.0.mlp", leaf), "a trainable tensor of shape (32,)"),
}
OWN = {
    "wrapped down": (wrapped("blocks.0.down", 16), "blocks.0.down.gain"),
    "patched sequence module": (hooked("blocks.0.scale", 16, registered=False), "a trainable tensor of shape (16,)"),
    "hook on a tensor-parallel module": (
        hooked("blocks.1.act", 4, registered=False),
        "a trainable tensor of shape (4,)",
    ),
    "patched norm": (patched("blocks.1.norm", 16), "blocks.1.norm.gain"),
}
BUILD: dict[str, tuple[Callable[[], Model], Any, dict[str, Any]]] = {
    "llama": (llama, None, LLAMA),
    "gpt2": (gpt2, None, GPT2),
    "own": (Own, PLAN, OWN),
}


def refused_case(kind: str, first: bool) -> list[str]:
    """The errors, one for each way; ``first``: before the first forward."""
    build, plan, ways = BUILD[kind]
    found = []
    for way, (add, culprit) in ways.items():
        model = sp.parallelize(build(), group(), plan).train()
        if not first:
            loss_of(model).backward()
        torch.manual_seed(2)
        add(model)
        for _ in range(2):  # trying again does not help
            with pytest.raises(RuntimeError) as caught:
                loss_of(model)
            text = str(caught.value)
            assert culprit in text and APART in text, (way, text)
            assert "parallelize" in text or "freeze" in text, (way, text)
        found.append(f"{way}: {text}")
    return found


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", BUILD)
def test_trainables_outside_the_plan_are_refused_by_name(world2: World, kind: str, first: bool) -> None:
    errors = world2.run(refused_case, kind, first)
    assert errors[0] == errors[1] and len(errors[0]) == len(BUILD[kind][2])


def test_on_four_ranks(world4: World) -> None:
    errors = world4.run(refused_case, "own", True)
    assert errors == [errors[0]] * 4


def constants(model: Model) -> None:
    """Hooks that change values by nothing that is trained, and one that only looks."""
    layer = model.model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda m, args, out: out * 1.5)
    layer.input_layernorm.register_forward_hook(lambda m, args, out: out.double().float())
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.self_attn.q_proj.register_forward_hook(lambda m, args, out: None)
    frozen = torch.linspace(-0.1, 0.1, 32)
    layer.register_forward_hook(lambda m, args, out: out + frozen)


def frozen(model: Model) -> None:
    hooked(f"{LAYER}.input_layernorm", 32)(model)
    model.model.layers[0].input_layernorm.gain.requires_grad_(False)


def whole(model: Model) -> None:
    """Where the sequence is whole."""
    for path in ("model.embed_tokens", "model.norm"):
        hooked(path, 32)(model)
    adapted("lm_head", 32, VOCAB)(model)


def _called(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _timed(_: Any) -> Callable[..., Any]:
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    return run


def accelerated(model: Model) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    for name in ("mlp.down_proj", "post_attention_layernorm", "self_attn.k_proj", "self_attn"):
        add_hook_to_module(at(model, f"{LAYER}.{name}")[2], ModelHook())


def recomputed(model: Model) -> None:
    for name in ("model.layers.0", "model.layers.1"):
        parent, child, module = at(model, name)
        setattr(parent, child, checkpoint_wrapper(module))


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Square.apply(x)  # type: ignore[no-untyped-call]
        return out


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2 * ctx.saved_tensors[0]


def activation(model: Model) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = Activation()


RIGHT = {way.__name__: way for way in (constants, frozen, whole, accelerated, recomputed, activation)}


def right_case(first: bool) -> None:
    for way, add in RIGHT.items():
        grads = []
        for model in (llama().train(), sp.parallelize(llama(), group()).train()):
            if not first:
                loss_of(model).backward()
                model.zero_grad()
            torch.manual_seed(2)
            add(model)
            for _ in range(2):
                model.zero_grad()
                loss_of(model).backward()
            whole_ones = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            grads.append(sp.gather_full_gradients(model) if getattr(model, "_seqpar", None) else whole_ones)
        got, expected = ({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gs.items()} for gs in grads)
        if way in ("whole",):  # those that came later are whole, and listed as they are
            assert all(name in got for name in expected)
        assert_same_gradients({n: got[n] for n in expected}, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_what_trains_nothing_there_stays_right(world2: World, first: bool) -> None:
    pytest.importorskip("accelerate")
    world2.run(right_case, first)


def timed_case() -> None:
    model = sp.parallelize(llama(), group())
    expected = loss_of(model).item()
    for name in ("mlp.down_proj", "input_layernorm", "self_attn.q_proj", "mlp"):
        first, second = (at(model, f"model.layers.{i}.{name}")[2] for i in (0, 1))
        first.forward = functools.partial(_called, first.forward)  # type: ignore[method-assign]
        second.forward = types.MethodType(_timed(None), second)  # type: ignore[method-assign]
    assert loss_of(model).item() == expected


def test_forwards_patched_by_what_only_looks_on(world2: World) -> None:
    world2.run(timed_case)


def thawed_case() -> None:
    """A frozen gain is right; trained later, it is refused, and frozen again it is right again."""
    model = sp.parallelize(llama(), group())
    frozen(model)
    gain = model.model.layers[0].input_layernorm.gain
    expected = loss_of(model).item()
    gain.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"input_layernorm\.gain"):
        loss_of(model)
    gain.requires_grad_(False)
    assert loss_of(model).item() == expected


def test_a_frozen_one_that_is_trained_later(world2: World) -> None:
    world2.run(thawed_case)


def arguments_case() -> None:
    from transformers import DynamicCache

    ids = ids_of()
    for build in (lambda: llama(num_key_value_heads=1), llama, gpt2):
        for first in (True, False):
            model: Any = sp.parallelize(build(), group())
            if not first:
                model(input_ids=ids, labels=ids, use_cache=False)
            bias = torch.zeros(2, 1, 8, 8).requires_grad_()
            with pytest.raises(RuntimeError, match=r"argument 'attention_mask' that is trained .*every rank.*freeze"):
                model(input_ids=ids, attention_mask=bias, labels=ids, use_cache=False)
            cache = DynamicCache(config=model.config)
            heads = 1 if getattr(model.config, "num_key_value_heads", 4) == 1 else 4
            for layer in range(2):
                keys = torch.zeros(2, heads, 3, model.config.hidden_size // model.config.num_attention_heads)
                cache.update(keys.requires_grad_(), keys + 1, layer)
            with pytest.raises(
                RuntimeError, match=r"(?s)meets (argument 'past_key_values'|a trainable).*prompt tuning"
            ):
                model(input_ids=ids, past_key_values=cache, labels=ids)


def test_trained_masks_and_prefixes_are_refused(world2: World) -> None:
    world2.run(arguments_case)


def dict_case() -> None:
    """A mask inside of an argument, in a forward after the one that was checked."""
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=51, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8,
    )  # fmt: skip
    model: Any = sp.parallelize(transformers.Qwen3ForCausalLM(config), group())
    ids, causal = ids_of(), torch.full((8, 8), -1e9).triu(1)
    for trained in (False, False, True, True):
        mask = {"full_attention": torch.zeros(1, 1, 8, 8, requires_grad=trained) + causal}
        if trained:
            with pytest.raises(RuntimeError, match=r"argument 'attention_mask' that is trained .*every rank"):
                model(input_ids=ids, labels=ids, attention_mask=mask)
        else:
            model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()


def test_a_trained_mask_inside_a_dict(world2: World) -> None:
    world2.run(dict_case)


def inner_case() -> None:
    """The decoder alone, called without the model around it."""
    for first in (True, False):
        model: Any = sp.parallelize(llama(), group())
        for _ in range(0 if first else 2):
            model.model(input_ids=ids_of()).last_hidden_state.sum().backward()
        hooked("layers.1.mlp.down_proj", 32)(model.model)
        with pytest.raises(RuntimeError, match=r"mlp\.down_proj\.gain"):
            model.model(input_ids=ids_of())
        with pytest.raises(RuntimeError, match=r"mlp\.down_proj\.gain"):
            loss_of(model)


def test_a_decoder_called_alone(world2: World) -> None:
    world2.run(inner_case)
