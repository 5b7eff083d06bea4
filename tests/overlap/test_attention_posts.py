"""The order in which ranks post messages, where a post keeps later ones from moving (NCCL): a ring's backward, and
heads that travel in groups, forward and backward.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.overlap.attention_exchange import Messages

ROWS = 96
Post = frozenset[tuple[Any, ...]]

WHOLE = [torch.randn(1, ROWS, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2, 4)]


def stuck(posts: Sequence[Sequence[Post]]) -> list[int]:
    """Ranks that never end where each works through its posts in order: one ends when all of its peers have come to
    what they share with it."""
    at, open_ = [0] * len(posts), [set(rank[0]) if rank else set() for rank in posts]
    moved = True
    while moved:
        moved = False
        both = {t for t in set().union(*open_) if sum(t in some for some in open_) == 2}
        for rank, some in enumerate(open_):
            moved |= bool(some & both)
            some -= both
            while not some and at[rank] < len(posts[rank]):
                at[rank], moved = at[rank] + 1, True
                some |= posts[rank][at[rank]] if at[rank] < len(posts[rank]) else set()
    return [rank for rank, place in enumerate(at) if place < len(posts[rank])]


def test_a_circle_is_found() -> None:
    ab, ba = ("a to b",), ("b to a",)
    assert stuck([[frozenset([ab, ba])], [frozenset([ba, ab])]]) == []
    assert stuck([[frozenset([ab]), frozenset([ba])], [frozenset([ba]), frozenset([ab])]]) == [0, 1]


@pytest.fixture
def posts(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Post]], threading.Event]:
    """What each of four ranks posts while the event is set, as with a transport that keeps its order."""
    made: list[list[Post]] = [[] for _ in range(4)]
    recording = threading.Event()
    post = Messages.post

    def recorded(self: Messages, sends: Any, receives: Any) -> None:
        found = [self._transfer(i, self._rank, peer) for peer, i, b in sends if b.numel()]
        found += [self._transfer(i, peer, self._rank) for peer, i, b in receives if b.numel()]
        if recording.is_set() and found:
            made[self._rank].append(frozenset((self._kind, str(t)) for t in found))
        post(self, sends, receives)

    monkeypatch.setattr(Messages, "post", recorded)
    monkeypatch.setattr(Messages, "takes_receives_early", lambda self, device_type: False)
    return made, recording


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("engine", ["ring", "all_gather"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_no_rank_waits_in_a_circle(
    ranks: int, engine: str, bounded: bool, posts: tuple[list[list[Post]], threading.Event]
) -> None:
    made, recording = posts
    barrier = threading.Barrier(ranks)

    def on_rank(group: dist.ProcessGroup, options: dict[str, Any]) -> tuple[Tensor, ...]:
        q, k, v, dout = (sp.shard_sequence(t, group, 1) for t in WHOLE)
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = sp.sequence_parallel_attention(
            *leaves, group=group, seq_len=ROWS, engine=engine, save_kv=False, chunks=3, **options
        )
        barrier.wait()
        recording.set()
        grads = torch.autograd.grad(out, leaves, dout)
        barrier.wait()
        recording.clear()
        return grads

    if bounded:
        sp.set_max_workspace_bytes(3 * 8 * 2 * (8 + 8) * 4)
    try:
        for options in (
            dict(is_causal=True),
            dict(window_size=(20, 9)),
            dict(cu_seqlens=torch.tensor([0, 10, 70, ROWS])),
        ):
            for found in made:
                found.clear()
            with Loopback(ranks) as loopback:
                loopback.run(on_rank, options)
            assert sum(map(len, made)) > 0
            assert stuck(made) == [], options
    finally:
        sp.set_max_workspace_bytes(None)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_groups_of_heads_wait_in_no_circle(
    ranks: int, bounded: bool, posts: tuple[list[list[Post]], threading.Event]
) -> None:
    """Forward and backward; the last of four ranks has no row."""
    made, recording = posts
    heads, features, rows = 13, 8, 3 if ranks == 4 else 10
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 1, rows, features, generator=generator)
    weights = [torch.randn(heads * 128, features, generator=generator) for _ in range(3)]
    weights.append(torch.randn(features, heads * 128, generator=generator))

    def on_rank(group: dist.ProcessGroup, groups: int) -> None:
        mine = sp.shard_sequence(x, group, 1).clone().requires_grad_()
        leaves = [mine, *(w.clone().requires_grad_() for w in weights)]
        y = sp.sequence_parallel_self_attention(
            *leaves, group=group, num_heads=heads, seq_len=rows, engine="ulysses", head_groups=groups, is_causal=True
        )
        torch.autograd.grad(y, leaves, sp.shard_sequence(dy, group, 1))

    sp.set_max_workspace_bytes(1 << 30 if bounded else None)
    recording.set()
    try:
        for groups in (1, 2, 3):
            for found in made:
                found.clear()
            with Loopback(ranks) as loopback:
                loopback.run(on_rank, groups)
            assert [len(found) for found in made[:2]] == [4 * groups] * 2
            assert stuck(made) == []
            kept = [[t for t in found if t] for found in made[:ranks]]
            assert stuck([kept[0][::-1], *kept[1:]]) != [], "another order would wait for ever"
    finally:
        sp.set_max_workspace_bytes(None)
