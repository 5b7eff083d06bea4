"""When a ring's backward computes with which keys, and when it posts their gradients."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.kernels import attention
from seqpar_kernels.overlap.attention_column import Column
from seqpar_kernels.overlap.messages import Messages
from seqpar_kernels.sequence_layout import Interval, Intervals

ROWS, CHUNKS = 96, 3


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """By rank, in order: "own" or "remote" for a kernel call in the backward, "send" for gradients that are posted."""
    found: dict[int, list[str]] = {}
    here = threading.local()
    block, backward, post = Column.block, attention.backward, Messages.post

    def blocked(self: Column, extras: Any, keys: Interval | Intervals, device: torch.device) -> Any:
        own = isinstance(keys, Interval) and any(i.start <= keys.start < keys.stop <= i.stop for i in self.k_rows)
        here.what, here.rank = "own" if own else "remote", self.rank
        return block(self, extras, keys, device)

    def computed(*args: Any, **options: Any) -> Any:
        found.setdefault(here.rank, []).append(here.what)
        return backward(*args, **options)

    def posted(self: Messages, sends: Any, receives: Any) -> None:
        if self._kind == "scatter" and sends:
            found.setdefault(self._rank, []).append("send")
        post(self, sends, receives)

    monkeypatch.setattr(Column, "block", blocked)
    monkeypatch.setattr(attention, "backward", computed)
    monkeypatch.setattr(Messages, "post", posted)
    return found


@pytest.mark.parametrize("save_kv", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_leave_before_own_keys_are_done(ranks: int, save_kv: bool, events: dict[int, list[str]]) -> None:
    """Each piece's gradients leave before the next piece is computed. Own keys come last; where keys and values are
    sent again, half of them come first."""
    whole = [torch.randn(1, ROWS, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def on_rank(group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        q, k, v, dout = (sp.shard_sequence(t, group, 1, layout="zigzag") for t in whole)
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        options: dict[str, Any] = dict(layout="zigzag", engine="ring", save_kv=save_kv, chunks=CHUNKS)
        out = sp.sequence_parallel_attention(*leaves, group=group, is_causal=True, **options)
        return torch.autograd.grad(out, leaves, dout)

    with Loopback(ranks) as loopback:
        loopback.run(on_rank)
    assert sorted(events) == list(range(ranks))
    for rank, found in events.items():
        remote = found.count("remote")
        assert remote >= ranks - 1
        own = found.count("own")
        first = 0 if save_kv else own // 2
        assert found == ["own"] * first + ["remote", "send"] * remote + ["own"] * (own - first), (rank, found)


def test_bits_do_not_depend_on_when_a_rank_computes() -> None:
    """Kept or sent again, in few pieces or many: the gradients of a bias that is alike for all keys too."""
    heads, features = 4, 8
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, ROWS, heads, features, generator=generator).bfloat16() for _ in range(4)]
    bias = torch.randn(1, 1, ROWS, 1, generator=generator)

    def on_rank(group: dist.ProcessGroup, options: dict[str, Any]) -> list[Tensor]:
        q, k, v, dout = (sp.shard_sequence(t, group, 1, layout="zigzag") for t in whole)
        shared = sp.shard_sequence(bias, group, 2, layout="zigzag")
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, shared)]
        out = sp.sequence_parallel_attention(
            *leaves[:3], group=group, is_causal=True, attn_bias=leaves[3], layout="zigzag", **options
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    ring = dict(engine="ring")
    two_by_two = dict(ulysses_degree=2, ring_degree=2)  # four blocks of own keys, whose sum has an order
    for ranks, grid in ((2, ring), (3, ring), (4, two_by_two)):
        found = []
        for options in (dict(save_kv=True), dict(save_kv=False), dict(save_kv=True, chunks=5), dict(chunks=5)):
            with Loopback(ranks) as loopback:
                found.append(loopback.run(on_rank, {**grid, **options}))
        for other in found[1:]:
            for mine, theirs in zip(found[0], other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine[:4], theirs[:4], strict=True))
        for first, again in (found[:2], found[2:]):
            assert all(torch.equal(a[4], b[4]) for a, b in zip(first, again, strict=True))
