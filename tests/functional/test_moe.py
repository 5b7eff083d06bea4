"""moe_mlp on 1, 2, 3 and 4 ranks against the unsharded fp64 run; dispatch, combine and the router's losses too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels import ops
from seqpar_kernels.overlap.messages import Messages
from seqpar_kernels.overlap.moe_routes import ExpertPlacement, best_way

from ..kernels.norm_cases import poison  # noqa: F401
from ..world import World
from .groups import on_ranks
from .moe_problem import BF16, F16, F32, F64, Problem


def tokens(ranks: int, *most: int) -> tuple[int, ...]:
    """Unlike numbers for each rank."""
    return (most or (13, 0, 29, 7))[:ranks]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": dict(biases=True),
    "experts do not divide": dict(experts=7, top_k=3),
    "fewer experts than ranks": dict(experts=3, top_k=1),
    "one expert gets all": dict(choose="one", biases=True),
    "no expert for some": dict(choose="some", biases=True),
    "a rank whose experts get nothing": dict(choose="first", experts=8),
    "interleaved, limited": dict(interleaved=True, limit=0.7, alpha=1.702, up_shift=1.0, biases=True),
    "limited": dict(limit=0.5, activation="gelu"),
    "no gate": dict(gated=False, activation="relu2", biases=True),
    "gelu, weights the other way round": dict(activation="gelu_tanh", transposed=True),
    "relu, odd sizes": dict(activation="relu", features=7, inner=11, top_k=5),
    "no gate, gelu": dict(gated=False, activation="gelu", inner=9),
}


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str) -> None:
    for dtype in (F32, BF16, F16, F64):
        Problem((41,), dtype=dtype, **CASES[name]).check(None)
    Problem((41,), **CASES[name]).check(None, "tp", chunks=3)
    Problem((0,), **CASES[name]).check(None)


def ranks_case(group: dist.ProcessGroup, names: list[str]) -> None:
    ranks = group.size()
    for i, name in enumerate(names):
        for way in ("ep", "tp"):
            for dtype in (F32, (BF16, F64, F16)[i % 3]):
                problem = Problem(tokens(ranks), dtype=dtype, **CASES[name])
                for chunks in (None, 3):
                    problem.check(group, way, chunks=chunks)


@pytest.mark.parametrize("first", range(0, len(CASES), 5))
def test_on_ranks(world4: World, first: int) -> None:
    world4.run(on_ranks, ranks_case, list(CASES)[first : first + 5])


def bounded_case(group: dist.ProcessGroup) -> None:
    """A bound on the workspace cuts messages, and changes nothing; tokens in the hundreds are cut without one."""
    problem = Problem(tokens(group.size(), 300, 700, 1, 400), choose="one", features=8, inner=8, dtype=F64)
    problem.check(group)
    sp.set_max_workspace_bytes(64 * 8 * 8)
    try:
        problem.check(group)
        problem.check(group, "tp")
    finally:
        sp.set_max_workspace_bytes(None)


def test_bounded_workspace(world4: World) -> None:
    world4.run(on_ranks, bounded_case)


def in_rounds_case(group: dist.ProcessGroup) -> None:
    """As NCCL needs it: no receive ahead of the post that sends. The bits are the same."""
    problem = Problem(tokens(group.size(), 300, 700, 0, 40), features=8, inner=8, biases=True)
    early = problem.sharded(group, chunks=3)
    usual = Messages.takes_receives_early
    Messages.takes_receives_early = lambda self, device_type: False  # type: ignore[method-assign]
    try:
        late = problem.sharded(group, chunks=3)
    finally:
        Messages.takes_receives_early = usual  # type: ignore[method-assign]
    assert all(torch.equal(late[name], early[name]) for name in early)


def test_posts_in_rounds(world4: World) -> None:
    world4.run(on_ranks, in_rounds_case)


def kept_case(group: dist.ProcessGroup) -> None:
    """For the backward: own tokens, the peers' rows once each, and the first matmul's result; by number of bytes."""
    features, inner, top_k = 16, 56, 2  # Mixtral's proportions
    problem = Problem((40,) * group.size(), experts=8, top_k=top_k, features=features, inner=inner, dtype=BF16)
    placement = ExpertPlacement(8, group.size(), "ep")
    of_ranks = problem.index.split(40)
    mine = of_ranks[group.rank()]
    got = sum(placement.tokens(index, group.rank()).shape[0] for index in of_ranks if index is not mine)
    pairs = int((placement.local(problem.index, group.rank()) >= 0).sum())
    t = {n: problem.mine(n, problem.tensors[n], group, "ep").clone() for n in ("x", "weights", "w1", "w2")}
    x, weights = t["x"].requires_grad_(), t["weights"].requires_grad_()
    w1, w2 = torch.nn.Parameter(t["w1"]), torch.nn.Parameter(t["w2"])
    index = mine.contiguous()
    report = sp.activation_bytes(lambda: sp.moe_mlp(x, index, weights, w1, w2, group=group, num_experts=8))
    report.result.sum().backward()
    tokens = 40 * (features * 2 + top_k * (8 + 4)) + got * (features * 2 + top_k * (4 + 4))
    counts = 2 * 8 * group.size() ** 2  # tokens and pairs, of each two ranks
    assert report.total == tokens + pairs * 2 * inner * 2 + counts


def test_bytes_kept_for_the_backward(world4: World) -> None:
    world4.run(on_ranks, kept_case)


def bits_case(group: dist.ProcessGroup) -> None:
    problem = Problem(tokens(group.size()), dtype=BF16, biases=True)
    first = problem.sharded(group, chunks=2)
    for _ in range(3):
        again = problem.sharded(group, chunks=2)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_runs_agree_to_the_bit(world4: World) -> None:
    world4.run(on_ranks, bits_case)


def unused_case(group: dist.ProcessGroup) -> None:
    """The result of one rank enters no loss; frozen experts, and routing without a gradient."""
    problem = Problem(tokens(group.size(), 5, 6, 7, 8), dtype=F64)
    t = {n: problem.mine(n, v, group, "ep").clone().requires_grad_() for n, v in problem.tensors.items()}
    t["w1"].requires_grad_(False)
    index = problem.mine("index", problem.index, group, "ep")
    options = dict(group=group, num_experts=problem.experts)
    out = sp.moe_mlp(t["x"], index, t["weights"].detach(), t["w1"], t["w2"], **options)
    (out.sum() * (group.rank() > 0)).backward()
    assert t["w2"].grad is not None and t["w1"].grad is None
    x = problem.tensors["x"].clone().requires_grad_()
    whole = sp.moe_mlp(
        x, problem.index, problem.tensors["weights"], problem.tensors["w1"], problem.tensors["w2"], group=None
    )
    (whole[problem.tokens[0] :]).sum().backward()
    torch.testing.assert_close(t["x"].grad, problem.mine("x", x.grad, group, "ep"))
    with torch.no_grad():
        plain = sp.moe_mlp(t["x"], index, t["weights"], t["w1"], t["w2"], **options)
    assert torch.equal(plain, out)


def test_what_is_not_wanted(world4: World) -> None:
    world4.run(on_ranks, unused_case)


def dispatch_case(group: dist.ProcessGroup) -> None:
    """Experts of one's own between moe_dispatch and moe_combine come to what moe_mlp does."""
    problem = Problem(tokens(group.size()), dtype=F64, choose="some")
    t = {n: problem.mine(n, v, group, "ep").clone().requires_grad_() for n, v in problem.tensors.items()}
    index = problem.mine("index", problem.index, group, "ep")
    there = sp.moe_dispatch(t["x"], index, t["weights"], group=group, num_experts=problem.experts)
    y = torch.zeros_like(there.rows)
    for e in range(len(t["w1"])):
        row, k = (there.index == e).nonzero(as_tuple=True)
        gate, up = (there.rows[row] @ t["w1"][e].t()).chunk(2, -1)
        y = y.index_add(0, row, (F.silu(gate) * up) @ t["w2"][e].t() * there.weights[row, k, None])
    out = sp.moe_combine(y, there)
    grads = torch.autograd.grad(out, list(t.values()), problem.mine("dout", problem.dout, group, "ep"))
    want = problem.sharded(group)
    torch.testing.assert_close(out, want["out"])
    for name, grad in zip(t, grads, strict=True):
        torch.testing.assert_close(grad, want[name])
    assert there.rows.shape[0] == there.index.shape[0] == there.weights.shape[0]


def test_dispatch_and_combine(world4: World) -> None:
    world4.run(on_ranks, dispatch_case)


def plain_balance(logits: Tensor, top_k: int, mask: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k).indices, logits.shape[-1]).to(logits.dtype)
    share = (chosen * mask[:, None, None]).sum(0) / mask.sum()
    return (share * ((probabilities * mask[:, None]).sum(0) / mask.sum())).sum() * logits.shape[-1]


def losses_case(group: dist.ProcessGroup) -> None:
    sizes = list(tokens(group.size()))
    layers = [torch.randn(sum(sizes), 9, dtype=F64) for _ in range(3)]
    mask = torch.rand(sum(sizes)) < 0.7
    for given in (None, mask):
        mine = [layer.split(sizes)[group.rank()].clone().requires_grad_() for layer in layers]
        counted = torch.ones(sum(sizes) * 3, dtype=F64) if given is None else given.repeat(3).to(F64)
        whole = torch.cat(layers).requires_grad_()
        own_mask = None if given is None else given.split(sizes)[group.rank()]
        for ours, theirs in (
            (sp.load_balancing_loss(mine, 2, group=group, attention_mask=own_mask), plain_balance(whole, 2, counted)),
            (
                sp.router_z_loss(mine, group=group, attention_mask=own_mask),
                (whole.logsumexp(-1).square() * counted).sum() / counted.sum(),
            ),
        ):
            torch.testing.assert_close(ours, theirs)
            grads = torch.autograd.grad(ours, mine)
            (all_grads,) = torch.autograd.grad(theirs, whole)
            for grad, layer in zip(grads, all_grads.chunk(3), strict=True):
                torch.testing.assert_close(grad, layer.split(sizes)[group.rank()])


def test_losses_are_those_of_all_tokens(world4: World) -> None:
    world4.run(on_ranks, losses_case)


def refused_case(group: dist.ProcessGroup) -> None:
    """What fits on no rank, or on one rank alone, raises on all, and the group lives on."""
    problem = Problem(tokens(group.size(), 3, 4, 5, 6))
    t = {n: problem.mine(n, v, group, "ep") for n, v in problem.tensors.items()}
    index = problem.mine("index", problem.index, group, "ep")

    def call(**changed: Any) -> Tensor:
        given = dict(x=t["x"], top_k_index=index, top_k_weights=t["weights"], gate_up_proj=t["w1"], down_proj=t["w2"])
        options = dict(group=group, num_experts=problem.experts)
        return sp.moe_mlp(**{**given, **options, **changed})

    wrong: list[tuple[str, dict[str, Any]]] = [
        ("experts: expected one of", dict(experts="both")),
        ("gate_up_proj: expected", dict(num_experts=100)),
        ("top_k_index: expected integers", dict(top_k_index=index.float())),
        ("top_k_index: expected 0 ..", dict(top_k_index=index + problem.experts)),
        ("top_k_weights: expected the shape", dict(top_k_weights=t["weights"][:, :1])),
        ("down_proj: expected", dict(down_proj=t["w2"][:, :, :3])),
        ("gate_up_proj: expected the dtype of x", dict(gate_up_proj=t["w1"].double())),
        ("activation: expected one of", dict(activation="tanh")),
        ("alpha: expected 1.0", dict(activation="relu", alpha=2.0)),
        ("limit: expected more than 0", dict(limit=-1.0)),
        ("chunks: expected", dict(chunks=0)),
    ]
    for text, changed in wrong:
        with pytest.raises(ValueError, match=text.replace("..", r"\.\.")):
            call(**changed)
        dist.barrier(group)
    with pytest.raises((ValueError, RuntimeError), match=r"chunks: expected|refused its arguments"):
        call(chunks=0 if group.rank() == 1 else None)
    dist.barrier(group)
    with pytest.raises(RuntimeError, match="moe_mlp forward"):
        call(activation="relu" if group.rank() == 1 else "silu")
    dist.barrier(group)
    call()


def test_refused_on_every_rank(world4: World) -> None:
    world4.run(on_ranks, refused_case)


def test_the_way_that_auto_takes() -> None:
    """Whole experts, unless a rank would have none and their columns divide."""
    ways = {(8, 64, 4): "ep", (6, 64, 4): "ep", (4, 64, 4): "ep", (3, 64, 4): "tp", (3, 63, 4): "ep"}
    assert {sizes: best_way(*sizes) for sizes in ways} == ways


def test_registered_op() -> None:
    problem = Problem((9,), dtype=F64, biases=True)
    t = {n: v.clone().requires_grad_() for n, v in problem.tensors.items()}
    scalars = ops.MoeScalars(problem.experts, "ep", None, None, "", "silu", True, False, 1.0, None, 0.0)
    inputs = (t["x"], problem.index, t["weights"], t["w1"], t["b1"], t["w2"], t["b2"], *scalars)
    torch.library.opcheck(ops.moe_mlp.overload, inputs)

    def run(*tensors: Tensor) -> Tensor:
        x, weights, w1, w2, b1, b2 = tensors
        return sp.moe_mlp(x, problem.index, weights, w1, w2, b1, b2, group=None)

    assert torch.autograd.gradcheck(run, tuple(t.values()))


def test_compiled_fullgraph() -> None:
    problem = Problem((9,), biases=True)
    t = {n: v.clone().requires_grad_() for n, v in problem.tensors.items()}

    def run(x: Tensor, index: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        return sp.moe_mlp(x * 1.0, index, weights, *rest, group=None).cos()

    args = (t["x"], problem.index, t["weights"], t["w1"], t["w2"], t["b1"], t["b2"])
    compiled = torch.compile(run, fullgraph=True)
    expected = torch.autograd.grad(run(*args).sum(), list(t.values()))
    got = torch.autograd.grad(compiled(*args).sum(), list(t.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast() -> None:
    problem = Problem((9,))
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.sharded(None)["out"]
    assert out.dtype == torch.bfloat16
