"""On a CUDA device: the Triton attention kernels against the fp64 reference, and over virtual ranks; `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm.loopback import Loopback

from ..kernels.attention_cases import BF16, F16, F32, SEED, Case, check
from ..kernels.test_attention_cpu import MASKS, parts_of_keys

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
by_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t)[6:])


@pytest.fixture
def kernels() -> Any:
    module = pytest.importorskip("seqpar_kernels.kernels.triton_attention", reason="needs triton")
    reason = module.unavailable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return module


def equal(some: Any, others: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@by_dtype
@pytest.mark.parametrize("name", MASKS)
def test_masks(kernels: Any, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for q_rows, k_rows in ((37, 53), (300, 517)):
        options = MASKS[name](q_rows, k_rows)
        if "bias" in options and q_rows == 37:
            options["bias"] = options["bias"].to(dtype)
        check(Case((q_rows, k_rows), (4, 2), (64, 64), dtype, **options).to(DEVICE), kernels)


@by_dtype
@pytest.mark.parametrize("dims", [(1, 1), (40, 24), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_head_dimensions(kernels: Any, dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(Case((261, 303), (4, 2), dims, dtype, right=0, q_offset=42).to(DEVICE), kernels)
    check(Case((129, 131), (3, 1), dims, dtype, layout="wide").to(DEVICE), kernels)


def test_the_widest_heads(kernels: Any) -> None:
    wide = Case((261, 303), (4, 1), (576, 512), BF16, right=0, q_offset=42).to(DEVICE)
    reason = kernels.refused(DEVICE, BF16, 576, 512)
    if reason is not None:
        pytest.skip(reason)
    check(wide, kernels)


@by_dtype
def test_keys_in_blocks_leave_no_trace(kernels: Any, dtype: torch.dtype) -> None:
    for options in (dict(right=0), dict(left=200, right=0, p=0.2, seed=SEED)):
        case = Case((500, 700), (4, 2), (64, 128), dtype, q_offset=200, **options).to(DEVICE)
        out, lse, _ = case.forward(kernels)
        whole = (out, lse, *case.backward(kernels, out, lse, grad_dtype=F32))
        again = case.forward(kernels)[:2]
        assert equal((*again, *case.backward(kernels, *again, grad_dtype=F32)), whole), "two runs"
        for cuts in ([128], [256, 256, 640]):
            assert equal(parts_of_keys(case, cuts, kernels), whole), cuts


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("engine", ["ring", "ulysses", "all_gather"])
def test_over_virtual_ranks(engine: str, dtype: torch.dtype) -> None:
    """out and gradients of one rank, whatever the ranks and the messages."""
    rows = 1000
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, rows, heads, 64, generator=generator).to(DEVICE, dtype) for heads in (4, 2, 2, 4)]

    def on_rank(group: dist.ProcessGroup, chunks: int) -> list[Tensor]:
        q, k, v, dout = (sp.shard_sequence(t, group, 1, layout="zigzag") for t in whole)
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        options: dict[str, Any] = dict(engine=engine, layout="zigzag", seq_len=rows, chunks=chunks, save_kv=chunks == 1)
        out = sp.sequence_parallel_attention(
            *leaves, group=group, is_causal=True, window_size=(600, -1), dropout_p=0.1, seed=5, **options
        )
        grads = torch.autograd.grad(out, leaves, dout)
        return [sp.unshard_sequence(t.detach(), group, 1, layout="zigzag", seq_len=rows) for t in (out, *grads)]

    with Loopback(1, DEVICE) as loopback:
        (one,) = loopback.run(on_rank, 1)
    tolerance = {F32: 5e-5, BF16: 5e-2}[dtype]
    with Loopback(2, DEVICE) as loopback:
        runs = [loopback.run(on_rank, chunks) for chunks in (1, 3)]
    for first, second in zip(*runs, strict=True):
        assert equal(first, second)
        for got, want in zip(first, one, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_projections_over_virtual_ranks(dtype: torch.dtype) -> None:
    """y and all gradients of one rank, whatever the groups of heads; sums over heads in blocks of 1024 features."""
    rows, heads, features, dim = 500, 32, 256, 128
    generator = torch.Generator().manual_seed(4)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype) * shape[-1] ** -0.5

    x, dy = made(1, rows, features) * 16, made(1, rows, features)
    weights = [made(heads * dim, features) for _ in range(3)] + [made(features, heads * dim)]

    def on_rank(group: dist.ProcessGroup, groups: int | None) -> list[Tensor]:
        mine = sp.shard_sequence(x, group, 1, layout="zigzag").clone().requires_grad_()
        leaves = [mine, *(w.clone().requires_grad_() for w in weights)]
        y = sp.sequence_parallel_self_attention(
            *leaves, group=group, num_heads=heads, seq_len=rows, layout="zigzag", engine="ulysses", head_groups=groups,
            is_causal=True,
        )  # fmt: skip
        dx, *grads = torch.autograd.grad(y, leaves, sp.shard_sequence(dy, group, 1, layout="zigzag"))
        joined = [sp.unshard_sequence(t.detach(), group, 1, layout="zigzag", seq_len=rows) for t in (y, dx)]
        return [*joined, *(sp.reduce_from_tensor_parallel(g.float(), group) for g in grads)]

    with Loopback(1, DEVICE) as loopback:
        (one,) = loopback.run(on_rank, None)
    tolerance = {F32: 1e-3, BF16: 5e-2}[dtype]
    with Loopback(2, DEVICE) as loopback:
        for groups in (1, 2, 4):
            for found in loopback.run(on_rank, groups):
                for got, want in zip(found, one, strict=True):
                    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
