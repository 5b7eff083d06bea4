"""Rounds of moe_mlp: what comes from all peers at a time is one batch of the experts; a bound cuts batches alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.overlap import moe_backward
from seqpar_kernels.overlap.messages import Messages
from seqpar_kernels.overlap.moe_exchange import Call
from seqpar_kernels.overlap.moe_routes import ExpertPlacement, Pairs, PairsByExpert, pairs_of, sum_of_experts

from ..kernels.norm_cases import poison  # noqa: F401
from ..world import World
from .groups import on_ranks
from .moe_problem import F32, F64, Problem

TOKENS = (300, 700, 1, 400)


def test_number_of_rounds() -> None:
    """As many as leave an expert 64 rows of all peers together, four at most; or what is asked for."""
    placement = ExpertPlacement(64, 4, "ep")  # 16 experts a rank
    by_pairs = {0: 1, 16 * 64: 1, 16 * 128 - 1: 1, 16 * 128: 2, 16 * 288: 4, 16 * 4000: 4}
    assert {pairs: placement.rounds(10_000, pairs, 1, None) for pairs in by_pairs} == by_pairs
    assert [placement.rounds(tokens, 10_000, 1, 7) for tokens in (0, 3, 100)] == [1, 3, 7]


def settled(ids: list[Tensor], rank: int, chunks: int | None) -> Call:
    """Of one rank, without a group."""
    placement = ExpertPlacement(9, len(ids), "ep")
    call = Call(None, torch.zeros(len(ids[rank]), 8), ids[rank], placement, chunks, None)
    call.rank, call.ranks = rank, len(ids)
    call.peers = [(rank + k) % len(ids) for k in range(1, len(ids))]
    call.tokens = [placement.tokens(ids[rank], r) for r in range(len(ids))]
    tokens = [[placement.tokens(some, r).shape[0] for r in range(len(ids))] for some in ids]
    call.settle(
        torch.tensor([[*zip(row, placement.loads(some), strict=True)] for row, some in zip(tokens, ids, strict=True)])
    )
    return call


@pytest.mark.parametrize("chunks", [None, 1, 3, 50])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_agree_on_pieces(ranks: int, chunks: int | None) -> None:
    """What a rank sends is what its peer expects, by number and rows; rounds lie together and cover all rows."""
    generator = torch.Generator().manual_seed(ranks)
    ids = [torch.randint(9, (n, 2), generator=generator) for n in (900, 0, 5, 1200)[:ranks]]
    calls = [settled(ids, rank, chunks) for rank in range(ranks)]
    for target, call in enumerate(calls):
        incoming = [piece for some in call.rounds for piece in some.pieces]
        for source in call.peers:
            sent = [piece[1:4] for piece in calls[source].leaving[target]]
            assert sent == [piece[1:4] for piece in incoming if piece.source == source]
        for number, some in enumerate(call.rounds):
            assert all(piece.number == number for piece in some.pieces)
            rows = [row for piece in some.pieces for row in range(piece.place.start, piece.place.stop)]
            assert rows == list(range(some.start, some.stop))
        assert [r for some in call.rounds for r in range(some.start, some.stop)] == list(range(call.arriving))


def test_batches_within_the_bound() -> None:
    x, ids = torch.zeros(50, 8), torch.zeros(50, 3, dtype=torch.int64)
    token = 3 * 2 * 8 * 4  # bytes before and after three experts
    for bound, most in ((None, 50), (token * 7 + 1, 7), (token, 1), (1, 1)):
        call = Call(None, x, ids, ExpertPlacement(4, 1, "ep"), None, bound)
        parts = call.bounded(3, 50)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(3, 50))
        assert max(part.stop - part.start for part in parts) == min(most, 47)
        assert call.bounded(5, 5) == [slice(5, 5)]


def batches() -> list[Pairs]:
    generator = torch.Generator().manual_seed(0)
    return [pairs_of(torch.randint(-1, 5, (n, 3), generator=generator), 5) for n in (11, 0, 1, 6)]


@pytest.mark.parametrize("by_run", [True, False])
def test_pairs_of_batches_by_expert(by_run: bool) -> None:
    """Every pair has a place, those of one expert lie together, and among them those of one batch in their order."""
    some = batches()
    order = PairsByExpert(some)
    whole = torch.full((order.size, 3), -1)  # expert, batch, number in the batch
    for number, pairs in enumerate(some):
        of_pairs = torch.arange(5).repeat_interleave(torch.tensor(pairs.counts))
        rows = torch.stack([of_pairs, torch.full_like(of_pairs, number), torch.arange(pairs.size)], 1)
        for strip in pairs.strips(by_run):
            whole[order.place(number, strip)] = rows[strip.pairs]
    assert whole.tolist() == sorted(whole.tolist()) and order.size == sum(pairs.size for pairs in some)
    assert order.counts == whole[:, 0].bincount(minlength=5).tolist()


@pytest.mark.parametrize("weighted", [True, False])
def test_sum_of_experts(weighted: bool) -> None:
    """The bits of a row depend on no other row; a row without an expert is 0."""
    generator = torch.Generator().manual_seed(1)
    local = torch.randint(-1, 5, (40, 3), generator=generator)
    local[7] = -1
    pairs, weights = pairs_of(local, 5), torch.rand(40, 3, generator=generator) if weighted else None
    y = torch.randn(pairs.size, 33, generator=generator)
    of_slot = torch.stack(
        [torch.where(w >= 0, 1.0, 0.0) if weights is None else weights[:, k] for k, w in enumerate(pairs.where.t())], 1
    )
    expected = (y.double()[pairs.where.clamp(min=0)] * (of_slot.double() * (pairs.where >= 0))[..., None]).sum(1)
    total = sum_of_experts(y, weights, pairs)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(sum_of_experts(y.bfloat16(), weights, pairs).double(), expected, rtol=0, atol=0.05)
    assert torch.equal(total[7], torch.zeros(33))
    for row in (0, 20):
        alone = pairs_of(local[row : row + 1], 5)
        mine = y[pairs.where[row][pairs.where[row] >= 0]][alone.slots.argsort().argsort()]
        one = sum_of_experts(mine, None if weights is None else weights[row : row + 1], alone)
        assert torch.equal(one[0], total[row])


def bound_case(group: dist.ProcessGroup) -> None:
    """The backward works in the batches of its forward, whatever the bound is by then. A bound cuts no message."""
    problem = Problem(TOKENS[: group.size()], choose="one", features=8, inner=8, dtype=F64, biases=True)
    usual, posted = Messages.post, [0]

    def counting(self: Messages, sends, receives) -> None:  # type: ignore[no-untyped-def]
        posted[0] += len(sends)
        usual(self, sends, receives)

    Messages.post = counting  # type: ignore[method-assign]
    try:
        problem.check(group)
        sent, posted[0] = posted[0], 0
        sp.set_max_workspace_bytes(2 * 2 * 8 * 8 * 5)  # five tokens
        problem.check(group)
        assert posted[0] == sent
    finally:
        Messages.post = usual  # type: ignore[method-assign]
        sp.set_max_workspace_bytes(None)
    want, leaves = problem.sharded(group), {}
    for name in ("x", "weights", "w1", "w2"):
        leaves[name] = problem.mine(name, problem.tensors[name], group, "ep").clone().requires_grad_()
    index, dout = (problem.mine(n, t, group, "ep") for n, t in (("index", problem.index), ("dout", problem.dout)))
    biases = [problem.mine(n, problem.tensors[n], group, "ep") for n in ("b1", "b2")]
    x, weights, w1, w2 = leaves.values()
    for before, after in ((2 * 2 * 8 * 8 * 5, None), (None, 2 * 2 * 8 * 8 * 5)):
        try:
            sp.set_max_workspace_bytes(before)
            out = sp.moe_mlp(x, index, weights, w1, w2, *biases, group=group, num_experts=problem.experts)
            sp.set_max_workspace_bytes(after)
            grads = torch.autograd.grad(out, list(leaves.values()), dout)
        finally:
            sp.set_max_workspace_bytes(None)
        for name, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(grad, want[name])


def test_a_bound_that_changes(world4: World) -> None:
    world4.run(on_ranks, bound_case)


def one_launch_case(group: dist.ProcessGroup) -> None:
    """As on CUDA, where a batch is multiplied at once and its rows are put in their places after: the same bits."""
    problem = Problem(TOKENS[: group.size()], features=8, inner=8, biases=True, choose="some")
    usual = problem.sharded(group, chunks=3)
    by_run = moe_backward.one_matmul_a_run
    moe_backward.one_matmul_a_run = lambda x: False
    try:
        at_once = problem.sharded(group, chunks=3)
    finally:
        moe_backward.one_matmul_a_run = by_run
    assert all(torch.equal(at_once[name], usual[name]) for name in usual)


def test_batches_at_once(world4: World) -> None:
    world4.run(on_ranks, one_launch_case)


def together_case(group: dist.ProcessGroup) -> None:
    """Many small experts, of which a round of all peers fills the matmuls and a piece of one peer would not."""
    for way in ("ep", "tp"):
        problem = Problem((200,) * group.size(), experts=12, top_k=4, features=8, inner=8, dtype=F32)
        problem.check(group, way)
        problem.check(group, way, chunks=5)


def test_rounds_of_small_experts(world4: World) -> None:
    world4.run(on_ranks, together_case)
