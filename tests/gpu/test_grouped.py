"""On a CUDA device: grouped matmuls of experts, by PyTorch's kernel and by ours in Triton; `make gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar_kernels.kernels import grouped_matmul as grouped

from ..oracle import assert_within_budget

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
COUNTS = [300, 0, 1, 77, 640, 128, 5, 0]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(512, 256), (1000, 1000), (263, 67), (1, 1)])
def test_error_is_within_budget(n: int, k: int, dtype: torch.dtype, transposed: bool) -> None:
    """Whichever kernel is chosen: forward with a bias, dgrad, wgrad."""
    rows, experts = sum(COUNTS), len(COUNTS)
    x, dy, bias = random(rows, k, dtype=dtype), random(rows, n, dtype=dtype), random(experts, n, dtype=dtype)
    shape = (experts, k, n) if transposed else (experts, n, k)
    weight = random(*shape, dtype=dtype)
    weight = weight.transpose(1, 2) if transposed else weight

    def plain(dtype: torch.dtype) -> list[Tensor]:
        runs = zip(*(t.to(dtype).split(COUNTS) for t in (x, dy)), weight.to(dtype), bias.to(dtype), strict=True)
        made = [(torch.addmm(b, rows, w.t()), d @ w, d.t() @ rows) for rows, d, w, b in runs]
        outs, dxs, dws = zip(*made, strict=True)
        return [torch.cat(outs), torch.cat(dxs), torch.stack(dws)]

    got = [
        grouped.grouped_matmul(x, weight, COUNTS, bias),
        grouped.grouped_matmul(dy, weight.transpose(1, 2), COUNTS),
        grouped.grouped_weight_gradient(dy, x, COUNTS, weight),
    ]
    reduced = (k, n, max(COUNTS))
    found = zip(("out", "dx", "dw"), got, plain(dtype), plain(torch.float64), reduced, strict=True)
    for what, mine, reference, oracle, terms in found:
        assert_within_budget(mine, reference, oracle, what, magnitude=terms**0.5)


def test_ours_is_taken_where_pytorch_s_is_not() -> None:
    pytest.importorskip("triton")
    for dtype, k in ((torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 67)):
        x, weight = random(8, k, dtype=dtype), random(2, 16, k, dtype=dtype)
        assert not grouped.one_launch(x, weight) and grouped.triton_kernels(weight, x) is not None
    assert grouped.triton_kernels(random(2, 16, 8, dtype=torch.float64)) is None


def test_two_runs_agree_to_the_bit() -> None:
    x, weight = random(sum(COUNTS), 320, dtype=torch.float16), random(len(COUNTS), 200, 320, dtype=torch.float16)
    dy = random(sum(COUNTS), 200, dtype=torch.float16)
    for _ in range(3):
        assert torch.equal(*(grouped.grouped_matmul(x, weight, COUNTS) for _ in range(2)))
        assert torch.equal(*(grouped.grouped_weight_gradient(dy, x, COUNTS, weight) for _ in range(2)))
