"""On a CUDA device: the fused norm of every backend there is, against the CPU and the fp64 oracle; `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import why_not

from ..oracle import assert_within_budget

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BACKENDS = ["native", "triton"]
SHAPES = [(1, 1, 1), (3, 7, 127), (2, 33, 1000), (4, 64, 4096), (2, 3, 12289), (1, 2, 65536)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = why_not(request.param, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def case(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The same numbers on any device."""
    generator = torch.Generator().manual_seed(sum(shape))
    made = {"x": shape, "residual": shape, "weight": shape[-1:], "x_bias": shape[-1:]}
    made |= {"bias": shape[-1:]} if kind == "layer" else {}
    return {
        name: torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for name, size in made.items()
    }


def run(kind: str, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """y, z and every gradient."""
    norm = sp.dropout_add_layer_norm if kind == "layer" else sp.dropout_add_rms_norm
    y, z = norm(**tensors, prenorm=True, seed=77, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y.device, o.dtype) for o in (y, z)]
    got = torch.autograd.grad((y, z), list(tensors.values()), grads)
    return {"y": y, "z": z, **{"d" + name: g for name, g in zip(tensors, got, strict=True)}}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_error_is_within_budget(backend: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    ours = run(kind, case(kind, shape, dtype, DEVICE), p=p, backend=backend)
    reference = run(kind, case(kind, shape, dtype, DEVICE), p=p, backend="reference")
    doubles = {k: v.detach().double().requires_grad_() for k, v in case(kind, shape, dtype, DEVICE).items()}
    oracle = run(kind, doubles, p=p, backend="reference")
    magnitude = max(float(v.detach().abs().max()) for v in doubles.values())
    for name in ours:
        assert_within_budget(ours[name], reference[name], oracle[name], name, magnitude)


def test_masks_are_those_of_the_cpu(backend: str) -> None:
    for shape in SHAPES:
        x = torch.ones(shape)
        expected = sp.dropout_add(x, p=0.3, seed=2**40 + 3)
        got = sp.dropout_add(x.to(DEVICE), p=0.3, seed=2**40 + 3, backend=backend)
        assert torch.equal(got.cpu(), expected)


def test_two_runs_give_the_same_bits(backend: str) -> None:
    first, second = (
        run("layer", case("layer", (4, 257, 1111), torch.bfloat16, DEVICE), p=0.1, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_and_streams(backend: str) -> None:
    base = torch.randn(6, 9, 520, device=DEVICE)
    w = torch.randn(256, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in (base[..., :256], base[::2, :, 3:259], base[..., ::2][..., :256], base[:, :1, :256].expand(6, 9, 256)):
            got = sp.dropout_add_rms_norm(x, x, w, p=0.2, seed=4, backend=backend)
            expected = sp.dropout_add_rms_norm(x, x, w, p=0.2, seed=4, backend="reference")
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.cuda.current_stream().wait_stream(stream)


def test_graph_replay_draws_new_masks(backend: str) -> None:
    x, w = torch.ones(64, 512, device=DEVICE, requires_grad=True), torch.ones(512, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        z = sp.dropout_add(x, p=0.5, backend=backend)
        return z, torch.autograd.grad(sp.dropout_add_rms_norm(z, x, w, backend=backend).sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, dx = step()
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z) and torch.isfinite(dx).all()


def test_offsets_beyond_2_to_the_31(backend: str) -> None:
    rows, cols = 2**31 // 8192 + 3, 8192
    if torch.cuda.mem_get_info()[0] < 6 * rows * cols * 2:
        pytest.skip("not enough free device memory")
    x = torch.zeros(rows, cols, device=DEVICE, dtype=torch.bfloat16)
    x[-2:] = torch.randn(2, cols, device=DEVICE).bfloat16()
    y = sp.dropout_add_rms_norm(x, None, None, p=0.1, seed=9, backend=backend)
    rows_of = x[-2:].cpu()
    from seqpar_kernels.kernels import RowMap
    from seqpar_kernels.kernels.reference import dropout_mask

    mask = dropout_mask(2, cols, 0.1, torch.tensor(9), RowMap(2, 0, rows - 2))
    expected = torch.nn.functional.rms_norm(torch.where(mask, rows_of.float() / 0.9, 0), (cols,), eps=1e-5)
    torch.testing.assert_close(y[-2:].cpu().float(), expected, rtol=2e-2, atol=2e-2)
    assert not y[:-2].any()


def test_compile(backend: str) -> None:
    x = torch.randn(4, 9, 256, device=DEVICE, requires_grad=True)
    w = torch.randn(256, device=DEVICE, requires_grad=True)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return sp.dropout_add_rms_norm(x, x, w, p=0.2, seed=3, backend=backend)  # type: ignore[no-any-return]

    expected, got = fn(x, w), torch.compile(fn, fullgraph=True)(x, w)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), rtol=1e-4, atol=1e-4
    )


def test_linear_without_a_group() -> None:
    x, w = torch.randn(2, 8, 64, device=DEVICE), torch.randn(32, 64, device=DEVICE)
    torch.testing.assert_close(sp.all_gather_linear(x, w, group=None), torch.nn.functional.linear(x, w))


def test_reduction_in_rank_order(backend: str) -> None:
    from seqpar_kernels.kernels import select

    parts = torch.randn(5, 33, 129, device=DEVICE).bfloat16()
    bias = torch.randn(129, device=DEVICE).bfloat16()
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part.float()
    expected = (expected + bias.float()).bfloat16()
    assert torch.equal(select(backend, DEVICE).reduce_shards(parts, bias), expected)
