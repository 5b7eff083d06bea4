"""All-to-all, ring, chain and a schedule of one's own on every transport: new patterns need nothing of a transport."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_kernels.comm import transport
from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.comm.steps import Buffer, Compute, Post, Rows, Step, Transfer, Wait
from seqpar_kernels.overlap import engines, schedule
from seqpar_kernels.overlap.exchange_schedules import all_to_all, chain, ring
from seqpar_kernels.overlap.pipeline import Call, run

from ..comm.test_loopback import integers, one_thread_a_rank  # noqa: F401
from ..comm.test_symm_mem import Open, peers  # noqa: F401
from ..world import World

WIDTH = 6


def shape_of(rows: int, seq_dim: int) -> list[int]:
    """Two blocks of memory, or two rows side by side."""
    return [rows, 2, WIDTH] if seq_dim == 0 else [2, rows, WIDTH]


def owned(rank: int, rows: int, seq_dim: int) -> Tensor:
    return integers(rank + 1, *shape_of(rows, seq_dim), dtype=torch.float32)


def counts_of(ranks: int, even: bool) -> tuple[tuple[int, ...], ...]:
    """Rows from each rank to each other; ragged ones with a rank that sends nothing and one that gets nothing."""
    if even:
        return ((2,) * ranks,) * ranks
    return tuple(tuple(0 if s == 1 or r == 0 else (3 * s + 2 * r) % 5 for r in range(ranks)) for s in range(ranks))


def all_to_all_case(g: dist.ProcessGroup, engine: str, seq_dim: int, even: bool, chunks: int) -> None:
    me, counts = g.rank(), counts_of(g.size(), even)
    inputs = [owned(rank, sum(row), seq_dim) for rank, row in enumerate(counts)]
    got = sum(row[me] for row in counts)
    x = inputs[me]
    call = Call("all_to_all", x, seq_dim, sum(map(sum, counts)), g, counts, chunks, engine)
    sent = schedule_rows(call, x)
    out = call.layout.shape(got, WIDTH)
    received = schedule_rows(call, torch.full(out, torch.nan))
    first, own = sum(row[me] for row in counts[:me]), counts[me][me]
    offset = sum(counts[me][:me])
    received[:, first : first + own].copy_(sent[:, offset : offset + own])
    seen: list[int] = []

    def work(step: Compute) -> None:
        rows = received[:, step.start : step.stop]
        assert not rows.isnan().any()
        seen.extend(range(step.start, step.stop))

    run(
        all_to_all(counts, me, chunks=chunks, stage="work"),
        call.exchange(WIDTH, x, engines.named(engine).transport),
        source=lambda t: sent[:, t.offset : t.offset + t.size],
        target=lambda t: received[:, t.rows.start : t.rows.stop],
        compute=work,
    )
    expected = torch.cat([x.split(list(row), seq_dim)[me] for x, row in zip(inputs, counts, strict=True)], seq_dim)
    assert torch.equal(received.view(out), expected)
    assert sorted(seen) == list(range(got))


def ring_case(g: dist.ProcessGroup, engine: str, seq_dim: int, even: bool, hops: int | None) -> None:
    me, ranks = g.rank(), g.size()
    sizes = (3,) * ranks if even else tuple((5 * rank) % 7 for rank in range(ranks))  # rank 0 has nothing
    starts = list(itertools.accumulate(sizes, initial=0))
    x = owned(me, sizes[me], seq_dim)
    call = Call("ring", x, seq_dim, sum(sizes), g, sizes, hops, engine)
    out = call.layout.shape(sum(sizes), WIDTH)
    whole = schedule_rows(call, torch.full(out, torch.nan))
    whole[:, starts[me] : starts[me + 1]].copy_(schedule_rows(call, x))
    run(
        ring(sizes, me, hops=hops, stage="attend"),
        call.exchange(WIDTH, x, engines.named(engine).transport),
        source=lambda t: whole[:, t.rows.start : t.rows.stop],  # own rows, then what has arrived
        target=lambda t: whole[:, t.rows.start : t.rows.stop],
        compute=lambda step: _no_nan(whole[:, step.start : step.stop]),
    )
    here = {(me - hop) % ranks for hop in range((ranks - 1 if hops is None else hops) + 1)}
    for rank, part in enumerate(whole.view(out).split(list(sizes), seq_dim)):
        expected = owned(rank, sizes[rank], seq_dim)
        assert torch.equal(part, expected) if rank in here else part.isnan().all()


def chain_case(g: dist.ProcessGroup, engine: str, rows: int) -> None:
    """The state of a scan: each rank adds its own to what came from the left."""
    me, ranks = g.rank(), g.size()
    own = owned(me, rows, 0)
    call = Call("chain", own, 0, rows, g, engine)
    came = torch.zeros(1, rows, 2 * WIDTH)
    state = schedule_rows(call, own).clone()
    run(
        chain(rows, ranks, me, stage="scan"),
        call.exchange(WIDTH, own, engines.named(engine).transport),
        source=lambda t: state,
        target=lambda t: came,
        compute=lambda step: _none(state.add_(came)),
    )
    expected = sum(owned(rank, rows, 0) for rank in range(me + 1))
    assert torch.equal(state.view(own.shape), expected)  # type: ignore[arg-type]


def own_schedule_case(g: dist.ProcessGroup, engine: str) -> None:
    """Two buffers of their own dtype and width at once: rows in float32, one float64 number for each."""
    me, ranks, rows = g.rank(), g.size(), 3
    right, left = (me + 1) % ranks, (me - 1) % ranks
    numbers = {rank: owned(rank, rows, 0)[:, :1, :1].double() / 3 for rank in range(ranks)}
    sent = {"rows": owned(me, rows, 0), "numbers": numbers[me]}
    came = {name: torch.full_like(tensor, torch.nan) for name, tensor in sent.items()}
    steps: list[Step] = []
    for name in sent:
        move = [Transfer(name, Rows(s, 0, 0, rows), s, t) for s, t in ((me, right), (left, me))]
        steps += [Post((move[0],), (move[1],)), Wait(move[1])]
    program = schedule.Schedule(steps, (Buffer("rows", rows), Buffer("numbers", rows)))
    call = Call("own", sent["rows"], 0, rows, g, engine)
    row_bytes = {"rows": 2 * WIDTH * 4, "numbers": 8}
    exchange = call.exchange(row_bytes, sent["rows"], engines.named(engine).transport)
    views = [{name: tensor.view(1, rows, -1) for name, tensor in side.items()} for side in (sent, came)]
    run(program, exchange, lambda t: views[0][t.buffer], lambda t: views[1][t.buffer], compute=lambda step: None)
    assert torch.equal(came["rows"], owned(left, rows, 0)) and torch.equal(came["numbers"], numbers[left])


def schedule_rows(call: Call, x: Tensor) -> Tensor:
    """[outer, rows, inner * features], a view."""
    return x.view(call.layout.outer, -1, call.layout.inner * WIDTH)


def _no_nan(rows: Tensor) -> None:
    assert not rows.isnan().any()


def _none(_: object) -> None:
    pass


def every_case(g: dist.ProcessGroup, engine: str) -> None:
    for seq_dim, even in itertools.product((0, 1), (True, False)):
        for chunks in (1, 2):
            all_to_all_case(g, engine, seq_dim, even, chunks)
        for hops in (1, None):
            ring_case(g, engine, seq_dim, even, hops)
    for rows in (1, 4):
        chain_case(g, engine, rows)
    own_schedule_case(g, engine)


def in_packets_and_blocks(g: dist.ProcessGroup | None, engine: str) -> None:
    """Messages of two blocks of memory packed into one, and block by block."""
    g = g or dist.group.WORLD
    assert g is not None
    every_case(g, engine)


def block_by_block(engine: str) -> None:
    before, transport._BLOCK_BYTES = transport._BLOCK_BYTES, 1
    try:
        in_packets_and_blocks(None, engine)
    finally:
        transport._BLOCK_BYTES = before


def test_over_gloo(world: World) -> None:
    world.run(in_packets_and_blocks, None, "p2p")
    world.run(block_by_block, "p2p")


@pytest.mark.parametrize("block_bytes", [1, 1 << 16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_over_virtual_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int, block_bytes: int) -> None:
    monkeypatch.setattr(transport, "_BLOCK_BYTES", block_bytes)
    with Loopback(ranks) as loopback:
        loopback.run(every_case, "p2p")
    with Loopback(ranks, bytes_per_second=1e7) as loopback:
        loopback.run(every_case, "p2p")


@pytest.mark.parametrize("block_bytes", [1, 1 << 16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_over_symmetric_memory(
    monkeypatch: pytest.MonkeyPatch,
    peers: Open,  # noqa: F811
    ranks: int,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(transport, "_BLOCK_BYTES", block_bytes)
    options: dict[str, Any] = {"laziness": 0.0005}
    with peers(ranks, **options) as loopback:
        loopback.run(every_case, "symm_mem")
