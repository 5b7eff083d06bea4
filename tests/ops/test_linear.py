"""all_gather_linear and linear_reduce_scatter on real gloo ranks, against the unsharded linear."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp

from ..oracle import assert_within_budget
from ..world import World

K, N = 6, 4


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def sequence(length: int, seq_dim: int, features: int, dtype: torch.dtype, strided: bool) -> Tensor:
    """[2, S, features] or [S, 2, features]; with odd strides where asked."""
    shape = [2, 2, features]
    shape[seq_dim] = length
    if strided:
        return torch.randn(*shape[::-1], dtype=dtype).permute(2, 1, 0)
    return torch.randn(shape, dtype=dtype)


def column_case(length: int, seq_dim: int, chunks: int | None, engine: str, strided: bool) -> None:
    g = group()
    t, rank = g.size(), g.rank()
    x = leaf(sequence(length, seq_dim, K, torch.float64, strided))
    weights = [leaf(torch.randn(n * t, K, dtype=torch.float64)) for n in (N, 3)]
    bias = leaf(torch.randn(N * t, dtype=torch.float64))
    expected = [F.linear(x, weights[0], bias), F.linear(x, weights[1])]
    grads = [torch.randn_like(e) for e in expected]
    dx, dw0, dw1, db = torch.autograd.grad(expected, [x, *weights, bias], grads)
    mine = [slice(rank * n, rank * n + n) for n in (N, 3)]
    x_local = x.detach().tensor_split(t, seq_dim)[rank].requires_grad_()  # a view: not contiguous for [B, S, H]
    w_local = [leaf(w[m]) for w, m in zip(weights, mine, strict=True)]
    b_local = leaf(bias[mine[0]])
    out = sp.all_gather_linear(
        x_local, w_local, [b_local, None], group=g, seq_dim=seq_dim, chunks=chunks, engine=engine, seq_len=length
    )
    assert isinstance(out, tuple)
    for got, want, m in zip(out, expected, mine, strict=True):
        torch.testing.assert_close(got, want[..., m])
    got = torch.autograd.grad(out, [x_local, *w_local, b_local], [d[..., m] for d, m in zip(grads, mine, strict=True)])
    torch.testing.assert_close(got[0], dx.tensor_split(t, seq_dim)[rank])
    torch.testing.assert_close(got[1:], (dw0[mine[0]], dw1[mine[1]], db[mine[0]]))


def row_case(length: int, seq_dim: int, chunks: int | None, engine: str, strided: bool) -> None:
    g = group()
    t, rank = g.size(), g.rank()
    x = leaf(sequence(length, seq_dim, K * t, torch.float64, strided))
    weight, bias = leaf(torch.randn(N, K * t, dtype=torch.float64)), leaf(torch.randn(N, dtype=torch.float64))
    expected = F.linear(x, weight, bias)
    grad = torch.randn_like(expected)
    dx, dw, db = torch.autograd.grad(expected, [x, weight, bias], grad)
    mine = slice(rank * K, rank * K + K)
    x_local = x.detach()[..., mine].requires_grad_()
    w_local, b_local = leaf(weight[:, mine]), leaf(bias)
    out = sp.linear_reduce_scatter(x_local, w_local, b_local, group=g, seq_dim=seq_dim, chunks=chunks, engine=engine)
    torch.testing.assert_close(out, expected.tensor_split(t, seq_dim)[rank])
    got = torch.autograd.grad(out, [x_local, w_local, b_local], grad.tensor_split(t, seq_dim)[rank])
    torch.testing.assert_close(got, (dx[..., mine], dw[:, mine], db))


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize(("chunks", "engine"), [(None, "auto"), (None, "single"), (1, "auto"), (2, "p2p"), (8, "auto")])
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize("length", [8, 7, 3, 1])
@pytest.mark.parametrize("case", [column_case, row_case])
def test_equals_the_unsharded_linear(
    world: World, case: Any, length: int, seq_dim: int, chunks: int | None, engine: str, strided: bool
) -> None:
    world.run(case, length, seq_dim, chunks, engine, strided)


def spread_case(length: int, seq_dim: int) -> None:
    """As if the wire were slow: the weight's gradient summed up chunk by chunk, but never in 16 bits."""
    from seqpar_kernels.ops import linear_scatter as linear

    g, pieces = group(), 0
    foresee, make = linear.spreads_weight_gradient, linear.weight_gradient

    def counting(*args: Any) -> Tensor | None:
        nonlocal pieces
        pieces += 1
        return make(*args)

    def counted(call: Any) -> int:
        nonlocal pieces
        pieces = 0
        call()
        return pieces

    def to_main_grad() -> None:
        x, weight = torch.randint(-8, 9, (2, length, 5)).bfloat16(), torch.randint(-8, 9, (7, 5)).bfloat16()
        weight, main_grad = weight.requires_grad_(), torch.ones(7, 5)
        y = sp.linear_reduce_scatter(x, weight, group=g, chunks=2, engine="p2p", main_grad=main_grad)
        y.backward(torch.ones_like(y))
        expected = 1 + x.double().sum((0, 1)).expand(7, 5)
        assert torch.equal(main_grad.double(), expected)  # integers: exact however they are summed

    def in_16_bits() -> None:
        x, weight = torch.randn(2, length, 5).bfloat16(), torch.randn(7, 5).bfloat16().requires_grad_()
        sp.linear_reduce_scatter(x, weight, group=g, chunks=2, engine="p2p").sum().backward()

    linear.spreads_weight_gradient, linear.weight_gradient = lambda *args: True, counting
    try:
        assert counted(lambda: row_case(length, seq_dim, 2, "p2p", False)) == min(length, 2 * g.size() - 1)
        assert counted(to_main_grad) > 1
        assert counted(in_16_bits) == 1
    finally:
        linear.spreads_weight_gradient, linear.weight_gradient = foresee, make


@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize("length", [16, 13])
def test_a_weight_gradient_summed_up_chunk_by_chunk(world: World, length: int, seq_dim: int) -> None:
    world.run(spread_case, length, seq_dim)


def larger_case(dtype: torch.dtype) -> list[Tensor]:
    """Big enough that windows of several batch rows are multiplied in place. Error against fp64 within budget."""
    g = group()
    t, rank = g.size(), g.rank()
    torch.manual_seed(1)
    batch, length, hidden, wide = 2, 300 * t, 64, 96
    x, w = torch.randn(batch, length, hidden).to(dtype), torch.randn(wide * t, hidden).to(dtype) / 8
    w2 = torch.randn(hidden, wide * t).to(dtype) / 8
    cut = slice(rank * wide, rank * wide + wide)
    y = sp.all_gather_linear(x.tensor_split(t, 1)[rank], w[cut], group=g, chunks=2)
    assert_within_budget(y, F.linear(x, w[cut]), F.linear(x.double(), w[cut].double()), "y")
    z = sp.linear_reduce_scatter(y, w2[:, cut], group=g, chunks=2)
    whole = F.linear(x, w)
    oracle = F.linear(whole.double(), w2.double()).tensor_split(t, 1)[rank]
    # The reference rounds once; t partial results are rounded each, and added exactly.
    partial = sum(
        F.linear(whole[..., c], w2[:, c]).double() for c in (slice(r * wide, r * wide + wide) for r in range(t))
    )
    reference = partial.to(dtype).tensor_split(t, 1)[rank]  # type: ignore[union-attr]
    assert_within_budget(z, reference, oracle, "z")
    return [y, z]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_windows_and_16_bit(world2: World, dtype: torch.dtype) -> None:
    world2.run(larger_case, dtype)


def integer_case(dtype: torch.dtype, length: int) -> list[Tensor]:
    """Matmuls of small integers are exact, so every chunk count must give the same bits."""
    g = group()
    t, rank = g.size(), g.rank()
    torch.manual_seed(2)
    results = []
    x = torch.randint(-8, 9, (2, length, 5 * t)).to(dtype)
    w = torch.randint(-8, 9, (7, 5 * t)).to(dtype)
    cut = slice(rank * 5, rank * 5 + 5)
    fraction = torch.randn(2, length, 7).to(dtype)  # makes the sum over ranks round
    for chunks in (1, 2, 8):
        y = sp.linear_reduce_scatter(x[..., cut].contiguous(), w[:, cut].contiguous(), group=g, chunks=chunks)
        results.append(y)
        results.append(sp.reduce_scatter_sequence(fraction * (rank + 1), g))
    parts = [fraction * (r + 1) for r in range(t)]
    total = parts[0].float() if dtype != torch.float64 else parts[0]
    for part in parts[1:]:
        total = total + part
    expected = total.to(dtype).tensor_split(t, 1)[rank]
    for y, s in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(y, results[0])
        assert torch.equal(s, expected)
    assert torch.equal(results[0], F.linear(x.double(), w.double()).to(dtype).tensor_split(t, 1)[rank])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [16, 13])
def test_sum_over_ranks_has_the_same_bits_for_any_chunk_count(world: World, dtype: torch.dtype, length: int) -> None:
    world.run(integer_case, dtype, length)


def partial_gradients_case() -> None:
    """Outputs and inputs that need no gradient cost nothing and break nothing."""
    g = group()
    x, w = torch.randn(2, 4, K), leaf(torch.randn(3, K))
    first, second = sp.all_gather_linear(x, [w, w.detach()], group=g)
    first.sum().backward()
    dense = sp.gather_sequence(x, g)
    torch.testing.assert_close(w.grad, dense.sum((0, 1)).expand(3, K))
    xg = leaf(x)
    first, second = sp.all_gather_linear(xg, [w.detach(), w.detach()], group=g)
    (dx,) = torch.autograd.grad(second.sum(), xg)
    torch.testing.assert_close(dx, (g.size() * w.detach().sum(0)).expand(2, 4, K))
    b = leaf(torch.zeros(3))
    sp.linear_reduce_scatter(torch.randn(2, 4 * g.size(), K), w.detach(), b, group=g).sum().backward()
    torch.testing.assert_close(b.grad, torch.full((3,), 2.0 * 4 * g.size()))


def test_only_what_is_needed_is_computed(world2: World) -> None:
    world2.run(partial_gradients_case)


def autocast_case() -> None:
    for g in (None, group()):
        x, w = leaf(torch.randn(2, 4, K)), leaf(torch.randn(3, K))
        with torch.autocast("cpu", torch.bfloat16):
            y = sp.all_gather_linear(x, w, group=g)
            z = sp.linear_reduce_scatter(y, w.t(), group=g)
        assert y.dtype == z.dtype == torch.bfloat16
        inside, outside = (leaf(x), leaf(x))
        y32 = sp.all_gather_linear(inside, w, group=g)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(
                torch.autograd.grad(y32.sum(), inside),
                torch.autograd.grad(sp.all_gather_linear(outside.double(), w.double(), group=g).sum(), outside),
            )


def test_autocast(world2: World) -> None:
    world2.run(autocast_case)


@pytest.mark.parametrize("seq_dim", [0, 1])
def test_gradcheck_without_a_group(seq_dim: int) -> None:
    strided = torch.randn(2, 6, K + 2, dtype=torch.float64)[:, 1:, ::2].requires_grad_()
    weight = torch.randn(3, strided.shape[-1], dtype=torch.float64, requires_grad=True)
    for fn in (sp.all_gather_linear, sp.linear_reduce_scatter):
        assert torch.autograd.gradcheck(lambda x, w, fn=fn: fn(x, w, group=None, seq_dim=seq_dim), (strided, weight))
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, K), (2, K), (2,)))
    check = torch.autograd.gradcheck
    assert check(lambda x, w, b: sp.all_gather_linear(x, w, b, group=None, seq_dim=seq_dim), (x, w, b))
    assert check(lambda x, w, b: sp.all_gather_linear(x, (w, 2 * w), (None, b), group=None, seq_dim=seq_dim), (x, w, b))
    assert check(lambda x, w, b: sp.linear_reduce_scatter(x, w, b, group=None, seq_dim=seq_dim), (x, w, b))


def gradcheck_case() -> None:
    """gradcheck in fp64 across ranks: perturb the same entry of a replicated tensor everywhere."""
    g = group()
    t = g.size()
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    w, v = (torch.randn(2 * t, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, w: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
        """A whole sharded block as a function of whole tensors, replicated in and out."""
        shard = sp.scatter_sequence(x, g)
        y = sp.all_gather_linear(shard, sp.scatter_tensor_parallel(w, g, 0), group=g, seq_len=3, chunks=2)
        z = sp.linear_reduce_scatter(y.tanh(), sp.scatter_tensor_parallel(v, g, 0).t(), group=g, chunks=2)
        z = sp.dropout_add_rms_norm(z, shard, gamma, p=0.3, seed=5, group=g, seq_len=3)
        return sp.gather_sequence(z, g, seq_len=3, tensor_parallel_output_grad=False)

    assert torch.autograd.gradcheck(layer, (x, w, v, gamma))


def test_gradcheck_of_a_sharded_block(world: World) -> None:
    world.run(gradcheck_case)


def compile_case() -> None:
    g = group()
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 4, K), (3, K), (3,)))

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y, _ = sp.all_gather_linear(x, [w, w], [b, None], group=g, chunks=2)
        z = sp.linear_reduce_scatter(y, w.t(), None, group=g)
        n = sp.dropout_add_rms_norm(z, x, None, p=0.2, group=g, seed=3)
        n = n + sp.dropout_add_layer_norm(x, None, torch.cat([b, b]), group=g)
        whole = sp.gather_sequence(n, g)
        back = sp.reduce_scatter_sequence(whole, g) + sp.scatter_sequence(whole, g)
        return sp.reduce_from_tensor_parallel(sp.copy_to_tensor_parallel(back, g).square().sum(), g)

    expected = torch.autograd.grad(fn(x, w, b), (x, w, b))
    for backend in ("eager", "aot_eager"):
        got = torch.autograd.grad(torch.compile(fn, fullgraph=True, backend=backend)(x, w, b), (x, w, b))
        torch.testing.assert_close(got, expected)


def test_compiles_without_graph_breaks(world2: World) -> None:
    world2.run(compile_case)


def opcheck_case() -> None:
    name, t = group().group_name, group().size()
    ops, check = torch.ops.seqpar, torch.library.opcheck
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 4, K), (3, K), (3,)))
    wide = torch.randn(2, 4 * t, K)
    place = (name, 1, 4 * t, 2, "p2p")
    check(ops.all_gather_linear.default, (x, [w, w], [b, None], *place))
    check(ops.all_gather_linear.default, (x, [w], [None], "", 1, 4, 1, "single"))
    dy = torch.randn(2, 4 * t, 3)
    check(ops.all_gather_linear_backward.default, (x.detach(), [dy], [w.detach()], True, [True], [True], False, *place))
    check(ops.linear_reduce_scatter.default, (wide.requires_grad_(), w, b, *place))
    args = (torch.randn(2, 4, 3), wide.detach(), w.detach(), torch.float32, True, True, True, *place)
    check(ops.linear_reduce_scatter_backward.default, args)
    check(ops.gather.default, (x, 1, 4 * t, name, True))
    check(ops.gather.default, (x, 2, K * t, name, False))
    check(ops.reduce_scatter.default, (wide, 1, name))
    check(ops.split.default, (wide, 1, name))
    check(ops.all_reduce.default, (x, name))
    check(ops.sum_over_ranks.default, ([b.detach(), w.detach()], name))


def test_opcheck(world2: World) -> None:
    world2.run(opcheck_case)


def kept_case(length: int, seq_dim: int, chunks: int | None, engine: str) -> None:
    """The same outputs and gradients with the gathered x kept, and no second gather."""
    from seqpar_kernels.comm.p2p import P2PSession

    g = group()
    t, rank = g.size(), g.rank()
    x = leaf(sequence(length, seq_dim, K, torch.float64, False).tensor_split(t, seq_dim)[rank])
    weights = [leaf(torch.randn(n, K, dtype=torch.float64)) for n in (N, 3)]
    bias = leaf(torch.randn(N, dtype=torch.float64))
    sent: list[str] = []
    healthy = P2PSession.post

    def counting(self: Any, sends: Any, receives: Any) -> None:
        sent.extend(m.transfer.buffer for m in sends)
        healthy(self, sends, receives)

    found = []
    for keep in (False, True):
        out = sp.all_gather_linear(
            x,
            weights,
            [bias, None],
            group=g,
            seq_dim=seq_dim,
            chunks=chunks,
            engine=engine,
            seq_len=length,
            save_gathered=keep,
        )
        grads = [torch.ones_like(y) * (i + 1) for i, y in enumerate(out)]
        sent.clear()
        P2PSession.post = counting  # type: ignore[method-assign]
        try:
            got = torch.autograd.grad(out, [x, *weights, bias], grads)
        finally:
            P2PSession.post = healthy  # type: ignore[method-assign]
        if x.shape[seq_dim]:
            assert ("shard" in sent) != keep, sent
        if length - x.shape[seq_dim]:
            assert "partial sums" in sent
        found.append([*out, *got])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(("chunks", "engine"), [(None, "single"), (1, "p2p"), (3, "p2p")])
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize("length", [8, 7, 1])
def test_a_kept_gather_is_not_repeated(
    world: World, length: int, seq_dim: int, chunks: int | None, engine: str
) -> None:
    world.run(kept_case, length, seq_dim, chunks, engine)


def kept_bounded_case() -> None:
    sp.set_max_workspace_bytes(5 * 2 * K * 8)
    try:
        kept_case(17, 1, None, "auto")
    finally:
        sp.set_max_workspace_bytes(None)


def test_a_kept_gather_within_a_bound(world2: World) -> None:
    world2.run(kept_bounded_case)


def kept_main_grad_case() -> None:
    g = group()
    x, weight = leaf(torch.randn(2, 4, K)), leaf(torch.randn(N, K))
    want = torch.autograd.grad(sp.all_gather_linear(x, weight, group=g).square().sum(), [x, weight])
    main_grad = torch.zeros(N, K)
    y = sp.all_gather_linear(x, weight, group=g, main_grad=main_grad, save_gathered=True)
    y.square().sum().backward()
    torch.testing.assert_close([x.grad, main_grad], list(want))
    assert weight.grad is None
    layer = sp.nn.ColumnParallelLinear(K, N * g.size(), group=g, save_gathered=True)
    layer(x).sum().backward()
    compiled = torch.compile(
        lambda x, w: sp.all_gather_linear(x, w, group=g, save_gathered=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight).square().sum(), [x, weight]), want)


def test_a_kept_gather_with_main_grad_module_and_compile(world2: World) -> None:
    world2.run(kept_main_grad_case)


def looked_up_case() -> None:
    """A call like one that has been checked is not checked again, one unlike it is; a new plan is found."""
    g = group()
    x, w = torch.randn(2, 4, K), torch.randn(N, K)
    sp.all_gather_linear(x, w, group=g, chunks=1)
    sp.linear_reduce_scatter(torch.randn(2, 8, K), w, group=g, chunks=1)
    for bad, match in (
        ({"chunks": True}, "chunks: expected a positive int or None, got True"),
        ({"chunks": 1, "weight": torch.randn(N, K + 1)}, "weight: expected in_features"),
        ({"chunks": 1, "weight": w.double()}, "weight: expected the dtype of x"),
        ({"chunks": 1, "seq_dim": -1}, "seq_dim: expected"),
        ({"chunks": 1, "engine": "none"}, "engine: expected one of"),
    ):
        given: dict[str, Any] = {"weight": w, **bad}
        with pytest.raises(ValueError, match=match):
            sp.all_gather_linear(x, group=g, **given)
        with pytest.raises(ValueError, match=match):
            sp.linear_reduce_scatter(torch.randn(2, 8, K), group=g, **given)
    with torch.autocast("cpu", torch.bfloat16):
        assert sp.all_gather_linear(x, w, group=g, chunks=1).dtype == torch.bfloat16
    assert sp.all_gather_linear(x, w, group=g, chunks=1).dtype == torch.float32
    large = torch.randn(2, 64, K)
    sp.all_gather_linear(large, w, group=g, engine="single")
    sp.set_max_workspace_bytes(5 * 2 * K * 4)
    try:
        with pytest.raises(ValueError, match="moves everything at once"):
            sp.all_gather_linear(large, w, group=g, engine="single")
    finally:
        sp.set_max_workspace_bytes(None)


def test_what_has_been_met_before_is_told_from_what_has_not(world2: World) -> None:
    world2.run(looked_up_case)


def calls_case() -> list[tuple[str, int, int]]:
    """Of each linear, how many functions of this package a call like the last one takes, and how deep they go."""
    g = group()
    x, w, b = leaf(torch.randn(1, 4, K)), leaf(torch.randn(K, K)), leaf(torch.randn(K))
    whole = leaf(torch.randn(1, 4 * g.size(), K))
    package = os.path.dirname(sp.__file__) + os.sep
    found = []
    for op, operand in ((sp.all_gather_linear, x), (sp.linear_reduce_scatter, whole)):
        for _ in range(3):
            op(operand, w, b, group=g)
        dist.barrier(g)
        calls = depth = deepest = 0

        def count(frame: FrameType, event: str, _: object) -> None:
            nonlocal calls, depth, deepest
            if event in ("call", "return") and frame.f_code.co_filename.startswith(package):
                calls += event == "call"
                depth += 1 if event == "call" else -1
                deepest = max(deepest, depth)

        sys.setprofile(count)
        try:
            op(operand, w, b, group=g)
        finally:
            sys.setprofile(None)
        found.append((op.__name__, calls, deepest))
    return found


def test_a_known_call_goes_straight_to_its_exchange(world2: World) -> None:
    """A small call's time is the interpreter's: what its kind decides has been decided before."""
    for gathered, scattered in world2.run(calls_case):
        assert gathered[1] <= 40 and gathered[2] <= 12, gathered
        assert scattered[1] <= 50 and scattered[2] <= 12, scattered
