"""Virtual ranks give what gloo ranks give, bit for bit; their links, their errors, what they share and what not."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm import select, transport
from seqpar_kernels.comm.loopback import Loopback, RankErrors
from seqpar_kernels.comm.steps import Post
from seqpar_kernels.comm.transport import Message
from seqpar_kernels.layout import resolve_group
from seqpar_kernels.overlap.pipeline import Exchange

from ..world import World


@pytest.fixture(autouse=True)
def one_thread_a_rank() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def integers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose matmuls are exact; not from the default generator, which virtual ranks share."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(
    g: dist.ProcessGroup, length: int, seq_dim: int, chunks: int | None, engine: str, dtype: torch.dtype
) -> list[Tensor]:
    """Two column-parallel weights, a row-parallel one, forward and backward. All that this rank has of the results."""
    t, rank = g.size(), g.rank()
    shape = [2, 2]
    shape[seq_dim] = length
    x = integers(1, *shape, 6, dtype=dtype).tensor_split(t, seq_dim)[rank].requires_grad_()
    weights = [
        integers(2 + i, n * t, 6, dtype=dtype).tensor_split(t)[rank].requires_grad_() for i, n in enumerate((4, 3))
    ]
    bias = integers(4, 4 * t, dtype=dtype).tensor_split(t)[rank].requires_grad_()
    down = integers(5, 5, 4 * t, dtype=dtype).tensor_split(t, 1)[rank].requires_grad_()
    common: dict[str, Any] = {"group": g, "seq_dim": seq_dim, "chunks": chunks, "engine": engine}
    h, side = sp.all_gather_linear(x, weights, [bias, None], seq_len=length, **common)
    y = sp.linear_reduce_scatter(h, down, **common)
    gy = integers(6, *shape, 5, dtype=dtype).tensor_split(t, seq_dim)[rank]
    grads = torch.autograd.grad([y, side], [x, *weights, bias, down], [gy, integers(7, *side.shape, dtype=dtype)])
    return [h.detach(), side.detach(), y.detach(), *grads]


def layer_on_the_world(*args: Any) -> list[Tensor]:
    assert dist.group.WORLD is not None
    return layer(dist.group.WORLD, *args)


PLANS = [(None, "auto"), (None, "single"), (1, "p2p"), (3, "p2p")]


@pytest.mark.parametrize(("chunks", "engine"), PLANS)
@pytest.mark.parametrize("seq_dim", [0, 1])
@pytest.mark.parametrize("length", [16, 13, 3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_gloo_ranks(
    world: World, length: int, seq_dim: int, chunks: int | None, engine: str, dtype: torch.dtype
) -> None:
    real = world.run(layer_on_the_world, length, seq_dim, chunks, engine, dtype)
    with Loopback(world.ranks) as loopback:
        virtual = loopback.run(layer, length, seq_dim, chunks, engine, dtype)
    for mine, theirs in zip(virtual, real, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("rate", [None, 2e6], ids=["copied", "paced"])
@pytest.mark.parametrize(("seq_dim", "engine"), [(0, "p2p"), (0, "single"), (1, "p2p")])
def test_the_unsharded_result_on_any_number_of_ranks(ranks: int, rate: float | None, seq_dim: int, engine: str) -> None:
    """In fp64 integers are exact however they are summed, so shards of any layer are those of the whole."""
    length = 2 * ranks + 1
    shape = (length, 2) if seq_dim == 0 else (2, length)
    with Loopback(ranks, bytes_per_second=rate) as loopback:
        got = loopback.run(layer, length, seq_dim, 2, "p2p", torch.float64)
    x = integers(1, *shape, 6, dtype=torch.float64).requires_grad_()
    up = integers(2, 4 * ranks, 6, dtype=torch.float64).requires_grad_()
    bias, down = integers(4, 4 * ranks, dtype=torch.float64), integers(5, 5, 4 * ranks, dtype=torch.float64)
    side = integers(3, 3 * ranks, 6, dtype=torch.float64)
    y = torch.nn.functional.linear(x @ up.t() + bias, down)
    g_side = integers(7, *shape, 3, dtype=torch.float64)
    dx, d_up = torch.autograd.grad(y, (x, up), integers(6, *shape, 5, dtype=torch.float64))
    dx = dx + g_side @ sum(side.tensor_split(ranks))
    assert torch.equal(torch.cat([rank[2] for rank in got], seq_dim), y)
    assert torch.equal(torch.cat([rank[3] for rank in got], seq_dim), dx)
    assert torch.equal(torch.cat([rank[4] for rank in got]), d_up)


def test_virtual_ranks_draw_alike_and_sum_replicated_gradients() -> None:
    with Loopback(2) as loopback:
        (first, grads), (second, others) = loopback.run(seeded_norm)
        again, _ = loopback.run(seeded_norm)[0]
    assert torch.equal(first, second)
    assert not torch.equal(first, again)  # every run draws anew
    assert grads and all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def seeded_norm(g: dist.ProcessGroup) -> tuple[Tensor, list[Tensor]]:
    x = integers(1, 2, 6, 16, dtype=torch.float32).tensor_split(g.size(), 1)[g.rank()]
    weight = torch.ones(16, requires_grad=True)
    sp.dropout_add_rms_norm(x, x, weight, p=0.5, group=g).square().sum().backward()
    y = sp.dropout_add_rms_norm(x, x, None, p=0.5, group=g)
    assert weight.grad is not None
    return sp.gather_sequence(y, g), [weight.grad]


def test_a_paced_link_takes_bytes_over_rate() -> None:
    """64 KiB from each of two peers, one after the other."""
    rate = 1e6

    def gather(g: dist.ProcessGroup) -> float:
        start = time.perf_counter()
        sp.gather_sequence(torch.ones(1, 128, 128), g)
        return time.perf_counter() - start

    with Loopback(3, bytes_per_second=rate) as loopback:
        elapsed = loopback.run(gather)
    assert min(elapsed) >= 2 * 65536 / rate


@pytest.mark.parametrize("engine", ["p2p", "single"])
def test_a_paced_link_carries_what_autograd_follows(engine: str) -> None:
    """The link's thread has a grad mode of its own, and a whole shard is sent as the leaf that it is."""

    def layer(g: dist.ProcessGroup) -> Tensor:
        x = integers(1, 4, 6, dtype=torch.float32).tensor_split(2)[g.rank()].detach().requires_grad_()
        weight = integers(2, 3, 6, dtype=torch.float32).requires_grad_()
        sp.all_gather_linear(x, weight, group=g, chunks=1, engine=engine).sum().backward()
        assert x.grad is not None
        return x.grad

    with Loopback(2, bytes_per_second=1e9) as loopback:
        got = loopback.run(layer)
    expected = 2 * integers(2, 3, 6, dtype=torch.float32).sum(0)
    assert all(torch.equal(grad, expected.expand(2, 6)) for grad in got)


def test_a_message_that_a_paced_link_cannot_carry_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, letter: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("seqpar_kernels.comm.loopback._CopyLink.carry", broken)
    with Loopback(2, bytes_per_second=1e9) as loopback:
        start = time.perf_counter()
        with pytest.raises(RankErrors, match="the link could not carry it"):
            loopback.run(lambda g: sp.gather_sequence(torch.ones(1, 2, 3), g))
        assert time.perf_counter() - start < loopback.timeout


def test_groups_are_process_groups_while_the_world_is_open() -> None:
    from seqpar_kernels.ops.registry import group_name, group_named

    with Loopback(2) as loopback:
        g = loopback.groups[1]
        assert resolve_group(g) is g and group_named(group_name(g)) is g
        assert (g.rank(), g.size()) == (1, 2)
        name = group_name(g)
    with pytest.raises(RuntimeError, match=r"resolve|group"):
        group_named(name)


def fails_alone(g: dist.ProcessGroup, where: str) -> None:
    x, w = integers(1, 2, 4, 6, dtype=torch.float32), integers(2, 3, 6, dtype=torch.float32)
    if where == "before" and g.rank() == 1:
        raise ArithmeticError("boom")
    if where == "shape" and g.rank() == 1:
        x = x[:1]
    y = sp.all_gather_linear(x.requires_grad_(), w, group=g)
    if where == "backward" and g.rank() == 1:
        y.register_hook(explode)
    y.sum().backward()


def explode(grad: Tensor) -> None:
    raise ArithmeticError("boom")


@pytest.mark.parametrize("where", ["before", "shape", "backward"])
def test_a_virtual_rank_that_fails_is_named_and_the_world_lives(where: str) -> None:
    with Loopback(2, timeout=2.0) as loopback:
        if where == "backward":  # nothing to agree on: rank 0 is left waiting in a transfer
            loopback.run(fails_alone, "nowhere")
        start = time.monotonic()
        first, second = loopback.outcomes(fails_alone, where)
        assert time.monotonic() - start < 10
        assert isinstance(first, RuntimeError) and "all_gather_linear" in str(first)
        assert ("rank 1" in str(first)) and isinstance(second, Exception)
        with pytest.raises(RankErrors, match="rank 0 failed in") if where == "backward" else nullcontext():
            loopback.run(layer, 5, 1, 2, "p2p", torch.float32)
        with Loopback(2) as fresh:
            expected = fresh.run(layer, 5, 1, 2, "p2p", torch.float32)
        got = loopback.run(layer, 5, 1, 2, "p2p", torch.float32)
        for mine, theirs in zip(got, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="ranks: expected at least one, got 0"):
        Loopback(0)
    with pytest.raises(ValueError, match="bytes_per_second: expected a positive rate or None, got -1"):
        Loopback(2, bytes_per_second=-1)


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 16])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "length"), [(2, 16), (3, 13)])
def test_blocks_straight_or_packed(
    monkeypatch: pytest.MonkeyPatch, ranks: int, length: int, batch: int, block_bytes: int
) -> None:
    """Batch-first, the larger blocks or all of them each on its own: the bits of sequence-first."""
    monkeypatch.setattr(transport, "_BLOCK_BYTES", block_bytes)
    with Loopback(ranks) as loopback:
        first = loopback.run(batched, batch, length, 0)
        straight = loopback.run(batched, batch, length, 1)
        single = loopback.run(batched, batch, length, 1, "single")
    for theirs, *ours in zip(first, straight, single, strict=True):
        for mine in ours:
            assert all(torch.equal(a, b.transpose(0, 1)) for a, b in zip(theirs[:3], mine[:3], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(theirs[3:], mine[3:], strict=True))


def batched(g: dist.ProcessGroup, batch: int, length: int, seq_dim: int, engine: str = "p2p") -> list[Tensor]:
    """h, y, dx, then the weights' gradients."""
    t, rank = g.size(), g.rank()
    x, gy = (
        integers(seed, length, batch, n, dtype=torch.float32).tensor_split(t)[rank] for seed, n in ((1, 6), (6, 5))
    )
    if seq_dim == 1:
        x, gy = x.transpose(0, 1).contiguous(), gy.transpose(0, 1)
    up = integers(2, 4 * t, 6, dtype=torch.float32).tensor_split(t)[rank].requires_grad_()
    down = integers(5, 5, 4 * t, dtype=torch.float32).tensor_split(t, 1)[rank].requires_grad_()
    common: dict[str, Any] = {"group": g, "seq_dim": seq_dim, "engine": engine}
    common["chunks"] = 2 if engine == "p2p" else None
    h = sp.all_gather_linear(x.requires_grad_(), up, seq_len=length, **common)
    y = sp.linear_reduce_scatter(h, down, **common)
    return [h.detach(), y.detach(), *torch.autograd.grad(y, (x, up, down), gy)]


def batched_on_the_world(batch: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    assert dist.group.WORLD is not None
    packed = batched(dist.group.WORLD, batch, length, 1)
    before, transport._BLOCK_BYTES = transport._BLOCK_BYTES, 1
    try:
        return packed, batched(dist.group.WORLD, batch, length, 1)
    finally:
        transport._BLOCK_BYTES = before


@pytest.mark.parametrize(("batch", "length"), [(2, 16), (3, 13), (2, 1), (0, 4)])
def test_blocks_straight_or_packed_on_real_ranks(world: World, batch: int, length: int) -> None:
    for packed, straight in world.run(batched_on_the_world, batch, length):
        assert all(torch.equal(a, b) for a, b in zip(packed, straight, strict=True))


def test_large_blocks_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 rows of 1 KiB, in messages of two blocks of 64 KiB: nothing is packed, nothing unpacked."""
    copied: list[int] = []
    monkeypatch.setattr(Exchange, "post", _watching(Exchange.post, copied))
    with Loopback(2) as loopback:
        loopback.run(wide_rows, 256)
        assert not copied
        loopback.run(wide_rows, 64)
    assert copied and set(copied) == {2 * 32 * 1024}


def _watching(post: Any, copied: list[int]) -> Any:
    """Notes the bytes of each message that is not memory of the tensor it is sent from or received into."""

    def watch(self: Exchange, step: Post, source: Any, target: Any) -> None:
        windows = {t: window(t) for window, side in ((source, step.sends), (target, step.receives)) for t in side}
        session: Any = self._session
        inner = session.post

        def inspect(sends: list[Message], receives: list[Message]) -> None:
            for message in (*sends, *receives):
                window = windows[message.transfer._replace(part=0)]
                if message.buffer.untyped_storage().data_ptr() != window.untyped_storage().data_ptr():
                    copied.append(message.buffer.nbytes)
            inner(sends, receives)

        session.post = inspect
        try:
            post(self, step, windows.__getitem__, windows.__getitem__)
        finally:
            session.post = inner

    return watch


def wide_rows(g: dist.ProcessGroup, length: int) -> None:
    x = torch.ones(2, length // 2, 256, requires_grad=True)
    up = torch.ones(256, 256, requires_grad=True)
    h = sp.all_gather_linear(x, up, group=g, chunks=1, engine="p2p")
    sp.linear_reduce_scatter(h, up, group=g, chunks=1, engine="p2p").sum().backward()


def test_a_transport_whose_group_is_gone_says_so() -> None:
    with Loopback(1) as loopback:
        gone = select.messages(loopback.groups[0])
    gc.collect()
    with pytest.raises(RuntimeError, match="an op: its process group is gone"):
        gone.session("an op", transport.Room((), ()))
