"""The fused norm as PyTorch operations that a compiler fuses with their neighbours, and as tracers see it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import RowMap
from seqpar_kernels.kernels.reference import dropout_mask

from .test_norm import NORMS, device, run, tensors  # noqa: F401


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", NORMS)
def test_decomposition(kind: str, p: float) -> None:
    """Through AOTAutograd: of our ops the random bits alone are left, and the bits are those of the fused op."""
    from torch._dynamo.backends.common import aot_autograd

    seen: list[str] = []

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    t = tensors((2, 5, 37), torch.float32, kind)
    leaves = [v for v in t.values() if v is not None]
    fn = lambda: run(kind, t, p=p, seed=9)  # noqa: E731
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, decompositions=sp.ops.decompositions)
    expected, got = fn(), torch.compile(fn, fullgraph=True, backend=backend)()
    torch.testing.assert_close(got, expected)
    grads = [torch.randn_like(e) for e in expected]
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grads), torch.autograd.grad(expected, leaves, grads))
    ours = [target for target in seen if "seqpar" in target]
    assert seen and ours == (["seqpar.dropout_kept.default"] * 2 if p else [])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_inductor_fuses_the_norm_with_its_neighbours(p: float) -> None:
    """gelu, residual add, RMSNorm and what follows: forward and backward are inductor's, the elements dropped ours."""
    from torch._inductor.utils import run_and_get_code

    x, residual = (torch.randn(4, 6, 96, requires_grad=True) for _ in range(2))
    w = torch.randn(96, requires_grad=True)

    def fn(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, z = sp.dropout_add_rms_norm(F.gelu(x), residual, w, p=p, seed=11, prenorm=True)
        return y.sin(), z

    def both(fn: Any) -> tuple[Tensor, ...]:
        y, z = fn(x, residual, w)
        return (y, z, *torch.autograd.grad((y.sum() + (z * z).sum()), (x, residual, w)))

    compiled = torch.compile(fn, fullgraph=True, backend=sp.inductor_fusion)
    got, code = run_and_get_code(lambda: both(compiled))
    torch.testing.assert_close(got, both(fn), rtol=1e-4, atol=1e-4)
    calls = re.findall(r"torch\.ops\.seqpar\.(\w+)\.default\(", "".join(code))
    assert len(code) == 2 and calls == (["dropout_kept"] * 2 if p else [])


def test_opcheck_of_the_random_bits() -> None:
    args = (torch.tensor(5), 6, 40, 0.3, 3, 100, 7, "", False)
    torch.library.opcheck(torch.ops.seqpar.dropout_kept.default, args)
    kept = torch.ops.seqpar.dropout_kept.default(*args)
    assert torch.equal(kept != 0, dropout_mask(6, 40, 0.3, torch.tensor(5), RowMap(3, 100, 7)))


def test_meta_tensors_and_symbolic_tracing() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.empty(2, 3, 8, device="meta")
    y, z = sp.dropout_add_layer_norm(x, x, torch.ones(8, device="meta"), prenorm=True)
    assert y.shape == z.shape == x.shape and y.device.type == "meta"
    graph = make_fx(lambda x: sp.dropout_add_rms_norm(x, x, None), tracing_mode="symbolic")(torch.randn(2, 3, 8))
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(graph(x), sp.dropout_add_rms_norm(x, x, None))
