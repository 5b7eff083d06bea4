"""``nn.TransformerLayer`` with its default recompute, weights accumulating into ``main_grad`` over micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp

from ..world import World

KINDS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"norm": "rms", "activation": "silu", "gated": True, "bias": False, "rope_theta": 10000.0},
    "relu": {"activation": "relu", "fuse_reduce_norm": False},
    "no recompute": {"recompute_activation": False, "recompute_norm": False},
}


def layer_case(kind: str, grouped: bool) -> None:
    group = dist.group.WORLD if grouped else None
    layers = []
    for _ in range(2):
        torch.manual_seed(5)
        layers.append(sp.TransformerLayer(16, 2, intermediate_size=24, seq_dim=0, group=group, **KINDS[kind]))
    plain, into = layers
    linears = [m for m in into.children() if hasattr(m, "accumulate_into_main_grad")]
    assert len(linears) >= 6
    for linear in linears:
        linear.accumulate_into_main_grad = True  # type: ignore[assignment]
        linear.weight.main_grad = torch.zeros_like(linear.weight)  # type: ignore[assignment, arg-type]
    for micro_batch in range(2):
        torch.manual_seed(9 + micro_batch)
        x = torch.randn(6, 2, 16)
        dxs = []
        for layer in layers:
            leaf = x.clone().requires_grad_()
            layer(leaf).square().sum().backward()
            dxs.append(leaf.grad)
        assert torch.equal(*dxs)
    buffers = 0
    for (name, param), other in zip(into.named_parameters(), plain.parameters(), strict=True):
        assert other.grad is not None and other.grad.any(), name
        if hasattr(param, "main_grad"):
            assert param.grad is None, name
            torch.testing.assert_close(param.main_grad, other.grad, msg=lambda m, name=name: f"{name}: {m}")
            buffers += 1
        else:  # norms and biases: to .grad, from where Megatron's hooks take them
            torch.testing.assert_close(param.grad, other.grad, msg=lambda m, name=name: f"{name}: {m}")
    assert buffers == len(linears)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank(kind: str) -> None:
    layer_case(kind, False)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(kind: str, world2: World) -> None:
    world2.run(layer_case, kind, True)


def test_a_frozen_weight_adds_nothing() -> None:
    layer = sp.TransformerLayer(16, 2, intermediate_size=24)
    layer.down_proj.accumulate_into_main_grad = True
    layer.down_proj.weight.main_grad = torch.zeros_like(layer.down_proj.weight)  # type: ignore[assignment]
    layer.down_proj.weight.requires_grad_(False)
    layer(torch.randn(1, 4, 16)).sum().backward()
    assert layer.down_proj.weight.grad is None and not layer.down_proj.weight.main_grad.any()
    assert layer.up_proj.weight.grad is not None
