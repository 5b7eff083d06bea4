"""Bytes that converted models keep for the backward, by count, and gradients with everything made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import World
from .models import VOCAB, group, transformers

S, H, F, A, D = 16, 64, 96, 4, 16  # rows, hidden, inside the MLP, heads, head_dim
KINDS = ("gpt2", "llama", "gemma3_text", "qwen3", "olmo2")


def build(kind: str, layers: int, dtype: torch.dtype, p: float = 0.1) -> nn.Module:
    torch.manual_seed(3)
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False}
    sizes: dict[str, Any] = {"hidden_size": H, "intermediate_size": F, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": A, "num_key_value_heads": A, "max_position_embeddings": 32}
    if kind == "gpt2":
        sizes = {"n_positions": 32, "n_embd": H, "n_layer": layers, "n_head": A, "n_inner": F, "attn_pdrop": 0.0}
        sizes |= {"resid_pdrop": p, "embd_pdrop": p}
    elif kind != "llama":
        sizes |= {"head_dim": D} if kind != "olmo2" else {}
        sizes |= {"sliding_window": 32} if kind == "gemma3_text" else {}
    config = transformers.AutoConfig.for_model(kind, **sizes, **ends)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    for param in model.parameters():
        if param.dim() == 1:  # norms and biases as after training, not all ones and zeros
            param.data.add_(torch.randn(param.shape, dtype=dtype), alpha=0.3)
    return model


def ids() -> Tensor:
    return torch.randint(VOCAB, (1, S), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    loss: Tensor = model(input_ids=ids(), labels=ids()).loss
    return loss


def layer_bytes(kind: str, way: str, ranks: int) -> int:
    """What one layer keeps."""
    totals = []
    for layers in (1, 2):
        model = sp.parallelize(build(kind, layers, torch.float32), group() if ranks > 1 else None, recompute=way)
        loss_of(model).backward()  # the check's forward keeps the same, and marks
        report = sp.activation_bytes(loss_of, model)
        report.result.backward()
        totals.append(report.total)
    return totals[1] - totals[0]


def expected_bytes(kind: str, t: int) -> int:
    """Counted by hand: elements that one layer has to keep, float32."""
    rows, heads, inner = S // t * H, S * H // t, S * F // t
    stream = 2 * rows  # z of both norms
    attention = 4 * heads + S * A // t  # q, k, v and the result; the logarithm of the sum for each head and row
    statistics = 2 * S // t
    mlp = 2 * inner  # gate and up
    of_heads = 2 * (heads + S * A // t)  # inputs of the norms of heads, and their statistics
    match kind:
        case "gpt2":
            # LayerNorm has a mean too; one activation; seeds of two dropouts, 8 bytes each.
            elements = stream + attention + 2 * statistics + inner + 4
        case "llama":
            elements = stream + attention + statistics + mlp
        case "qwen3":
            elements = stream + attention + of_heads + statistics + mlp
        case "gemma3_text":
            elements = 2 * stream + attention + of_heads + 2 * statistics + mlp  # four norms on the stream
        case _:
            # No norm reads the stream: the linears keep it. Norms of heads have one number a row for all heads.
            elements = 2 * stream + attention + 2 * heads + 2 * S + statistics + mlp
    return 4 * elements


def counted_case(kind: str) -> list[int]:
    return [layer_bytes(kind, way, 2) for way in ("max", "auto", "none")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_what_cannot_be_made_again(world2: World, kind: str) -> None:
    for most, auto, none in world2.run(counted_case, kind):
        assert auto == expected_bytes(kind, 2)
        assert none > 1.2 * auto
        # The norms of heads keep what queries and keys are made of.
        assert auto - most == (0 if kind in ("gpt2", "llama") else 4 * 2 * S * H // 2)


def gradients(kind: str, way: str, dtype: torch.dtype, place: Any) -> dict[str, Tensor]:
    model = sp.parallelize(build(kind, 2, dtype), place, recompute=way)
    loss_of(model).backward()
    model.zero_grad()
    loss_of(model).backward()
    return {name: grad.double() for name, grad in sp.gather_full_gradients(model).items()}


def gradients_case(kind: str) -> None:
    """Dropout on, whose masks do not depend on the ranks: fp64 alone with nothing made again is the oracle."""
    oracle = gradients(kind, "none", torch.float64, None)
    exact = gradients(kind, "auto", torch.float64, group())
    # Transformers' norms of heads compute in float32 whatever the model's dtype is.
    within = {"rtol": 1e-3, "atol": 1e-7} if kind in ("gemma3_text", "qwen3") else {"rtol": 1e-7, "atol": 1e-9}
    for name, expected in oracle.items():
        torch.testing.assert_close(exact[name], expected, **within, msg=lambda m, n=name: f"{n}: {m}")
    for dtype in (torch.float32, torch.bfloat16):
        plain, ours, most = (gradients(kind, way, dtype, group()) for way in ("none", "auto", "max"))
        for name, expected in oracle.items():
            assert torch.equal(most[name], ours[name]), f"{name}, {dtype}"  # the same, computed later
            allowed = 2 * (plain[name] - expected).norm() + torch.finfo(dtype).eps * expected.norm()
            assert (ours[name] - expected).norm() <= allowed, f"{name}, {dtype}"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(world2: World, kind: str) -> None:
    world2.run(gradients_case, kind)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_gradients_are_those_of_the_plain_model(kind: str) -> None:
    plain = build(kind, 2, torch.float64, p=0.0)
    plain(input_ids=ids(), labels=ids()).loss.backward()
    model = sp.parallelize(build(kind, 2, torch.float64, p=0.0), None)
    loss_of(model).backward()
    got = sp.gather_full_gradients(model)
    for name, param in plain.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(got[name], param.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_arguments_and_rows_of_explain() -> None:
    with pytest.raises(ValueError, match="recompute: expected 'auto', 'none' or 'max', got 'some'"):
        sp.parallelize(build("llama", 1, torch.float32), None, recompute="some")
    for way, kept in (("auto", "0 B"), ("none", f"{S * F * 4 / 1024:.1f} KiB")):
        model = sp.parallelize(build("llama", 1, torch.float32), None, recompute=way)
        loss_of(model)
        row = next(row for row in sp.explain(model).rows if row.module.endswith("down_proj"))
        assert row.kept == kept
        assert (
            "input made again from a product" if way == "auto" else "the result of a product, and recompute='none'"
        ) in row.why
    sp.unparallelize(model)


def test_max_is_refused_under_compile() -> None:
    model = sp.parallelize(build("llama", 1, torch.float32), None, recompute="max")
    loss_of(model).backward()
    with pytest.raises(Exception, match="recompute: expected 'auto' or 'none' for a model that is compiled"):
        torch.compile(model, backend="eager")(ids())


class Bent(nn.Module):
    """GELU in several statements, with something else about it."""

    def __init__(self, scale: float = 1.0, most: float = 1e9, p: float = 0.0):
        super().__init__()
        self.scale, self.most, self.p = scale, most, p

    def forward(self, x: Tensor) -> Tensor:
        y = (self.scale * x * 0.5 * (1.0 + torch.erf(x / 2**0.5))).clamp(max=self.most)
        return nn.functional.dropout(y, self.p, self.training)


def test_what_is_no_activation_is_left_alone() -> None:
    """Attributes that repr does not show, limits far out, what happens in the other mode, hooks."""
    hooked = Bent()
    hooked.register_forward_hook(lambda module, args, out: None)
    blocks = [Bent(), Bent(scale=2.0), Bent(most=50.0), Bent(p=0.5).eval(), hooked]
    model = nn.Sequential(nn.Linear(8, 8), *blocks)
    plan = {"0": "scatter_input+replicated", "5": "gather_output"}
    sp.parallelize(model, None, plan)
    assert ["forward" in vars(block) for block in blocks[:4]] == [True, False, False, False]
    assert [block.training for block in blocks] == [True, True, True, False, True]


def test_activations_are_told_apart() -> None:
    for name, kept in (("gelu_new", 1), ("gelu_fast", 1), ("gelu_python", 1), ("quick_gelu", 2), ("relu2", 1)):
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=H, n_layer=1, n_head=A, n_inner=F, activation_function=name,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        )  # fmt: skip
        model = sp.parallelize(transformers.GPT2LMHeadModel(config).double().train(), None)
        x = torch.randn(1, S, H, dtype=torch.float64, requires_grad=True)
        mlp = model.transformer.h[0].mlp
        report = sp.activation_bytes(mlp, x)
        assert report.total == 8 * (S * H + kept * S * F), name
        plain = transformers.activations.ACT2FN[name]
        torch.testing.assert_close(mlp.act(x), plain(x), rtol=1e-6, atol=1e-6)
