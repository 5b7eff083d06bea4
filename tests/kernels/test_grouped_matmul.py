"""Grouped matmuls, their weights' gradients and sums of rows: against one matmul a run, in fp64 budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar_kernels.kernels import grouped_matmul as grouped

from ..oracle import assert_within_budget

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
by_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=lambda t: str(t)[6:])
COUNTS = [[5, 0, 17, 1], [0, 0, 0, 0], [23], [0, 64, 3]]


def problem(counts: list[int], dtype: torch.dtype, features: int = 24, outs: int = 16) -> tuple[Tensor, ...]:
    x = torch.randn(sum(counts), features, dtype=F64).to(dtype)
    weight = torch.randn(len(counts), outs, features, dtype=F64).to(dtype)
    bias = torch.randn(len(counts), outs, dtype=F64).to(dtype)
    return x, weight, bias


def by_hand(x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None) -> Tensor:
    rows = x.split(counts)
    outs = [run @ w.t() if bias is None else run @ w.t() + bias[e] for e, (run, w) in enumerate(zip(rows, weight))]
    return torch.cat(outs)


@by_dtype
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("layout", ["[N, K]", "[K, N]", "wide"])
@pytest.mark.parametrize("launch", [False, True], ids=["loop", "torch"])
def test_against_one_matmul_a_run(
    dtype: torch.dtype, counts: list[int], layout: str, launch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's grouped kernel is what CUDA takes; it runs on a CPU too, where its result can be looked at."""
    if launch and (dtype == F64 or layout == "wide"):
        pytest.skip("PyTorch's grouped kernel takes no fp64 and no such strides")
    monkeypatch.setattr(grouped, "one_launch", lambda x, weight: launch)
    torch.manual_seed(0)
    x, weight, bias = problem(counts, dtype)
    if layout == "[K, N]":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "wide":
        weight = torch.cat([weight, torch.full_like(weight, float("nan"))], 2)[:, :, : weight.shape[2]]
    for b in (None, bias):
        oracle = by_hand(x.double(), weight.double(), counts, None if b is None else b.double())
        reference = by_hand(x, weight, counts, b)
        poisoned = torch.full_like(reference, float("nan"))
        for out in (None, poisoned):
            got = grouped.grouped_matmul(x, weight, counts, b, out=out)
            assert out is None or got is out
            magnitude = 16 * float(oracle.abs().max()) if dtype == F64 and oracle.numel() else 0.0
            assert_within_budget(got, reference, oracle, "out", magnitude)


@by_dtype
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_weight_gradients_lie_as_the_weight(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    x, weight, _ = problem(counts, dtype)
    dy = torch.randn(sum(counts), weight.shape[1], dtype=F64).to(dtype)
    for w in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2)):
        got = grouped.grouped_weight_gradient(dy, x, counts, w)
        assert got.stride() == w.stride()

        def plain(dtype: torch.dtype) -> Tensor:
            pairs = zip(dy.to(dtype).split(counts), x.to(dtype).split(counts))
            return torch.stack([run.t() @ rows for run, rows in pairs])

        oracle = plain(F64)
        magnitude = 16 * float(oracle.abs().max()) if dtype == F64 else 0.0
        assert_within_budget(got, plain(dtype), oracle, "dw", magnitude)


@by_dtype
def test_sums_of_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = [5, 0, 300, 1]
    dy = torch.randn(sum(counts), 7, dtype=F64).to(dtype)
    weights = torch.rand(sum(counts), dtype=F64 if dtype == F64 else F32)
    for given in (None, weights):
        got = grouped.grouped_row_sums(dy, counts, given)
        assert got.dtype == weights.dtype
        scaled = dy.double() if given is None else dy.double() * given.double()[:, None]
        want = torch.stack([run.sum(0) for run in scaled.split(counts)])
        torch.testing.assert_close(got.double(), want, rtol=1e-5 if dtype != F64 else 1e-13, atol=1e-5)


def test_triton_s_kernels_are_taken_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA takes, on a CPU: the result is that of the chosen kernels, written where it is wanted."""
    asked: list[str] = []

    class Kernels:
        @staticmethod
        def grouped_matmul(x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None, *, out: Tensor) -> Tensor:
            asked.append("matmul")
            return out.copy_(by_hand(x, weight, counts, bias))

        @staticmethod
        def grouped_weight_gradient(dy: Tensor, x: Tensor, counts: list[int], weight: Tensor) -> Tensor:
            asked.append("gradient")
            return torch.stack([d.t() @ r for d, r in zip(dy.split(counts), x.split(counts))])

    counts = [3, 0, 2]
    x, weight, bias = problem(counts, F32)
    out, dy = torch.empty(5, 16), torch.randn(5, 16)
    plain = grouped.grouped_matmul(x, weight, counts, bias), grouped.grouped_weight_gradient(dy, x, counts, weight)
    assert grouped.triton_kernels(weight, x, bias, out) is None and not asked
    monkeypatch.setattr(grouped, "triton_kernels", lambda *tensors: Kernels)
    assert grouped.grouped_matmul(x, weight, counts, bias, out=out) is out
    torch.testing.assert_close(out, plain[0])
    torch.testing.assert_close(grouped.grouped_weight_gradient(dy, x, counts, weight), plain[1])
    assert asked == ["matmul", "gradient"]
