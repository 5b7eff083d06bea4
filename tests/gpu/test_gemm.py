"""On a CUDA device: the Triton matmul that waits for its rows or tells of them; `make gpu`.

Whoever raises flags here is enqueued first, and either needs no multiprocessor or finds some free (``sm_margin``).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..oracle import assert_within_budget

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
MARGIN = 16
SHARDS = [[512, 511], [512, 511], [511, 512], [512, 511]]
ROWS = sum(map(sum, SHARDS))
RANK = 1
SIZES = [(1, 1, 1), (128, 256, 64), (257, 263, 67), (1000, 1000, 1000), (2048, 4096, 512), (4096, 8200, 72)]


@pytest.fixture(autouse=True)
def gemm() -> None:
    triton_gemm = pytest.importorskip("seqpar_kernels.kernels.triton_gemm", reason="needs triton")
    reason = triton_gemm.unavailable(DEVICE)
    if reason is not None:
        pytest.skip(reason)


def words(count: int, value: int = 0) -> Tensor:
    return torch.full((count,), value, dtype=torch.int32, device=DEVICE)


def random(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(rows * 31 + cols + seed)
    return torch.randn(rows, cols, device=DEVICE, generator=generator).to(dtype)


def poisoned(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full((rows, cols), float("nan"), device=DEVICE, dtype=dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """What every launch on these operands must give, bit for bit: tiles differ in their place alone."""
    from seqpar_kernels.kernels.triton_gemm import matmul

    return matmul(x, weight, sm_margin=MARGIN)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_error_is_within_budget(m: int, n: int, k: int, dtype: torch.dtype, transposed: bool) -> None:
    from seqpar_kernels.kernels.triton_gemm import matmul

    x = random(m, k, dtype)
    weight = random(k, n, dtype).t() if transposed else random(n, k, dtype)
    bias = random(1, n, dtype)[0]
    out = matmul(x, weight, poisoned(m, n, dtype), bias=bias)
    oracle = x.double() @ weight.double().t() + bias.double()
    assert_within_budget(out, torch.addmm(bias, x, weight.t()), oracle, "out", magnitude=k**0.5)


def test_tf32_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqpar_kernels.kernels import triton_gemm

    x, weight = random(512, 256, torch.float32), random(384, 256, torch.float32)
    oracle = x.double() @ weight.double().t()
    strict = (triton_gemm.matmul(x, weight).double() - oracle).abs().max()
    monkeypatch.setattr(triton_gemm, "_tf32", lambda dtype: True)
    loose = (triton_gemm.matmul(x, weight).double() - oracle).abs().max()
    assert strict < 1e-4 < loose < 1e-1


@pytest.mark.alone
def test_rows_far_apart() -> None:
    """Offsets beyond 2**31 elements, of x and of out."""
    from seqpar_kernels.kernels.triton_gemm import matmul

    m, n, k = 2**16 + 130, 2**15 + 8, 64
    if torch.cuda.mem_get_info()[0] < 4 * m * n * 2:
        pytest.skip("not enough free device memory")
    x, weight = random(m, n)[:, :k], random(n, k)
    out = matmul(x, weight)
    torch.testing.assert_close(out[-200:], x[-200:] @ weight.t(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("k", [1024, 1021])
def test_waits_for_rows_that_copy_engines_bring(k: int) -> None:
    """Copies from pinned memory and stream memory writes: nobody needs a multiprocessor, none is left free."""
    from torch._C._distributed_c10d import _SymmetricMemory

    from seqpar_kernels.kernels.triton_gemm import check_status, gather_matmul, matmul, rotated

    source, weight = random(ROWS, k), random(1536, k)
    host, expected = source.cpu().pin_memory(), matmul(source, weight)
    chunks = rotated(SHARDS, RANK, own_first=True)
    own, flags, status, side = chunks[0], words(8), words(1), torch.cuda.Stream()
    for epoch in (1, 2, 3):
        x, out = poisoned(ROWS, k), poisoned(ROWS, 1536)
        x[own.start : own.stop] = source[own.start : own.stop]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for chunk in chunks[1:]:
                x[chunk.start : chunk.stop].copy_(host[chunk.start : chunk.stop], non_blocking=True)
                _SymmetricMemory.stream_write_value32(flags.view(torch.uint32), chunk.flag, epoch)
        gather_matmul(x, weight, out, flags, chunks, epoch, status, timeout=20)
        torch.cuda.current_stream().wait_stream(side)
        check_status(status)
        assert torch.equal(out, expected)


def test_waits_in_a_graph_whose_epoch_is_a_tensor() -> None:
    from seqpar_kernels.kernels.triton_gemm import check_status, gather_matmul, rotated

    weight, x, source, out = random(768, 512), poisoned(ROWS, 512), poisoned(ROWS, 512), poisoned(ROWS, 768)
    chunks = rotated(SHARDS, RANK, own_first=True)
    flags, status, epoch, side = words(8), words(1), words(1), torch.cuda.Stream()

    def step() -> None:
        epoch.add_(1)
        x.fill_(float("nan"))
        x[chunks[0].start : chunks[0].stop] = source[chunks[0].start : chunks[0].stop]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for chunk in chunks[1:]:
                torch.cuda._sleep(100_000)
                x[chunk.start : chunk.stop] = source[chunk.start : chunk.stop]
                flags[chunk.flag : chunk.flag + 1].copy_(epoch)
        gather_matmul(x, weight, out, flags, chunks, epoch, status, timeout=20, sm_margin=MARGIN)
        torch.cuda.current_stream().wait_stream(side)

    main = torch.cuda.Stream()
    main.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(main):
        source.copy_(random(ROWS, 512))
        step()
    torch.cuda.current_stream().wait_stream(main)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (1, 2, 3):
        source.copy_(random(ROWS, 512, seed=seed))
        graph.replay()
        check_status(status)
        assert torch.equal(out, product(source, weight))
    assert epoch.item() == 4


def test_a_flag_that_is_never_raised() -> None:
    from seqpar_kernels.kernels.triton_gemm import check_status, gather_matmul, rotated

    x, weight = random(ROWS, 256), random(512, 256)
    chunks = rotated(SHARDS, RANK, own_first=True)
    flags, status, out = words(8, 1), words(1), poisoned(ROWS, 512)
    late = chunks[3]
    flags[late.flag] = 0
    gather_matmul(x, weight, out, flags, chunks, 1, status, timeout=0.05, sm_margin=MARGIN)
    with pytest.raises(RuntimeError, match=f"flag {late.flag} "):
        check_status(status)
    expected = product(x, weight)
    for chunk in chunks[:3]:
        assert torch.equal(out[chunk.start : chunk.stop], expected[chunk.start : chunk.stop])
    assert out[late.start : late.stop].isnan().all()
    flags[late.flag] = 1
    gather_matmul(x, weight, out, flags, chunks, 1, status.zero_(), sm_margin=MARGIN)
    check_status(status)
    assert torch.equal(out, expected)


def test_one_launch_feeds_another_chunk_by_chunk() -> None:
    """The rows one matmul finishes are what the next waits for, on half of the device each: release and acquire."""
    from seqpar_kernels.kernels.triton_gemm import check_status, gather_matmul, matmul, matmul_scatter, rotated

    half = torch.cuda.get_device_properties(DEVICE).multi_processor_count // 2
    x, up, down = random(ROWS, 512), random(1024, 512), random(640, 1024)
    middle = matmul(x, up, sm_margin=half)
    expected = matmul(middle, down, sm_margin=half)
    # Every chunk is told of and waited for: those of a rank that owns none of them.
    chunks = rotated([*SHARDS, []], len(SHARDS), own_first=False)[:-1]
    flags, counts, status, side = words(8), words(8), words(1), torch.cuda.Stream()
    for epoch in range(1, 21):
        between, out = poisoned(ROWS, 1024), poisoned(ROWS, 640)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            matmul_scatter(x, up, between, flags, chunks, epoch, counts, sm_margin=half)
        gather_matmul(between, down, out, flags, chunks, epoch, status, timeout=20, sm_margin=half)
        torch.cuda.current_stream().wait_stream(side)
        check_status(status)
        assert torch.equal(between, middle)
        assert torch.equal(out, expected)
        assert not counts.any()
