"""Small random Hugging Face models, and running them sharded beside unsharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import seqpar_kernels as sp

transformers = pytest.importorskip("transformers")


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        **{"vocab_size": 51, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, **options},
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        **{"vocab_size": 51, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 8, "num_key_value_heads": 4, **options}
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "llama": llama}
VOCAB = 51  # no multiple of 2 or 4


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_trains_alike(name: str, plain: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    """Two forwards of each, the first of them checked, and the gradients of the second."""
    for _ in range(2):
        expected, got = plain(x), model(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
    expected.square().mean().backward()
    got.square().mean().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert_same_gradients(sp.gather_full_gradients(model), gradients)


def assert_same_loss(got: float, expected: float) -> None:
    assert abs(got - expected) <= 1e-5 * abs(expected), (got, expected)
