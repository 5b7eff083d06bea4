"""Documents on ranks: balanced, every token once, within the bound; attention over them equals the unsharded one."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqpar_kernels as sp
from seqpar_kernels.packing import Costs, PackingPlan, Place, Share, shares
from seqpar_kernels.sequence_layout import rows_of

from ..oracle import assert_within_budget
from ..world import World
from .attention_cases import ends
from .attention_problem import F32, F64, Problem
from .groups import on_ranks

LONGEST = 131072


def distributions() -> dict[str, np.ndarray]:
    """Lengths of documents as batches have them."""
    rng = np.random.default_rng(20261130)
    found: dict[str, Any] = {}
    for n in (24, 64, 500):
        found[f"lognormal {n}"] = rng.lognormal(7, 1.2, n)
        found[f"Zipf {n}"] = 64.0 * rng.zipf(1.6, n)
        found[f"bimodal {n}"] = np.where(rng.random(n) < 0.1, rng.integers(16000, 40000, n), rng.integers(100, 800, n))
        found[f"equal {n + 1}"] = np.full(n + 1, 2048)
    found["one giant"] = np.concatenate([[LONGEST], rng.integers(50, 2000, 40)])
    found["giant alone"] = np.array([LONGEST - 1])
    found["fewer than ranks"] = np.array([9001, 4000, 1500])
    found["one more than ranks"] = np.full(9, 1024)
    return {name: np.clip(lengths, 1, LONGEST).astype(int) for name, lengths in found.items()}


DISTRIBUTIONS = distributions()


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_ranks_have_about_the_same_work(name: str, ranks: int) -> None:
    lengths = DISTRIBUTIONS[name].tolist()
    for options in (dict(token_work=0), dict(), dict(pair_work=0)):
        plan = sp.pack_documents(lengths, ranks, **options)
        assert plan.work_imbalance <= 1.05, plan
        assert sum(plan.tokens) == sum(lengths)
        bound = int(1.1 * sum(lengths) / ranks) + 1
        bounded = sp.pack_documents(torch.tensor(lengths), ranks, max_tokens=bound, **options)
        assert bounded.work_imbalance <= 1.05 and max(bounded.tokens) <= bound, bounded


def test_short_documents_are_whole() -> None:
    for name in ("lognormal 500", "bimodal 500", "one giant"):
        lengths = DISTRIBUTIONS[name]
        plan = sp.pack_documents(lengths.tolist(), 8)
        degrees = np.array([place.degree for place in plan.places])
        assert (degrees[lengths < np.median(lengths)] == 1).all()
    assert degrees[0] == 8  # the giant


def test_work_is_that_of_the_rows() -> None:
    for length in (0, 1, 2, 7, 30, 31):
        for degree in (1, 2, 3, 4, 6):
            held = [[p for i in rows_of("zigzag", length, degree, r) for p in range(*i)] for r in range(degree)]
            assert shares(length, degree) == tuple(Share(len(own), sum(own) + len(own)) for own in held)


def runs_to_its_end(plan: PackingPlan, backward: bool) -> bool:
    """A call is done once it is the next one of all its ranks."""
    left = [list(plan.on_rank(r).segments)[:: -1 if backward else 1] for r in range(plan.ranks)]
    done = True
    while done:
        done = False
        for segment in plan.segments:
            if all(left[r][:1] == [segment] for r in segment.ranks):
                done = True
                for r in segment.ranks:
                    left[r].pop(0)
    return not any(left)


@settings(max_examples=80)
@given(
    st.lists(st.integers(0, 40), max_size=10),
    st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    st.sampled_from([(1.0, 0.0), (1.0, 30.0), (0.0, 1.0)]),
    st.none() | st.integers(0, 30),
)
def test_every_token_is_placed_once(
    lengths: list[int], ranks: int, costs: tuple[float, float], spare: int | None
) -> None:
    bound = None if spare is None else sum(lengths) // ranks + spare
    options = dict(pair_work=costs[0], token_work=costs[1])
    try:
        plan = sp.pack_documents(lengths, ranks, max_tokens=bound, **options)
    except ValueError as error:
        found = re.fullmatch(r"max_tokens: expected at least (\d+), the best placement found .*", str(error))
        assert found and bound is not None and bound < int(found[1]) <= sum(-(-n // ranks) for n in lengths)
        bound = int(found[1])
        plan = sp.pack_documents(lengths, ranks, max_tokens=bound, **options)
    assert bound is None or max(plan.tokens) <= bound
    assert all(ranks % p.degree == 0 and p.first % p.degree == 0 <= p.first < ranks for p in plan.places)
    assert plan == sp.pack_documents(tuple(lengths), ranks, max_tokens=bound, **options)
    assert runs_to_its_end(plan, False) and runs_to_its_end(plan, True)
    documents = [(d, p) for d, n in enumerate(lengths) for p in range(n)]
    padded = torch.full((len(lengths), 41), -1)
    flat = torch.arange(len(documents))
    for i, (d, p) in enumerate(documents):
        padded[d, p] = i
    seen: list[int] = []
    for rank in range(ranks):
        mine = plan.on_rank(rank)
        index = mine.index().tolist()
        held = [documents[i] for i in index]
        assert held == list(zip(mine.document_ids().tolist(), mine.position_ids().tolist()))
        following = [i + 1 if p + 1 < lengths[d] else -100 for i, (d, p) in zip(index, held)]
        assert mine.take(flat).tolist() == mine.take(padded, padded=True).tolist() == index
        for labels in (mine.next_token_labels(flat), mine.next_token_labels(padded, padded=True)):
            assert labels.tolist() == following
        assert len(index) == mine.tokens == plan.tokens[rank] == sum(mine.sizes)
        assert plan.work[rank] == sum(costs[0] * (p + 1) + costs[1] for _, p in held)
        seen += index
    assert sorted(seen) == list(range(len(documents)))


def test_arguments_are_checked() -> None:
    refused = [
        ("lengths: expected non-negative ints", dict(lengths=[3, -1])),
        (r"lengths: expected integers \[documents\], got torch.float32", dict(lengths=torch.ones(2))),
        ("ranks: expected a positive int, got 0", dict(ranks=0)),
        ("max_tokens: expected a non-negative int or None, got 1.5", dict(max_tokens=1.5)),
        ("max_tokens: expected at least 5, the best placement found of 8 tokens", dict(max_tokens=3)),
        ("pair_work: expected a finite number, 0 or more, got -1", dict(pair_work=-1)),
        ("token_work: expected more than 0 where pair_work is 0", dict(pair_work=0, token_work=0)),
        ("max_imbalance: expected a number, 1 or more, got 0.9", dict(max_imbalance=0.9)),
    ]
    for message, options in refused:
        with pytest.raises(ValueError, match=message):
            sp.pack_documents(**{"lengths": [5, 3], "ranks": 2, **options})
    plan = sp.pack_documents([5, 3], 2)
    with pytest.raises(ValueError, match="rank: expected one of the 2 ranks of the plan, got 2"):
        plan.on_rank(2)
    mine = plan.on_rank(0)
    with pytest.raises(ValueError, match=r"batch: expected \[8, ...\], all tokens of the plan, got \(2, 5\)"):
        mine.take(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"batch: expected \[2, 5 or more, ...\].*got \(2, 4\)"):
        mine.take(torch.ones(2, 4), padded=True)
    with pytest.raises(ValueError, match=r"labels: expected integers, got torch\.float32"):
        mine.next_token_labels(torch.ones(8))
    q = torch.ones(1, 8, 2, 4)
    with pytest.raises(ValueError, match="plan: expected one for the 1 ranks of group, got one for 2"):
        sp.packed_attention(q, q, q, plan, group=None)
    with pytest.raises(ValueError, match="plan: expected what pack_documents returns, got list"):
        sp.packed_attention(q, q, q, [], group=None)  # type: ignore[arg-type]


def placed(lengths: list[int], places: list[tuple[int, int]], ranks: int) -> PackingPlan:
    return PackingPlan(tuple(lengths), tuple(Place(*p) for p in places), ranks, Costs(1.0, 0.0))


def plans(ranks: int) -> list[PackingPlan]:
    """By the packer, and by hand: every degree, documents of fewer rows than ranks, empty ones, a rank with no row."""
    found = [sp.pack_documents([41, 23, 9, 9, 5, 1], ranks, token_work=0), sp.pack_documents([8, 8], ranks)]
    last = ranks - 1
    found.append(placed([19, 0, 5, 1], [(1, 0), (1, 0), (1, 0), (1, 0)], ranks))
    found.append(placed([3, 17, 11, 2, 6], [(ranks, 0), (ranks, 0), (1, last), (1, 0), (1, last)], ranks))
    if ranks == 4:
        places = [(2, 0), (4, 0), (2, 2), (1, 1), (2, 0), (4, 0), (1, 3)]
        found.append(placed([13, 29, 7, 6, 1, 3, 4], places, ranks))
    return found


def take(mine: Any, t: Tensor, dim: int = 1) -> Tensor:
    return mine.take(t.transpose(0, dim)).transpose(0, dim)


def check(group: dist.ProcessGroup | None, plan: PackingPlan, dtype: torch.dtype, **options: Any) -> None:
    """Against the whole batch, flat, in fp64: out and gradients; sums over ranks of those of sinks."""
    n, asked = sum(plan.lengths), {key: options.pop(key) for key in ("engine", "save_kv") if key in options}
    cu_seqlens = ends(*np.cumsum([0, *plan.lengths]).tolist())
    problem = Problem((n, n), dtype=dtype, batch=1, is_causal=True, cu_seqlens=cu_seqlens, **options)
    exact, plain = problem.plain(F64), problem.plain(dtype)
    mine = plan.on_rank(0 if group is None else group.rank())
    leaves = [take(mine, t).detach().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    extra = {}
    if problem.sinks is not None:
        extra["sinks"] = problem.sinks.detach().clone().requires_grad_()
    window = options.get("window_size", (-1, -1))
    out = sp.packed_attention(*leaves, plan, group=group, is_causal=True, window_size=window, **extra, **asked)
    inputs, names = [*leaves, *extra.values()], ["dq", "dk", "dv", "dsinks"]
    grads = torch.autograd.grad(out, inputs, take(mine, problem.dout), allow_unused=not mine.tokens)
    got = {"out": out.detach(), **dict(zip(names, grads))}
    if extra:
        part = torch.zeros_like(extra["sinks"]) if got["dsinks"] is None else got["dsinks"]
        got["dsinks"] = sp.reduce_from_tensor_parallel(part, group)
    for name, found in got.items():
        expected = [t[name] if name == "dsinks" else take(mine, t[name]) for t in (plain, exact)]
        if expected[1].numel():
            assert_within_budget(
                found, *expected, f"{name} of {plan}, {options}, {asked}", 16.0 if dtype == F64 else 4.0
            )
        else:
            assert found.shape == expected[1].shape


def attention_case(group: dist.ProcessGroup) -> None:
    first, *others = plans(group.size())
    check(group, first, F64, engine="ring", save_kv=True)
    check(group, first, F32, sinks=True, window_size=(6, 0))
    for i, plan in enumerate(others):
        check(group, plan, F64, engine=("auto", "all_gather", "ring", "ulysses")[i], sinks=i == 1)


def world_case() -> None:
    group = dist.group.WORLD
    for plan in plans(group.size())[::3]:
        check(group, plan, F64)
    plan = plans(group.size())[-1]
    leaves = [torch.randn(1, plan.tokens[group.rank()], 2, 4, requires_grad=True) for _ in range(3)]

    def run(*qkv: Tensor) -> Tensor:
        return sp.packed_attention(*qkv, plan, group=group, is_causal=True)

    outs = [run(*leaves), checkpoint(run, *leaves, use_reentrant=False)]
    for one, other in zip(*(torch.autograd.grad(out.sum(), leaves) for out in outs)):
        assert torch.equal(one, other)


def groups_case() -> None:
    """Of all ranks, and of groups of some, whose subgroups all ranks of the world make together."""
    rank, whole = dist.get_rank(), dist.group.WORLD
    groups = sp.degree_groups(whole)
    assert list(groups) == [1, 2, 4] and groups[1] is None and groups[4] is whole
    assert dist.get_process_group_ranks(groups[2]) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert sp.degree_groups(whole) == groups
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    assert sp.degree_groups(halves[rank % 2]) == {1: None, 2: halves[rank % 2]}
    few = dist.new_group([0, 1, 2])
    assert sp.degree_groups(few) == ({} if rank == 3 else {1: None, 3: few})


def errors_case() -> None:
    """One rank that refuses, at whatever degree, is heard of by all; and then all go on."""
    group = dist.new_group([0, 1, 2, 3])
    rank = group.rank()
    plan = placed([6, 9, 5, 2], [(2, 0), (4, 0), (2, 2), (1, 3)], 4)

    def call(plan: PackingPlan, rows: int = 0, heads: int = 2) -> Tensor:
        q = torch.ones(1, plan.on_rank(rank).tokens + rows, heads, 4, requires_grad=True)
        k = q.detach()[:, :, :2]
        # A ring, in which every rank here waits for every other: else some would fail a step later than others.
        out = sp.packed_attention(q, k, k, plan, group=group, is_causal=True, engine="ring")
        out.sum().backward()
        return out

    def fails(kind: type[Exception], message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            call(*args, **options)
        dist.barrier()
        call(plan)

    for again in range(2):  # before there are subgroups, and then
        kinds = [ValueError if rank == r else RuntimeError for r in (1, 3)]
        fails(kinds[0], r"q: expected \[B, \d+, H, D\]", plan, rows=int(rank == 1))
        fails(kinds[1], "k: expected a number of heads", plan, heads=3 if rank == 3 else 2)
        other = placed([6 + again, 9, 5, 2], [(2, 0), (4, 0), (2, 2), (1, 2 + rank % 2)], 4)
        fails(RuntimeError, "the ranks disagree", other)


def compile_case() -> None:
    group = dist.group.WORLD
    plan = sp.pack_documents([40, 30, 9, 20, 8, 8, 3], 4, token_work=0)
    assert {place.degree for place in plan.places} == {1, 2, 4}
    sp.degree_groups(group)
    rows = plan.tokens[group.rank()]
    q, k, v = (torch.randn(1, rows, 2, 4, requires_grad=True) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sp.packed_attention(q * 2, k, v, plan, group=group, is_causal=True)

    # compiled first: nothing has been worked out in an eager call
    outs = [f(q, k, v) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)]
    assert torch.equal(*outs)
    for one, other in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in outs)):
        assert torch.equal(one, other)


def test_one_rank() -> None:
    check(None, sp.pack_documents([9, 4, 0, 6], 1), F64, sinks=True)
    empty = sp.pack_documents([], 1)
    assert empty.segments == () and empty.work_imbalance == 1.0


def test_on_two_ranks(world2: World) -> None:
    world2.run(world_case)


def test_on_groups(world4: World) -> None:
    world4.run(on_ranks, attention_case)


@pytest.mark.parametrize("case", [groups_case, errors_case, compile_case], ids=lambda c: c.__name__)
def test_on_four_ranks(world4: World, case: Any) -> None:
    world4.run(case)
