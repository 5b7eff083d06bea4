"""Virtual ranks and symmetric memory on real devices: the bits of one must be those of the other, and of NCCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.comm.symm_mem import reserve_workspace, transport_over

from .processes import exit_codes, join

pytestmark = pytest.mark.gpu


def integers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose matmuls are exact in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def layer(g: dist.ProcessGroup, length: int, engine: str, dtype: torch.dtype) -> list[Tensor]:
    """Column- and row-parallel, forward and backward; all that this rank has of the results, on CPU."""
    t, rank = g.size(), g.rank()
    x = integers(1, length, 2, 256, dtype=dtype).tensor_split(t)[rank].requires_grad_()
    up = integers(2, 512 * t, 256, dtype=dtype).tensor_split(t)[rank].requires_grad_()
    down = integers(3, 256, 512 * t, dtype=dtype).tensor_split(t, 1)[rank].requires_grad_()
    common: dict[str, Any] = {"group": g, "seq_dim": 0, "chunks": 3, "engine": engine}
    h = sp.all_gather_linear(x, up, seq_len=length, **common)
    y = sp.linear_reduce_scatter(h.clamp(-2, 2), down, **common)
    grad = integers(4, length, 2, 256, dtype=dtype).tensor_split(t)[rank]
    return [t.detach().cpu() for t in (h, y, *torch.autograd.grad(y, (x, up, down), grad))]


@pytest.mark.parametrize("engine", ["p2p", "fused"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rate", [None, 20e9], ids=["copied", "paced"])
def test_virtual_ranks_on_streams_give_the_unsharded_result(ranks: int, rate: float | None, engine: str) -> None:
    """Late streams would show: every rank's result is compared, ten times over."""
    length = 64 * ranks + 1
    x, up = integers(1, length, 2, 256, dtype=torch.float32), integers(2, 512 * ranks, 256, dtype=torch.float32)
    down = integers(3, 256, 512 * ranks, dtype=torch.float32)
    y = ((x.double() @ up.double().t()).clamp(-2, 2) @ down.double().t()).float().cpu()
    with Loopback(ranks, "cuda", bytes_per_second=rate) as loopback:
        for _ in range(10):
            got = loopback.run(layer, length, engine, torch.float32)
            assert torch.equal(torch.cat([rank[1] for rank in got]), y)


@pytest.mark.alone
def test_a_paced_link_keeps_its_rate() -> None:
    """16 MiB at 4 GB/s take 4.2 ms at least."""

    def gather(g: dist.ProcessGroup) -> float:
        x = torch.ones(1, 4096, 1024, device="cuda")
        sp.gather_sequence(x, g)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        sp.gather_sequence(x, g)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    with Loopback(2, "cuda", bytes_per_second=4e9) as loopback:
        assert min(loopback.run(gather)) >= 0.9 * 4096 * 1024 * 4 / 4e9 * 1e3


def _rank(rank: int, ranks: int, store: str, expected: list[list[Tensor]], what: str) -> None:
    g = join(rank, ranks, store)
    if what == "graph":
        _captured(g)
    elif what == "groups":
        _two_groups(g, expected[rank])
    else:
        for length in (64 * ranks + 1, 64 * ranks, 1, 64 * ranks + 1):
            got = layer(g, length, what, torch.float32)
            if length == 64 * ranks + 1:
                assert all(torch.equal(a, b) for a, b in zip(got, expected[rank], strict=True))
            if what == "single":  # equal shards are gathered by NCCL itself
                messages = layer(g, length, "p2p", torch.float32)
                assert all(torch.equal(a, b) for a, b in zip(got, messages, strict=True))
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


def _captured(g: dist.ProcessGroup) -> None:
    """A captured pair of ops, replayed on new inputs, equals the eager one."""
    t, rank = g.size(), g.rank()
    x = integers(1, 64 * t, 2, 256, dtype=torch.float32).tensor_split(t)[rank].clone()
    up, down = integers(2, 512, 256, dtype=torch.float32), integers(3, 256, 512, dtype=torch.float32)

    def both() -> Tensor:
        h = sp.all_gather_linear(x, up, group=g, seq_dim=0, chunks=2, engine="symm_mem")
        return sp.linear_reduce_scatter(h, down, group=g, seq_dim=0, chunks=2, engine="symm_mem")

    both()
    dist.barrier()
    reserve_workspace(g, 1 << 26)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both()
    for seed in (5, 6, 7):
        x.copy_(integers(seed, 64 * t, 2, 256, dtype=torch.float32).tensor_split(t)[rank])
        graph.replay()
        assert torch.equal(y, both())


def _two_groups(g: dist.ProcessGroup, expected: list[Tensor]) -> None:
    """Workspaces of two groups share no byte, also when one has grown; both have signals of their own."""
    other, length = dist.new_group(list(range(g.size()))), 64 * g.size() + 1
    for nbytes in (1 << 22, 1 << 24):
        for group in (g, other, g):
            got = layer(group, length, "symm_mem", torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        spans = []
        for group in (g, other):
            workspace = transport_over(group).memory.workspace  # type: ignore[attr-defined]
            spans.append((workspace.data_ptr(), workspace.data_ptr() + workspace.nbytes))
        assert spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]
        reserve_workspace(g, nbytes)


@pytest.mark.parametrize("what", ["symm_mem", "p2p", "single", "fused", "graph", "groups"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_ranks_give_the_bits_of_virtual_ones(ranks: int, what: str) -> None:
    """On one device where there are no more: function only, never timing."""
    with Loopback(ranks, "cuda") as loopback:
        expected = loopback.run(layer, 64 * ranks + 1, "p2p", torch.float32)
    assert exit_codes(_rank, ranks, expected, what) == [0] * ranks
