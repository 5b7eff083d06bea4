"""The planner: what it chooses and why, the bound on staging memory, and that all ranks plan alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import seqpar_kernels as sp
from seqpar_kernels.functional import checked_all_gather_linear, checked_linear_reduce_scatter
from seqpar_kernels.overlap import planner
from seqpar_kernels.overlap.engines import plan
from seqpar_kernels.overlap.machine_profile import MachineProfile, default_profile
from seqpar_kernels.overlap.planner import Work, estimate, spreads_weight_gradient

from ..world import RankError, World

PROFILE = MachineProfile(
    flops_64=1e11,
    flops_32=2e11,
    flops_16=4e11,
    memory_bytes=1e10,
    call_seconds=1e-6,
    link_bytes=1e8,
    message_seconds=5e-5,
    busy_seconds=0.0,
    source="a test",
)


def work(rows: int, k: int = 1024, n: int = 1024, ranks: int = 2, dtype: torch.dtype = torch.float32) -> Work:
    return Work(
        ranks=ranks,
        rows=rows,
        flops=2 * rows * ranks * k * n,
        weight_bytes=k * n * dtype.itemsize,
        shard_bytes=rows * k * dtype.itemsize,
        dtype=dtype,
        outer=1,
    )


@pytest.fixture(autouse=True)
def no_bound() -> Any:
    yield
    sp.set_max_workspace_bytes(None)


def test_small_calls_are_not_cut_and_large_ones_are() -> None:
    small, large = plan("auto", None, work(4), PROFILE), plan("auto", None, work(2048), PROFILE)
    assert (small.engine, small.chunks) == ("single", 1) and "size floor" in small.reason
    assert large.engine == "p2p" and large.chunks > 2
    assert large.wire_bytes == 2048 * 1024 * 4


def test_cutting_does_not_pay_where_the_processor_that_multiplies_moves_the_bytes() -> None:
    """Ranks of one machine: what the wire saves the matmul loses."""
    fast = PROFILE._replace(link_bytes=3e9)
    assert plan("auto", None, work(2048), fast._replace(busy_seconds=1 / 3e9)).engine == "single"
    assert plan("auto", None, work(2048, n=64), fast).engine == "p2p"


def test_expensive_messages_mean_fewer_chunks() -> None:
    cheap = plan("auto", None, work(2048), PROFILE._replace(message_seconds=1e-6)).chunks
    dear = plan("auto", None, work(2048), PROFILE._replace(message_seconds=1e-2)).chunks
    assert dear < cheap


def test_pieces_stay_large_enough_for_a_matmul() -> None:
    free = PROFILE._replace(message_seconds=0.0, call_seconds=0.0, memory_bytes=1e15)
    assert plan("p2p", None, work(2048), free).chunks == 16
    assert plan("p2p", None, work(300), free).chunks == 4
    assert plan("p2p", None, work(60), free).chunks == 1
    assert plan("p2p", 30, work(60), free).chunks == 30  # who asks for it gets it


def test_a_faster_dtype_shifts_the_balance() -> None:
    matmuls = [estimate(4, work(512, dtype=d), PROFILE).matmul for d in (torch.float64, torch.float32, torch.float16)]
    assert matmuls[0] > matmuls[1] > matmuls[2]


@given(
    st.integers(0, 5000),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.integers(2, 8),
    st.sampled_from(["cpu", "cuda"]),
)
def test_a_plan_is_never_worse_than_no_plan(rows: int, k: int, n: int, ranks: int, device: str) -> None:
    """By the model's own measure; and there is always at least one row a chunk."""
    profile, job = default_profile(device), work(rows, k, n, ranks)
    settled = plan("auto", None, job, profile)
    assert settled.estimate is not None and settled.estimate.total <= estimate(None, job, profile).total
    assert 1 <= settled.chunks <= max(1, rows)
    assert 0 <= settled.estimate.hidden <= 1
    assert (settled.engine == "single") <= (settled.estimate.hidden == 0)


def test_the_model_by_hand() -> None:
    job = work(1000, k=100, n=200, ranks=2)
    matmul = 2 * 2000 * 100 * 200 / 2e11 + 1e-6
    wire = 1000 * 100 * 4 / 1e8 + 5e-5
    assert estimate(None, job, PROFILE) == pytest.approx((matmul, wire, matmul + wire))
    call = 1e-6 + 100 * 200 * 4 / 1e10
    pieces = estimate(4, job, PROFILE)
    assert pieces.total == pytest.approx(4e-3 + 4 * 5e-5 + matmul / 2 / 15 + call)  # chunks of 1, 2, 4 and 8 parts
    assert pieces.hidden == pytest.approx((matmul + wire - pieces.total) / matmul)


@pytest.mark.parametrize(("ranks", "largest", "smallest"), [(2, 8 / 15, 1 / 15), (4, 1 / 4, 1 / 4)])
def test_the_model_where_the_matmul_takes_longer(ranks: int, largest: float, smallest: float) -> None:
    """What the own rows leave of the largest piece's travel is waited for; a slower link then decides alone."""
    job = work(1000, k=1000, n=1000, ranks=ranks)
    free = PROFILE._replace(memory_bytes=1e15, call_seconds=0.0, message_seconds=0.0)
    own = 2 * 1000 * 1000 * 1000 / 2e11  # 10 ms a shard
    for shard_wire in (5e-3, 15e-3, 25e-3, 200e-3):
        wire = (ranks - 1) * shard_wire
        expected = max(ranks * own + max(0.0, shard_wire * largest - own), wire + own * smallest)
        rate = 4e6 / shard_wire
        assert estimate(4, job, free._replace(link_bytes=rate)).total == pytest.approx(expected, rel=1e-5)


@given(st.integers(64, 9000), st.integers(2, 5), st.floats(1e7, 1e11), st.floats(1e8, 1e12), st.floats(0, 1e-9))
def test_the_best_of_all_counts_is_chosen_or_nearly(
    rows: int, ranks: int, link: float, memory: float, busy: float
) -> None:
    profile = PROFILE._replace(link_bytes=link, memory_bytes=memory, busy_seconds=busy)
    job = work(rows, ranks=ranks)
    counts = [count for count in (1, 2, 4, 8, 16) if count <= max(1, rows // 64)]
    best = min(estimate(count, job, profile).total for count in counts)
    chosen = estimate(plan("p2p", None, job, profile).chunks, job, profile).total
    assert chosen <= best * (1.15 if ranks == 2 else 1 + 1e-9)


def test_a_weight_gradient_is_spread_where_the_wire_is_waited_for() -> None:
    """Matmul 43 ms, wire 8 MiB: 84 ms at this rate, 4 ms at the other."""
    slow, fast = PROFILE, PROFILE._replace(link_bytes=2e9)
    assert spreads_weight_gradient(4, work(2048), slow, dgrad=True)
    assert spreads_weight_gradient(4, work(2048), slow, dgrad=False)
    assert not spreads_weight_gradient(4, work(2048), fast, dgrad=True)
    dear = slow._replace(memory_bytes=5e8)  # to sum it up in pieces takes longer than the wire
    assert not spreads_weight_gradient(4, work(2048), dear, dgrad=True)


def test_what_was_asked_for_is_done() -> None:
    assert plan("single", None, work(2048), PROFILE)[:3] == ("single", 1, "asked for")
    assert plan("single", 4, work(2048), PROFILE).reason == "asked for; chunks=4 has no effect"
    assert plan("auto", 3, work(4), PROFILE)[:3] == ("p2p", 3, "chunks=3 given")
    assert plan("p2p", None, work(4), PROFILE).engine == "p2p"


@given(st.integers(1, 3000), st.integers(0, 24), st.integers(1, 2), st.sampled_from([None, 1, 2, 8]))
def test_the_bound_lowers_the_chunk_size(rows: int, log_rows: int, outer: int, chunks: int | None) -> None:
    job = work(rows)._replace(outer=outer)
    row = 1024 * 4
    bound = (5 if outer > 1 else 2) * row + 2**log_rows
    sp.set_max_workspace_bytes(bound)
    try:
        settled = plan("p2p", chunks, job, PROFILE)
        message = -(-rows // settled.chunks) * row
        assert settled.chunks <= rows or chunks is not None
        packed = job.packed(settled.chunks)
        window = planner.window(message, packed)
        assert window is not None and window >= 1
        assert message * (1 + window * (4 if packed else 1)) <= bound
        if settled.chunks > (chunks or 1):
            assert "max_workspace_bytes" in settled.reason or chunks is None
    finally:
        sp.set_max_workspace_bytes(None)


def test_only_small_blocks_are_packed() -> None:
    """Messages of two blocks of 2 KiB a row: 64 KiB are 32 rows."""
    job = work(256)._replace(outer=2)
    assert [job.packed(chunks) for chunks in (1, 7, 8)] == [False, False, True]
    assert not job._replace(outer=1).packed(8)


def test_a_bound_that_cannot_be_kept_is_an_error() -> None:
    sp.set_max_workspace_bytes(8191)
    with pytest.raises(ValueError, match=r"max_workspace_bytes: expected at least 8192, .* got 8191"):
        plan("auto", None, work(16), PROFILE)
    sp.set_max_workspace_bytes(8192)
    assert plan("auto", None, work(16), PROFILE)[:2] == ("p2p", 16)
    with pytest.raises(ValueError, match="engine: 'single' moves everything at once"):
        plan("single", None, work(16), PROFILE)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "1"])
def test_a_bound_that_is_none(limit: Any) -> None:
    with pytest.raises(ValueError, match="limit: expected a positive int or None"):
        sp.set_max_workspace_bytes(limit)


def test_the_environment_sets_the_bound() -> None:
    code = "from seqpar_kernels.overlap.planner import max_workspace_bytes as m; print(m())"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "SEQPAR_MAX_WORKSPACE_BYTES": "12345"}, capture_output=True)
    assert done.stdout == b"12345\n", done.stderr
    done = subprocess.run(run, env={**os.environ, "SEQPAR_MAX_WORKSPACE_BYTES": "1G"}, capture_output=True)
    assert b"SEQPAR_MAX_WORKSPACE_BYTES: expected a positive number of bytes, got '1G'" in done.stderr


# --- on real ranks ---------------------------------------------------------------------------------------------------


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def both(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, length: int, **options: Any) -> list[torch.Tensor]:
    """Two layers, forward and backward."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, up, down)]
    hidden = sp.all_gather_linear(leaves[0], leaves[1], group=group(), seq_len=length, **options)
    out = sp.linear_reduce_scatter(hidden.tanh(), leaves[2], group=group(), **options)
    return [hidden.detach(), out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def bounded_case(batch: int, length: int) -> None:
    t, rank = group().size(), group().rank()
    x = torch.randn(batch, length, 6, dtype=torch.float64).tensor_split(t, 1)[rank]
    up, down = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    expected = both(x, up, down, length)
    row = batch * 6 * 8
    for rows in (1, 3):
        sp.set_max_workspace_bytes(5 * rows * row)
        try:
            for got, want in zip(both(x, up, down, length), expected, strict=True):
                torch.testing.assert_close(got, want)
            ran = checked_all_gather_linear(x, up, None, group(), -2, None, "auto", length)[0].plan
            assert ran.engine == "p2p" and (ran.chunks >= 2 or rows > 1), ran
        finally:
            sp.set_max_workspace_bytes(None)


@pytest.mark.parametrize(("batch", "length"), [(1, 17), (3, 17), (2, 24)])
def test_bounded_calls_compute_the_same(world: World, batch: int, length: int) -> None:
    world.run(bounded_case, batch, length)


def bounded_loss_case(batch: int, length: int) -> None:
    """The head's loss and gradients, which reorders sums where it is cut otherwise."""
    t, rank = group().size(), group().rank()
    x = torch.randn(batch, length, 6, dtype=torch.float64).tensor_split(t, 1)[rank].requires_grad_()
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5 * t, (batch, length))
    loss = sp.vocab_parallel_linear_cross_entropy
    results = []
    for bound in (None, 5 * batch * 6 * 8, 15 * batch * 6 * 8):
        sp.set_max_workspace_bytes(bound)
        try:
            value = loss(x, weight, target, group=group())
            results.append((value.detach(), *torch.autograd.grad(value, (x, weight))))
        finally:
            sp.set_max_workspace_bytes(None)
    for bounded in results[1:]:
        torch.testing.assert_close(bounded, results[0])


@pytest.mark.parametrize(("batch", "length"), [(1, 17), (3, 17), (2, 24)])
def test_bounded_losses_are_the_same(world: World, batch: int, length: int) -> None:
    world.run(bounded_loss_case, batch, length)


def scattered() -> Callable[[], torch.Tensor]:
    x, weight = torch.randn(1, 512, 4), torch.randn(256, 4)
    return lambda: sp.linear_reduce_scatter(x, weight, group=group(), chunks=2)


def lost() -> Callable[[], torch.Tensor]:
    x, weight, target = torch.randn(1, 128, 256), torch.randn(2, 256), torch.randint(8, (1, 512))
    common: dict[str, Any] = {"group": group(), "chunks": 2, "logit_rows": 4}
    return lambda: sp.vocab_parallel_linear_cross_entropy(x, weight, target, **common)


def peak_case(inputs: Callable[[], Callable[[], torch.Tensor]]) -> list[int]:
    """Peak of the bytes allocated by one forward, without and with a bound."""
    fn = inputs()
    peaks = []
    for bound in (None, 16 * 1024):
        sp.set_max_workspace_bytes(bound)
        try:
            with torch.profiler.profile(profile_memory=True) as trace:
                fn()
        finally:
            sp.set_max_workspace_bytes(None)
        now = peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        peaks.append(peak)
    return peaks


def test_a_bound_saves_memory(world4: World) -> None:
    """Of 512 rows of 1 KiB 384 leave, all alive at once or 16 of them; 512 partial rows are summed to 128."""
    for free, bounded in world4.run(peak_case, scattered):
        assert free == 1024 * (384 + 512)
        assert bounded == 1024 * (512 + 128)


def test_a_bound_saves_memory_in_a_loss(world4: World) -> None:
    """The gathered rows, 512 of 1 KiB, or 16 of them, beside small things."""
    for free, bounded in world4.run(peak_case, lost):
        assert free >= 1024 * 512
        assert bounded <= 1024 * (16 + 64)


def plans_case(rank_with_other_figures: int) -> tuple[Any, ...]:
    """A new group; one rank has a profile of its own."""
    from seqpar_kernels.overlap import tuning

    g = dist.new_group(list(range(group().size())))
    own = tuning.default_profile
    if group().rank() == rank_with_other_figures:
        tuning.default_profile = lambda *of: own(*of)._replace(message_seconds=1.0)
    try:
        x, w = torch.randn(1, 512, 1024), torch.randn(1024, 1024)
        a = checked_all_gather_linear(x, w, None, g, -2, None, "auto", None)[0].plan
        b = checked_linear_reduce_scatter(x, w, None, g, -2, None, "auto")[0].plan
        return a, b
    finally:
        tuning.default_profile = own


def test_ranks_with_other_figures_plan_alike(world2: World) -> None:
    for odd, engine in ((0, "single"), (1, "p2p")):
        first, second = world2.run(plans_case, odd)
        assert first == second
        assert [p.engine for p in first] == [engine, engine], first  # rank 0's count


def bounds_differ(bounds: list[int | None], chunks: int | None) -> None:
    sp.set_max_workspace_bytes(bounds[group().rank()])
    try:
        sp.all_gather_linear(torch.randn(1, 64, 64), torch.randn(8, 64), group=group(), chunks=chunks)
    finally:
        sp.set_max_workspace_bytes(None)


@pytest.mark.parametrize(
    ("bounds", "chunks"), [([8192, 16384], None), ([None, 2**20], 4)], ids=["other chunks", "other sizes of chunks"]
)
def test_bounds_that_differ_are_told(world2: World, bounds: list[int | None], chunks: int | None) -> None:
    with pytest.raises(RankError) as caught:
        world2.run(bounds_differ, bounds, chunks)
    assert all("the ranks disagree, nothing was sent" in text for _, text in caught.value.outcomes)


def dynamic_case() -> tuple[int, int]:
    """How often a function of a varying length is compiled, and how many plans it meets."""
    x, w = torch.randn(2, 3200, 6), torch.randn(300, 6, requires_grad=True)
    graphs: list[Any] = []
    plans = set()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return sp.all_gather_linear(x, w, group=group())

    for length in (4, 6, 8, 200, 400, 800, 1600, 2000, 3200):
        call, operands = checked_all_gather_linear(x[:, :length], w, None, group(), -2, None, "auto", None)
        torch.testing.assert_close(fn(x[:, :length].contiguous(), w), call(*operands))
        plans.add(call.plan[:2])
    return len(graphs), len(plans)


def test_a_compiled_function_knows_one_plan_for_many_lengths(world2: World) -> None:
    for graphs, plans in world2.run(dynamic_case):
        assert 1 < plans <= graphs <= plans + 2  # one with too few rows to cut, one with other chunks below the floor
