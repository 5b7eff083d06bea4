"""The peer transport over a stand-in of symmetric memory: what it moves, in which order, and what becomes of faults."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm import symm_mem, transport
from seqpar_kernels.comm.loopback import Loopback, RankErrors
from seqpar_kernels.comm.steps import Buffer, Post, Rows, Transfer
from seqpar_kernels.comm.transport import Room
from seqpar_kernels.layout import SequenceShard
from seqpar_kernels.overlap import engines, exchange_schedules, planner, schedule

from .symmetric_stand_in import Fabric, StandInDevice
from .test_loopback import integers, layer

Open = Callable[..., Loopback]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens virtual ranks whose engine "symm_mem" runs over the stand-in."""
    opened: list[Loopback] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def open_(ranks: int, timeout: float = 30.0, **options: Any) -> Loopback:
        loopback, fabric = Loopback(ranks, timeout=timeout), Fabric(ranks, timeout)
        devices = [StandInDevice(fabric, rank, **options) for rank in range(ranks)]
        monkeypatch.setattr(symm_mem, "open_device", lambda group: devices[group.rank()])
        monkeypatch.setattr(symm_mem, "why_not", lambda group: "")
        loopback.devices = devices  # type: ignore[attr-defined]
        opened.append(loopback)
        return loopback

    yield open_
    for loopback in opened:
        loopback.close()
    torch.set_num_threads(before)


def same(mine: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for m, t in zip(mine, theirs, strict=True) for a, b in zip(m, t, strict=True))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("seq_dim", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_the_collective_engine(
    peers: Open, ranks: int, seq_dim: int, chunks: int, dtype: torch.dtype
) -> None:
    with peers(ranks) as loopback:
        for length in (4 * ranks, 2 * ranks + 1, 1, 4 * ranks):
            expected = loopback.run(layer, length, seq_dim, chunks, "p2p", dtype)
            assert same(loopback.run(layer, length, seq_dim, chunks, "symm_mem", dtype), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bits_of_the_collective_engine_block_by_block(
    peers: Open, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    with peers(ranks) as loopback:
        expected = loopback.run(layer, 13, 1, 2, "p2p", torch.float32)
        monkeypatch.setattr(transport, "_BLOCK_BYTES", 1)
        assert same(loopback.run(layer, 13, 1, 2, "symm_mem", torch.float32), expected)


@pytest.mark.parametrize("channels", [2, 16])
def test_late_streams_and_few_channels(peers: Open, channels: int) -> None:
    """Streams that come late at random, ops one upon the other: all that orders them is what the transport said."""
    with peers(3, channels=channels, laziness=0.004) as loopback:
        expected = loopback.run(layer, 13, 0, 2, "p2p", torch.float32)
        for _ in range(4):
            assert same(loopback.run(layer, 13, 0, 2, "symm_mem", torch.float32), expected)


def late(g: dist.ProcessGroup, *args: Any) -> list[Tensor]:
    time.sleep(0.2 * g.rank())
    return layer(g, *args)


def test_late_peers(peers: Open) -> None:
    with peers(4) as loopback:
        expected = loopback.run(layer, 13, 1, 2, "p2p", torch.float32)
        assert same(loopback.run(late, 13, 1, 2, "symm_mem", torch.float32), expected)


def test_partial_results_are_computed_where_they_are_sent_from(peers: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reduce-scatter nothing is staged: the only copies are the pulls."""
    staged: list[torch.Size] = []
    own = symm_mem.SymmMemSession._slot

    def spy(self: Any, rank: int, transfer: Transfer, shape: Any, dtype: torch.dtype) -> Tensor:
        slot = own(self, rank, transfer, shape, dtype)
        if rank == self._transport.rank:
            staged.append(slot.shape)
        return slot

    def scatter(g: dist.ProcessGroup) -> None:
        x, w = integers(1, 8, 3, 6, dtype=torch.float32), integers(2, 5, 6, dtype=torch.float32)
        sp.linear_reduce_scatter(x, w, group=g, seq_dim=0, chunks=2, engine="symm_mem")

    with peers(2) as loopback:
        monkeypatch.setattr(symm_mem.SymmMemSession, "_slot", spy)
        copies: list[int] = []
        monkeypatch.setattr(Tensor, "copy_", _counted(copies, Tensor.copy_))
        loopback.run(scatter)
        pulled = sum(device.copied_bytes for device in loopback.devices)  # type: ignore[attr-defined]
    assert pulled == 2 * 4 * 3 * 5 * 4  # either rank pulls 4 rows of 3 x 5 floats
    assert sum(copies) == pulled
    assert staged


def _counted(copies: list[int], copy: Any) -> Any:
    def count(self: Tensor, source: Tensor, *args: Any, **options: Any) -> Tensor:
        copies.append(source.nbytes)
        result: Tensor = copy(self, source, *args, **options)
        return result

    return count


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_message_has_one_place_at_its_sender(ranks: int, length: int, chunks: int) -> None:
    """However each rank cuts: both ends find it there, and no two of a sender's share a byte."""
    row_bytes = 24
    counts = tuple(tuple((length + s + 2 * r) % 5 for r in range(ranks)) for s in range(ranks))
    sizes = counts[0]
    for make in (
        lambda shard: schedule.gather_matmul(shard, chunks),
        lambda shard: schedule.matmul_scatter(shard, chunks),
        lambda shard: schedule.column_backward(shard, chunks, dgrad=True, wgrad=True),
        lambda shard: exchange_schedules.all_to_all(counts, shard.rank, chunks=chunks),
        lambda shard: exchange_schedules.ring(sizes, shard.rank),
        lambda shard: exchange_schedules.chain(length, ranks, shard.rank, stage="scan"),
    ):
        steps = [make(SequenceShard(length, ranks, rank)) for rank in range(ranks)]
        rooms = [Room(program.buffers, (row_bytes,) * len(program.buffers)) for program in steps]
        assert len(set(rooms)) == 1
        for rank, program in enumerate(steps):
            sent = {t for step in program if isinstance(step, Post) for t in step.sends}
            assert {t.source for t in sent} <= {rank}
            places = {(t.buffer, t.slot, t.rows): (rooms[rank].offset(t), t.size) for t in sent}
            taken = [b for offset, size in places.values() for b in range(offset, offset + size * row_bytes)]
            assert len(set(taken)) == len(taken) and max(taken, default=-1) < rooms[rank].nbytes()


def test_a_room_holds_rows_of_several_widths() -> None:
    room = Room((Buffer("wide", 3), Buffer("narrow", 5, 2)), (100, 4), outer=2)
    assert room.nbytes() == 512 + 2 * 256
    transfer = Transfer("narrow", Rows(0, 0, 10, 14), 0, 1, slot=1, offset=1)
    assert room.offset(transfer) == 512 + 256 + 4
    assert room.offset(transfer._replace(part=1)) == 512 + 256 + 4 + 8
    with pytest.raises(KeyError, match="expected one of the buffers"):
        room.offset(transfer._replace(buffer="none"))


def test_a_workspace_cannot_grow_during_capture(peers: Open) -> None:
    def capture(g: dist.ProcessGroup) -> list[Tensor]:
        device = symm_mem.transport_over(g).device
        assert isinstance(device, StandInDevice)
        device.captures = True
        try:
            return layer(g, 8, 1, 2, "symm_mem", torch.float32)
        finally:
            device.captures = False

    match = r"all_gather_linear.* needs a workspace of \d+ bytes, the workspace has 0"
    with peers(2) as loopback, pytest.raises(RankErrors, match=match):
        loopback.run(capture)
    with peers(2) as loopback:
        loopback.run(lambda g: symm_mem.reserve_workspace(g, 1 << 16))
        expected = loopback.run(layer, 8, 1, 2, "p2p", torch.float32)
        assert same(loopback.run(capture), expected)


def stops_short(g: dist.ProcessGroup) -> None:
    """Rank 1 fails amid an op whose first chunks are under way."""
    x, w = integers(1, 2, 6, 6, dtype=torch.float32), integers(2, 5, 6, dtype=torch.float32)
    y = sp.linear_reduce_scatter(x.requires_grad_(), w.requires_grad_(), group=g, chunks=2, engine="symm_mem")
    if g.rank() == 1:
        y.register_hook(_explode)
    y.sum().backward()


def _explode(grad: Tensor) -> None:
    raise ArithmeticError("boom")


def test_a_peer_that_never_comes_is_named_and_the_workspace_lives(
    peers: Open, caplog: pytest.LogCaptureFixture
) -> None:
    def healthy(g: dist.ProcessGroup) -> None:
        x, w = integers(1, 2, 6, 6, dtype=torch.float32), integers(2, 5, 6, dtype=torch.float32)
        w.requires_grad_()
        sp.linear_reduce_scatter(x.requires_grad_(), w, group=g, chunks=2, engine="symm_mem").sum().backward()

    with peers(2, timeout=3.0) as loopback:
        expected = loopback.run(layer, 6, 1, 2, "p2p", torch.float32)
        loopback.run(healthy)  # all is agreed on: rank 0 is left waiting for a signal
        with caplog.at_level(logging.ERROR, "seqpar_kernels.comm.symm_mem"):
            first, second = loopback.outcomes(stops_short)
        assert isinstance(second, ArithmeticError)
        assert "linear_reduce_scatter backward(" in str(first) and "between rank 0 and rank 1" in str(first), first
        assert "receiving chunk 0 (rows" in caplog.text and "no signal for" in caplog.text
        loopback.outcomes(layer, 6, 1, 2, "symm_mem", torch.float32)  # here rank 1 hears of it
        for _ in range(3):
            assert same(loopback.run(layer, 6, 1, 2, "symm_mem", torch.float32), expected)


@pytest.mark.parametrize("engine", ["p2p", "symm_mem"])
@pytest.mark.parametrize("what", ["error", "straggler"])
def test_faults_amid_an_op(peers: Open, monkeypatch: pytest.MonkeyPatch, engine: str, what: str) -> None:
    """Over virtual ranks ("p2p" is loopback there) and over symmetric memory."""
    from seqpar_kernels.overlap import pipelined

    healthy, armed = pipelined.matmul_into, [True]

    def acting(*args: Any, **options: Any) -> None:
        if armed[0] and threading.current_thread().name == "rank-1":
            if what == "error":
                raise ArithmeticError("boom")
            time.sleep(0.4)
        healthy(*args, **options)

    def scatter(g: dist.ProcessGroup) -> Tensor:
        x = integers(g.rank(), 2, 12, 4, dtype=torch.float32)
        return sp.linear_reduce_scatter(x, torch.ones(3, 4), group=g, chunks=2, engine=engine)

    monkeypatch.setattr(pipelined, "matmul_into", acting)
    expected = sum(integers(r, 2, 12, 4, dtype=torch.float32) @ torch.ones(4, 3) for r in range(3))
    with peers(3, timeout=4.0) as loopback:
        outcomes = loopback.outcomes(scatter)
        if what == "error":
            for rank, outcome in enumerate(outcomes):
                text = "boom" if rank == 1 else "rank 1 failed in linear_reduce_scatter("
                assert isinstance(outcome, Exception) and text in str(outcome), outcome
        armed[0] = False
        for results in (*([outcomes] if what == "straggler" else []), loopback.run(scatter), loopback.run(scatter)):
            assert torch.equal(torch.cat(results, 1), expected)


def test_shapes_that_differ_are_refused_before_anything_is_sent(peers: Open) -> None:
    def differ(g: dist.ProcessGroup) -> None:
        sp.linear_reduce_scatter(
            torch.ones(2, 4 + 2 * g.rank(), 6), torch.ones(3, 6), group=g, engine="symm_mem", chunks=2
        )

    with peers(2) as loopback:
        expected = loopback.run(layer, 6, 1, 2, "p2p", torch.float32)
        for outcome in loopback.outcomes(differ):
            assert isinstance(outcome, RuntimeError) and "the ranks disagree, nothing was sent" in str(outcome)
        assert same(loopback.run(layer, 6, 1, 2, "symm_mem", torch.float32), expected)


def test_nothing_unmeasured_is_chosen_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = planner.Plan("p2p", 4, "the model's best")
    assert engines.rather(engines.SYMM_MEM, settled, "p2p", "") == settled
    assert engines.rather(engines.SYMM_MEM, settled, "auto", "") == (
        settled._replace(engine="symm_mem", reason="the model's best; by symmetric memory: SEQPAR_PEER is set")
    )
    refused = engines.rather(engines.SYMM_MEM, settled, "auto", "no CUDA device")
    assert refused.engine == "p2p" and "no symmetric memory: no CUDA device" in refused.reason
    with pytest.raises(RuntimeError, match="engine: 'symm_mem' cannot run here: no CUDA device"):
        engines.rather(engines.SYMM_MEM, settled, "symm_mem", "no CUDA device")


def test_without_cuda_the_reason_is_given_on_every_rank() -> None:
    def ask(g: dist.ProcessGroup) -> str:
        with pytest.raises(RuntimeError) as caught:
            sp.all_gather_linear(torch.ones(2, 4, 6), torch.ones(3, 6), group=g, engine="symm_mem")
        return str(caught.value)

    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with Loopback(2) as loopback:
        text = "engine: 'symm_mem' cannot run here: rank 0: no CUDA device"
        assert loopback.run(ask) == [text, text]
