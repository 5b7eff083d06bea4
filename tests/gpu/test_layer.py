"""TransformerLayer, rotation and attention with our dropout on a CUDA device, against the same on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import seqpar_kernels as sp
from seqpar_kernels.functional import causal_attention

from ..nn.test_transformer import FLAVOURS, build, our_run, whole_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_layer_computes_what_it_does_on_a_cpu(flavour: str) -> None:
    layer = build(flavour, dropout=0.0, attention_dropout=0.0).double()
    x, dy = whole_inputs(37, 1, torch.float64)
    expected = our_run(layer, x, dy)
    got = our_run(copy.deepcopy(layer).cuda(), x.cuda(), dy.cuda())
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rope_theta", [None, 10000.0])
def test_attention_drops_the_same_as_on_a_cpu(rope_theta: float | None) -> None:
    tensors = [torch.randn(2, 50, heads * 8, dtype=torch.float64) for heads in (8, 4, 4)]
    options: dict[str, Any] = {"head_dim": 8, "p": 0.3, "seed": 5, "rope_theta": rope_theta}
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in tensors]
        y = causal_attention(*leaves, **options)
        results.append([t.cpu() for t in (y, *torch.autograd.grad(y.square().sum(), leaves))])
    torch.testing.assert_close(*results)


def test_a_gpt_layer_keeps_20_sbh_at_16_bit_and_compiles() -> None:
    s, b, h, heads = 256, 2, 512, 8
    layer = sp.TransformerLayer(h, heads, dropout=0.1, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(b, s, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    report = sp.activation_bytes(layer, x)
    # Beside the 20: logsumexp (rounded up by some kernels), statistics, seeds.
    assert report.total <= 20 * s * b * h + 2 * 4 * s * b * heads + 2 * 2 * 4 * s * b + 1024
    report.result.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    layer.eval()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=2e-2, atol=2e-2)


def test_a_training_step_of_a_layer_in_a_graph() -> None:
    """Forward and backward, replayed on new inputs; what attention's own kernels round may differ between runs."""
    layer = sp.TransformerLayer(256, 4, dropout=0.0, device="cuda", dtype=torch.bfloat16)
    x, dy = (torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    leaves = [x.requires_grad_(), *layer.parameters()]

    def step() -> list[torch.Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, expected in zip(replayed, step(), strict=True):
            scale = float(expected.float().abs().max())
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * scale)
