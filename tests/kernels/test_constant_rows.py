"""Rows that hardly vary: the mean must be as exact as torch's, for its error is divided by sqrt(variance + eps)."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import native, reference
from seqpar_kernels.kernels.spec import NormKind, NormSpec, NormStores, NormTensors, RowMap

from . import cuda_host

SIZES = (1, 2, 3, 7, 8, 63, 64, 65, 127, 1000, 1023, 4096, 4097, 8191, 65536, 70000, 100003)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def _rows(size: int) -> dict[str, Tensor]:
    base = torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=F64)
    constants = (3.3, -0.1, 12345.678, 0.0)
    found = {f"constant {c}": torch.full_like(base, c) for c in constants}
    return found | {"noise on 1e4": base * 0.01 + 1e4, "offset 1e4": base + 1e4, "offset 10": base + 10, "plain": base}


def _oracle(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> np.ndarray:
    z = x.double().numpy().astype(np.longdouble)
    z = z - z.mean(-1, keepdims=True)
    z = z / np.sqrt((z * z).mean(-1, keepdims=True) + np.longdouble(eps))
    return z * (1 if weight is None else weight.double().numpy()) + (0 if bias is None else bias.double().numpy())


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_twice_torchs_error_at_most(size: int, dtype: torch.dtype) -> None:
    weight, bias = (torch.linspace(a, 1.5, size).to(dtype) for a in (0.5, -1.0))
    for name, rows in _rows(size).items():
        x = rows.to(dtype)
        for w, b, eps in ((None, None, 1e-5), (weight, bias, 1e-5), (weight, None, 1e-3)):
            y, plain = sp.dropout_add_layer_norm(x, None, w, b, eps=eps), F.layer_norm(x, (size,), w, b, eps)
            oracle = _oracle(x, w, b, eps)
            ours, torchs = (np.abs(t.double().numpy() - oracle).max() for t in (y, plain))
            allowed = 2 * torchs + torch.finfo(dtype).eps * np.abs(oracle).max()
            assert ours <= allowed, f"{name}, eps {eps}: error {ours:.3g}, torch {torchs:.3g}"


def test_a_constant_row_gives_zeros_and_the_gradient_of_eps() -> None:
    for size in (7, 8193, 70000):
        x = torch.full((2, size), 3.3, requires_grad=True)
        y = sp.dropout_add_layer_norm(x, None, None)
        assert not y.any()
        dy = torch.randn(2, size)
        y.backward(dy)
        expected = (dy.double() - dy.double().mean(-1, keepdim=True)) * 1e-5**-0.5
        torch.testing.assert_close(x.grad, expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [2, 3, 7, 33, 8193])
def test_gradients_of_rows_that_vary_by_the_rounding_of_their_mean(size: int, backend: str) -> None:
    """Values around 1e6 have a mean that float32 does not hold, and the backward reads that of the forward."""
    x, dy = torch.randn(6, size, generator=torch.Generator().manual_seed(1)) + 1e6, torch.randn(6, size)
    weight = torch.linspace(0.5, 1.5, size)

    def grads(t: torch.Tensor, w: torch.Tensor, norm: Callable[..., torch.Tensor]) -> list[np.ndarray]:
        inputs = [t.clone().requires_grad_(), w.clone().requires_grad_()]
        norm(*inputs).backward(dy.to(t.dtype))
        return [i.grad.double().numpy() for i in inputs if i.grad is not None]

    ours = grads(x, weight, lambda t, w: sp.dropout_add_layer_norm(t, None, w, backend=backend))
    torchs, exact = (
        grads(t, w, lambda t, w: F.layer_norm(t, (size,), w)) for t, w in ((x, weight), (x.double(), weight.double()))
    )
    for name, got, plain, oracle in zip(("dx", "dweight"), ours, torchs, exact, strict=True):
        error, allowed = np.abs(got - oracle).max(), 2 * np.abs(plain - oracle).max()
        assert error <= allowed + torch.finfo(F32).eps * np.abs(oracle).max(), f"{name}: {error:.3g} > {allowed:.3g}"


def test_squares_beyond_fp32_are_no_zeros() -> None:
    """Values of 1e20 have squares that float32 does not hold."""
    x = torch.randn(3, 500) * 1e20
    for ours, exact in (
        (sp.dropout_add_layer_norm(x, None, None), F.layer_norm(x.double(), (500,))),
        (sp.dropout_add_rms_norm(x, None, None), F.rms_norm(x.double(), (500,), eps=1e-5)),
    ):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-6)


def test_reference() -> None:
    for size in (7, 1023, 70000):
        spec = NormSpec(NormKind.LAYER, False, 1e-5, 0.0, RowMap(2, 0, 0), F32, F32, F32, F32)
        x = torch.full((2, size), 3.3)
        assert not reference.norm_forward(NormTensors(x), spec, NormStores(store_z=False)).y.any()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline", "neon"])
def test_every_instruction_set(isa: str) -> None:
    code = (
        "import torch, seqpar_kernels as sp; from seqpar_kernels.kernels import native\n"
        "print(native._native.cpu_isa())\n"
        "if not native._native.cpu_isa().startswith('invalid'):\n"
        "    for n in (7, 65, 4097, 70000):\n"
        "        for t in (torch.float32, torch.bfloat16):\n"
        "            assert not sp.dropout_add_layer_norm(torch.full((2, n), 3.3, dtype=t), None, None).any(), (n, t)\n"
    )
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"SEQPAR_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    if "invalid" in done.stdout:
        pytest.skip(f"{isa} does not run here")


@pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler to build the host-run CUDA kernels with")
@pytest.mark.parametrize("size", [1, 7, 8, 40, 64, 1000, 1032, 4096, 8192, 16384, 70000])
def test_cuda_kernels(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    host = cuda_host.HostCuda()
    host.configure()
    monkeypatch.setattr(native, "_native", host.module)
    for name in ("_prepared", "_forward_of", "_backward_of"):
        monkeypatch.setattr(native, name, functools.lru_cache(getattr(native, name).__wrapped__))
    monkeypatch.setattr(native, "_place", lambda device: (True, 0, 0))
    for dtype in (F32, BF16, F64):
        spec = NormSpec(NormKind.LAYER, False, 1e-5, 0.0, RowMap(3, 0, 0), dtype, dtype, dtype, dtype)
        for name, rows in _rows(size).items():
            x = rows.to(dtype)
            x[1] = torch.randn(size).to(dtype)  # a neighbour in the same warp that needs no care
            no_z = NormStores(store_z=False)
            out = native.norm_forward(NormTensors(x), spec, no_z)
            one = spec._replace(rows=RowMap(1, 0, 0))
            alone = native.norm_forward(NormTensors(x[1:2].clone()), one, no_z)
            assert torch.equal(out.y[1], alone.y[0]), name
            plain, oracle = F.layer_norm(x, (size,)), _oracle(x, None, None, 1e-5)
            ours, torchs = (np.abs(t.double().numpy() - oracle)[[0, 2]].max() for t in (out.y, plain))
            roundings = 64 if dtype == F64 else 4  # fp64: no more exact oracle; fp32: inverse_cols is rounded
            scale = np.abs(oracle[[0, 2]]).max()
            assert ours <= 2 * torchs + roundings * torch.finfo(dtype).eps * scale, f"{dtype} {name}: {ours} {torchs}"
