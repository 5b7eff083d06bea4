"""What attention over a sharded sequence takes of memory on a rank, counted from PyTorch's allocator."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from bench.attention_memory import kept_and_peak
from seqpar_kernels.kernels import attention_native

from ..world import World

if attention_native.unavailable(torch.device("cpu")) is not None:
    pytest.skip(str(attention_native.unavailable(torch.device("cpu"))), allow_module_level=True)

ROWS, HEADS, DIM = 4096, 8, 64


def memory_case(save_kv: bool) -> tuple[int, int]:
    """Bytes kept and the peak of forward and backward on this rank: causal, zigzag, bf16."""
    group = dist.group.WORLD
    assert group is not None
    shape = (1, ROWS // group.size(), HEADS, DIM)
    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    call = functools.partial(sp.sequence_parallel_attention, group=group, is_causal=True, layout="zigzag")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, engine="ring", save_kv=save_kv)  # type: ignore[no-any-return]

    return kept_and_peak(attend, [q, k, v], torch.ones_like(q))


@pytest.mark.parametrize("save_kv", [True, False])
def test_a_ring_takes_30_mib_where_peers_take_33_to_82(world2: World, save_kv: bool) -> None:
    """S=4096, 8 heads of 64, bf16, 2 ranks (issue 17). A shard of q is 2 MiB, of its log-sum-exp 64 KiB."""
    found = world2.run(memory_case, save_kv)
    shard, lse = ROWS // 2 * HEADS * DIM * 2, ROWS // 2 * HEADS * 4
    remote = [2 * shard, shard] if save_kv else [0, 0]  # rank 0 sees all keys and values of rank 1, rank 1 half
    assert [kept for kept, _ in found] == [shard + lse + more for more in remote]
    assert max(peak for _, peak in found) <= 30 << 20, found
