"""What auto chooses, the bytes it counts against the bytes that travel, balance, and what masks keep off the wire."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.overlap import messages
from seqpar_kernels.overlap.attention_choice import Problem, choose, message_size
from seqpar_kernels.overlap.attention_plan import Mask, Sizes, pieces
from seqpar_kernels.sequence_layout import Interval, rows_of

from ..world import World
from .groups import on_ranks


def problem(ranks: int, length: int = 2048, heads: tuple[int, int] = (8, 8), **options: Any) -> Problem:
    known: dict[str, Any] = dict(layout="zigzag", left=None, right=0) | options
    return Problem(length, length, 1, *heads, 64, 64, 2, known.pop("layout"), ranks, known["left"], known["right"])


def test_messages_are_cut_where_kernels_may_be() -> None:
    for cut, chunks in itertools.product((8, 128), (1, 3, 5)):
        found = choose(problem(2, 1000)._replace(cut=cut), "ring", chunks=chunks)
        assert found.sizes.chunk_rows == math.ceil(math.ceil(500 / chunks) / cut) * cut
    sp.set_max_workspace_bytes(3 * 127 * 8 * 2 * 128)
    try:
        with pytest.raises(ValueError, match="room for 3 messages of 128 keys and values"):
            choose(problem(2)._replace(cut=128), "ring")
        assert choose(problem(2), "ring").sizes.chunk_rows == 120
    finally:
        sp.set_max_workspace_bytes(None)


def test_messages_are_smaller_on_a_cpu() -> None:
    """Shards of 0.5 to 32 MiB of keys and values in messages of 256 KiB or more, at most eight; on CUDA of 4 MiB."""
    for length, on_cpu, on_cuda in ((512, 2, 1), (1024, 4, 1), (4096, 8, 1), (8192, 8, 2), (32768, 8, 4)):
        for device, count in (("cpu", on_cpu), ("cuda", on_cuda)):
            found = choose(problem(2, length)._replace(message=message_size(device)), "ring")
            assert found.sizes.chunk_rows == length // 2 // count


def test_needed_keys_are_those_that_rows_see() -> None:
    for layout, length, ranks in itertools.product(("contiguous", "zigzag"), (1, 7, 23, 40), (2, 3)):
        for left, right, documents in (
            (None, 0, None),
            (5, 0, None),
            (3, 2, (0, 4, 4, length)),
            (None, None, (0, 1, length)),
            (None, -3, None),
            (-2, 6, None),
        ):
            if documents and documents[-2] > length:
                continue
            mask = Mask(left, right, documents)
            for reader, owner in itertools.permutations(range(ranks), 2):
                q_rows, k_rows = (rows_of(layout, length, ranks, r) for r in (reader, owner))
                needed = {p for i in mask.needs(q_rows, k_rows, length) for p in range(*i)}
                for row in (p for i in q_rows for p in range(*i)):
                    for key in (p for i in k_rows for p in range(*i)):
                        near = (left is None or key >= row - left) and (right is None or key <= row + right)
                        if documents is not None:
                            near &= sum(e <= row for e in documents) == sum(e <= key for e in documents)
                        assert not near or key in needed


def test_zigzag_sends_three_quarters_and_windows_little() -> None:
    sizes = Sizes(1024, 1024, 8, 8, "zigzag", 4, 1, None, 0, 1024)
    sent = sum(p.keys.size for a, b in itertools.permutations(range(4), 2) for p in pieces(sizes, None, a, b))
    assert sent == 0.75 * 1024 * 3
    for length in (1024, 4096):
        sizes = Sizes(length, length, 8, 8, "contiguous", 4, 1, 63, 0, 4096)
        sent = [sum(p.keys.size for b in range(4) if b != a for p in pieces(sizes, None, a, b)) for a in range(4)]
        assert sent == [63, 63, 63, 0]
    packed = tuple(range(0, 1025, 256))
    sizes = Sizes(1024, 1024, 8, 8, "contiguous", 4, 1, None, 0, 1024)
    assert not any(pieces(sizes, packed, a, b) for a, b in itertools.permutations(range(4), 2))


def test_balance() -> None:
    assert choose(problem(4), "ring").imbalance <= 1.02
    assert choose(problem(4, layout="contiguous"), "ring").imbalance > 1.5
    assert choose(problem(4, layout="contiguous"), "ulysses").imbalance == 1.0


def test_auto() -> None:
    mha = choose(problem(4))
    assert (mha.engine, mha.sizes.ulysses) == ("ulysses", 4)
    assert choose(problem(4, heads=(32, 1))).engine == "ring"  # one key head: copies of it, or a ring
    windowed = choose(problem(4, left=63))
    assert windowed.engine == "ring" and windowed.sizes.ulysses == 1
    gqa = choose(problem(8, heads=(8, 2), layout="contiguous", right=None))
    assert (gqa.engine, gqa.sizes.ulysses, gqa.sizes.ring) == ("ring", 2, 4)
    assert "fewest bytes" in gqa.reason
    assert all(choose(problem(8, heads=(16, 8)), save_kv=kept).save_kv is kept for kept in (True, False))


def test_kept_where_it_is_little() -> None:
    assert choose(problem(2), "ring").save_kv
    assert not choose(problem(8), "ring").save_kv
    assert choose(problem(8, heads=(8, 1)), "ring").save_kv


def bytes_case(group: dist.ProcessGroup) -> None:
    """All that travels, forward and backward, is what the model counts; a few MiB where peers send many."""
    sent = [0, 0]
    original = messages.Messages.post

    def counted(self: Any, sends: Any, receives: Any) -> None:
        sent[1] += sum(buffer.nbytes for _, _, buffer in sends)
        original(self, sends, receives)

    messages.Messages.post = counted  # type: ignore[method-assign]
    t = group.size()
    try:
        for heads, asked in itertools.product(
            ((4, 4), (4, 1)),
            (dict(engine="ring", save_kv=True), dict(engine="ring", save_kv=False), dict(engine="ulysses")),
        ):
            q, k, v = (
                torch.randn(1, 96 // t, h, 16, dtype=torch.bfloat16, requires_grad=True)
                for h in (heads[0], heads[1], heads[1])
            )
            options = dict(group=group, is_causal=True, layout="zigzag", **asked)
            sent[1] = 0
            out = sp.sequence_parallel_attention(q, k, v, **options)
            sent[0], sent[1] = sent[1], 0
            out.sum().backward()
            choice = sp.functional.attention_choice(q, k, v, **options)
            found = torch.tensor(sent, dtype=torch.float64)
            worst = max(float(x.sum()) for x in sp.unshard_sequence(found[None], group, 0))
            assert abs(worst / choice.wire.total - 1) <= 0.01
    finally:
        messages.Messages.post = original  # type: ignore[method-assign]


def test_bytes_on_the_wire(world4: World) -> None:
    world4.run(on_ranks, bytes_case)


def test_peers_send_four_times_as_much() -> None:
    """S=2048, 8 heads of 64, bf16, causal, 2 ranks, forward and backward, both ranks (issue 17)."""
    sizes = choose(problem(2), "ring").sizes
    rows = sum(p.keys.size for a, b in ((0, 1), (1, 0)) for p in pieces(sizes, None, a, b))
    assert rows * 8 * 2 * 64 * 2 * 2 <= 6 << 20
    assert rows * 2 * 2 * 64 * 2 * 2 <= 3 << 19  # two key heads: 1.5 MiB


def test_workspace_bound() -> None:
    sp.set_max_workspace_bytes(1000)
    try:
        with pytest.raises(ValueError, match="max_workspace_bytes: expected at least 49152, room for 3 messages of 8"):
            choose(problem(2), "ring")
        sp.set_max_workspace_bytes(1 << 20)
        assert choose(problem(2), "ring", chunks=1).sizes.chunk_rows == 168
        assert choose(problem(2), "ring").sizes.chunk_rows == 128  # small messages are within the bound
    finally:
        sp.set_max_workspace_bytes(None)


def test_intervals_of_a_hull() -> None:
    assert Mask(4, 0).hull(Interval(10, 20), 32) == Interval(6, 20)
    assert Mask(None, None, (0, 12, 32)).hull(Interval(13, 14), 32) == Interval(12, 32)
