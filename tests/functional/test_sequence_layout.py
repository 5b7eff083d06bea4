"""Shards of a sequence in either layout: every row once, conjugate backwards, positions and labels that follow."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels import sequence_layout
from seqpar_kernels.sequence_layout import Interval, common, count, joined, places, rows_of

from ..world import World
from .groups import on_ranks

LAYOUTS = ("contiguous", "zigzag")
LENGTHS = (0, 1, 2, 3, 7, 16, 17, 23)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_held_once(layout: str) -> None:
    for length, ranks in itertools.product((*LENGTHS, 30, 31), (1, 2, 3, 4, 5)):
        held = [rows_of(layout, length, ranks, rank) for rank in range(ranks)]
        rows = [list(itertools.chain(*(range(i.start, i.stop) for i in own))) for own in held]
        assert sorted(itertools.chain(*rows)) == list(range(length))
        assert all(own == sorted(own) for own in rows)
        assert [len(own) for own in rows] == [len(part) for part in torch.empty(length).tensor_split(ranks)]


def test_zigzag_is_that_of_the_field() -> None:
    for ranks, rank in ((2, 0), (2, 1), (4, 1), (4, 3)):
        expected = joined([(rank * 3, rank * 3 + 3), ((2 * ranks - 1 - rank) * 3, (2 * ranks - rank) * 3)])
        assert rows_of("zigzag", 6 * ranks, ranks, rank) == expected


def test_zigzag_shares_causal_work() -> None:
    work = [sum(p + 1 for i in rows_of("zigzag", 1003, 4, r) for p in range(*i)) for r in range(4)]
    assert max(work) <= 1.01 * sum(work) / 4


def test_intervals() -> None:
    rows = joined([(10, 14), (2, 5), (5, 6), (9, 9)])
    assert rows == (Interval(2, 6), Interval(10, 14)) and count(rows) == 8
    part = common(rows, (Interval(4, 12),))
    assert part == (Interval(4, 6), Interval(10, 12))
    assert places(rows, part) == (Interval(2, 4), Interval(4, 6))
    with pytest.raises(ValueError, match="layout: expected 'contiguous' or 'zigzag', got 'ring'"):
        sequence_layout.check_layout("ring")


def shards_case(group: dist.ProcessGroup) -> None:
    t, rank = group.size(), group.rank()
    for layout, length, dim in itertools.product(LAYOUTS, LENGTHS, (0, 1)):
        shape = [3, 3, 2]
        shape[dim] = length
        whole = torch.randn(shape)
        order = [sp.sequence_positions(length, group, layout)]
        rows = [torch.tensor([p for i in rows_of(layout, length, t, r) for p in range(*i)]).long() for r in range(t)]
        assert torch.equal(order[0], rows[rank])
        x = whole.clone().requires_grad_()
        y = sp.shard_sequence(x, group, dim, layout=layout)
        assert torch.equal(y, whole.index_select(dim, rows[rank]))
        (dx,) = torch.autograd.grad(y, x, y.detach() * 2)
        assert torch.equal(dx, whole * 2)
        p = y.detach().clone().requires_grad_()
        z = sp.unshard_sequence(p, group, dim, layout=layout, seq_len=length)
        assert torch.equal(z, whole)
        (dp,) = torch.autograd.grad(z, p, whole * 3)
        assert torch.equal(dp, y * 3)
        z = sp.unshard_sequence(p, group, dim, layout=layout, seq_len=length, partial_grad=True)
        (dp,) = torch.autograd.grad(z, p, whole * 2.0**rank)
        torch.testing.assert_close(dp, y.detach() * (2.0**t - 1))
        for ids in (torch.arange(2 * length).view(2, length), torch.ones(2, length, dtype=torch.bool)):
            mine = sp.shard_sequence(ids, group, -1, layout=layout)
            assert torch.equal(mine, ids[:, rows[rank]])
            assert torch.equal(sp.unshard_sequence(mine, group, -1, layout=layout, seq_len=length), ids)


def labels_case(group: dist.ProcessGroup) -> None:
    for layout, length in itertools.product(LAYOUTS, LENGTHS):
        labels = torch.randint(100, (2, length))
        ends = torch.tensor([0, length // 3, length // 3, length])
        for documents in (None, ends):
            expected = torch.cat([labels[:, 1:], torch.full((2, min(1, length)), -100)], 1)
            if documents is not None and length // 3:
                expected[:, length // 3 - 1] = -100
            expected = sp.shard_sequence(expected, group, -1, layout=layout)
            options = dict(layout=layout, cu_seqlens=documents)
            assert torch.equal(sp.next_token_labels(labels, group, **options), expected)
            mine = sp.shard_sequence(labels, group, -1, layout=layout)
            found = sp.next_token_labels(mine, group, **options, input_is_sharded=True, seq_len=length)
            assert torch.equal(found, expected)


def errors_case(group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match="layout: expected 'contiguous' or 'zigzag', got 'striped'"):
        sp.shard_sequence(torch.ones(4, 2), group, layout="striped")
    with pytest.raises(ValueError, match="seq_len: expected a non-negative int"):
        sp.sequence_positions(-1, group)
    with pytest.raises(ValueError, match=r"labels: expected integers, got torch\.float32"):
        sp.next_token_labels(torch.ones(2, 8), group)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected integers \[documents \+ 1\]"):
        sp.next_token_labels(torch.ones(2, 8).long(), group, cu_seqlens=torch.ones(3))
    dist.barrier(group)
    sp.unshard_sequence(torch.ones(2, 1), group)  # all ranks have gone on after their errors


def compile_case(group: dist.ProcessGroup) -> None:
    x = torch.randn(2, 9, 3, requires_grad=True)

    def both(x: torch.Tensor) -> torch.Tensor:
        mine = sp.shard_sequence(x, group, 1, layout="zigzag")
        mine = mine + sp.sequence_positions(9, group, "zigzag")[:, None]
        return sp.unshard_sequence(mine, group, 1, layout="zigzag", seq_len=9)

    out = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(out, x + torch.arange(9)[:, None])
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(dx, torch.ones_like(x))


@pytest.mark.parametrize("case", [shards_case, labels_case, errors_case, compile_case], ids=lambda c: c.__name__)
def test_on_ranks(world4: World, case: object) -> None:
    world4.run(on_ranks, case)
