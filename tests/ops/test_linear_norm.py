"""linear_reduce_scatter_dropout_add_norm on real gloo ranks, against linear, then dropout_add_norm, unsharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.kernels import NormTensors

from ..oracle import assert_within_budget
from ..world import World

K, N = 6, 10
F64 = torch.float64


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def inputs(length: int, seq_dim: int, ranks: int, norm: str | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Whole tensors, alike on every rank: x [2, S, t * K] or [S, 2, t * K], weight [N, t * K], residual, vectors."""
    shape = [2, 2]
    shape[seq_dim] = length

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=F64).to(dtype).requires_grad_()

    made: dict[str, Tensor | None] = {"x": random(*shape, ranks * K), "weight": random(N, ranks * K)}
    made |= {"bias": random(N), "residual": random(*shape, N)}
    made["norm_weight"] = random(N) if norm else None
    made["norm_bias"] = random(N) if norm == "layer" else None
    return made


def unsharded(t: dict[str, Tensor | None], norm: str | None, **options: Any) -> tuple[Tensor | None, Tensor]:
    """The same in two ops and without ranks."""
    x, weight = t["x"], t["weight"]
    assert x is not None and weight is not None
    summed = F.linear(x, weight)
    if norm is None:
        return None, sp.dropout_add(summed, t["residual"], x_bias=t["bias"], **options)
    options |= {"x_bias": t["bias"], "prenorm": True}
    if norm == "rms":
        return sp.dropout_add_rms_norm(summed, t["residual"], t["norm_weight"], **options)  # type: ignore[no-any-return]
    return sp.dropout_add_layer_norm(summed, t["residual"], t["norm_weight"], t["norm_bias"], **options)  # type: ignore[no-any-return]


def part(t: dict[str, Tensor | None], seq_dim: int) -> dict[str, Tensor | None]:
    """What this rank has of :func:`inputs`, views included."""
    g = group()
    mine = slice(g.rank() * K, g.rank() * K + K)
    cut = {
        name: None if value is None else value.detach().clone().requires_grad_()
        for name, value in t.items()
        if name not in ("x", "weight", "residual")
    }
    x, weight, residual = t["x"], t["weight"], t["residual"]
    assert x is not None and weight is not None and residual is not None
    cut["x"] = x.detach()[..., mine].requires_grad_()
    cut["weight"] = leaf(weight[:, mine])
    cut["residual"] = residual.detach().tensor_split(g.size(), seq_dim)[g.rank()].requires_grad_()
    return cut


def present(t: dict[str, Any]) -> list[Any]:
    return [t[name] for name in sorted(t) if t[name] is not None]


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_row_scale_without_dropout(norm: str | None) -> None:
    """Then the residual's gradient is still not that of the sum."""
    made = inputs(5, 1, 1, norm, F64)
    options: dict[str, Any] = {"row_scale": torch.rand(2, 5)}
    plain = [out for out in unsharded(made, norm, **options) if out is not None]
    given = {name: t for name, t in made.items() if name not in ("x", "weight", "bias")}
    ours = sp.linear_reduce_scatter_dropout_add_norm(
        made["x"], made["weight"], made["bias"], norm=norm, group=None, **given, **options
    )
    got = [out for out in ours if out is not None]
    torch.testing.assert_close(got, plain)
    douts = [torch.randn_like(out) for out in plain]
    expected, found = (torch.autograd.grad(outs, present(made), douts) for outs in (plain, got))
    torch.testing.assert_close(found, expected)


def test_a_stream_wider_than_the_residual() -> None:
    made = inputs(5, 1, 1, None, torch.bfloat16)
    plain = unsharded(made, None, residual_dtype=torch.float32)[1]
    x, weight, bias = made["x"], made["weight"], made["bias"]
    assert x is not None and weight is not None
    options: dict[str, Any] = {"residual": made["residual"], "residual_dtype": torch.float32, "norm": None}
    z = sp.linear_reduce_scatter_dropout_add_norm(x, weight, bias, group=None, **options)[1]
    assert z.dtype == torch.float32 and torch.equal(z, plain)
    dz = torch.randn_like(z)
    expected, found = (torch.autograd.grad(out, present(made), dz) for out in (plain, z))
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, reference)


def case(length: int, seq_dim: int, norm: str | None, chunks: int | None, engine: str) -> None:
    g = group()
    t, rank = g.size(), g.rank()
    whole = inputs(length, seq_dim, t, norm, F64)
    row_scale = torch.rand(2, length)
    row_scale = row_scale if seq_dim else row_scale.t()
    options: dict[str, Any] = {"p": 0.3, "seed": 11, "zero_centered_weight": norm == "rms"}
    if norm is None:
        del options["zero_centered_weight"]
    outs = [out for out in unsharded(whole, norm, row_scale=row_scale, seq_dim=seq_dim, **options) if out is not None]
    douts = [torch.randn_like(out) for out in outs]
    grads = dict(
        zip([n for n in sorted(whole) if whole[n] is not None], torch.autograd.grad(outs, present(whole), douts))
    )

    mine = part(whole, seq_dim)
    x, weight, bias = mine.pop("x"), mine.pop("weight"), mine.pop("bias")
    assert x is not None and weight is not None

    def shard(of: Tensor) -> Tensor:
        return of.tensor_split(t, seq_dim)[rank]

    y, z = sp.linear_reduce_scatter_dropout_add_norm(
        x, weight, bias, norm=norm, row_scale=shard(row_scale), **mine, **options,
        group=g, seq_dim=seq_dim, chunks=chunks, engine=engine,
    )  # fmt: skip
    got = [out for out in (y, z) if out is not None]
    assert len(got) == len(outs)
    for ours, expected in zip(got, outs, strict=True):
        torch.testing.assert_close(ours, shard(expected))
    mine |= {"x": x, "weight": weight, "bias": bias}
    ours_grads = torch.autograd.grad(got, present(mine), [shard(d) for d in douts])
    cut = slice(rank * K, rank * K + K)
    expected_grads = grads | {
        "x": grads["x"][..., cut], "weight": grads["weight"][:, cut], "residual": shard(grads["residual"]),
    }  # fmt: skip
    for name, ours, expected in zip(sorted(grads), ours_grads, present(expected_grads), strict=True):
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize(("chunks", "engine"), [(None, "auto"), (None, "single"), (1, "auto"), (3, "p2p")])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize("length", [8, 7, 1])
def test_equals_the_unsharded_sequence(
    world: World, length: int, seq_dim: int, norm: str | None, chunks: int | None, engine: str
) -> None:
    world.run(case, length, seq_dim, norm, chunks, engine)


def budget_case(dtype: torch.dtype, residual_dtype: torch.dtype | None) -> None:
    """No worse than twice the unfused sequence on the same ranks, whose sum is rounded once more."""
    g = group()
    t, rank = g.size(), g.rank()
    whole = inputs(37, 1, t, "layer", dtype)
    if residual_dtype is not None:
        whole["residual"] = leaf(whole["residual"].to(residual_dtype))  # type: ignore[union-attr]
    mine = part(whole, 1)
    x, weight = mine.pop("x"), mine.pop("weight")
    options: dict[str, Any] = {"p": 0.2, "seed": 3, "group": g}
    fused = sp.linear_reduce_scatter_dropout_add_norm(x, weight, chunks=2, **mine, **options)  # type: ignore[arg-type]
    assert [out.dtype for out in fused if out is not None] == [dtype, residual_dtype or dtype]
    summed = sp.linear_reduce_scatter(x, weight, group=g)  # type: ignore[arg-type]
    vectors = (mine["norm_weight"], mine["norm_bias"])
    plain = sp.dropout_add_layer_norm(
        summed, mine["residual"], *vectors, x_bias=mine["bias"], prenorm=True, seq_len=37, **options
    )
    oracle = unsharded({k: v if v is None else v.detach().double() for k, v in whole.items()}, "layer", p=0.2, seed=3)
    for name, ours, reference, exact in zip("yz", fused, plain, oracle, strict=True):
        assert ours is not None and exact is not None
        assert_within_budget(ours, reference, exact.tensor_split(t, 1)[rank], name)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_error_is_within_budget(world: World, dtype: torch.dtype, residual_dtype: torch.dtype | None) -> None:
    world.run(budget_case, dtype, residual_dtype)


def mask_case(length: int, seq_dim: int) -> None:
    """What one rank drops, each of several drops."""
    g = group()
    shape = [2, 2, K]
    shape[seq_dim] = length
    ones = torch.ones(N)
    options: dict[str, Any] = {"norm": None, "p": 0.5, "seed": -7, "seq_dim": seq_dim}
    zeros, weight = torch.zeros(shape), torch.zeros(N, K)
    whole = sp.linear_reduce_scatter_dropout_add_norm(zeros, weight, ones, group=None, **options)[1]
    shard = sp.linear_reduce_scatter_dropout_add_norm(zeros, weight, ones, group=g, **options)[1]
    assert 0 < (whole == 0).sum() < whole.numel()
    assert torch.equal(shard, whole.tensor_split(g.size(), seq_dim)[g.rank()])


@pytest.mark.parametrize("seq_dim", [0, 1])
@pytest.mark.parametrize("length", [16, 13])
def test_drops_what_one_rank_drops(world: World, length: int, seq_dim: int) -> None:
    world.run(mask_case, length, seq_dim)


def integer_case(dtype: torch.dtype, length: int) -> None:
    """Matmuls of small integers are exact: the same bits for any chunk count, and those of an exact sum."""
    g = group()
    t, rank = g.size(), g.rank()
    torch.manual_seed(2)
    x, w = torch.randint(-8, 9, (2, length, K * t)).to(dtype), torch.randint(-8, 9, (N, K * t)).to(dtype)
    residual = torch.randn(2, length, N).to(dtype)
    cut = slice(rank * K, rank * K + K)
    results = [
        sp.linear_reduce_scatter_dropout_add_norm(
            x[..., cut], w[:, cut], residual=residual.tensor_split(t, 1)[rank], p=0.1, seed=1, group=g, chunks=chunks
        )
        for chunks in (1, 2, 8)
    ]
    for y, z in results:
        assert y is not None and results[0][0] is not None
        assert torch.equal(y, results[0][0]) and torch.equal(z, results[0][1])
    acc = F64 if dtype == F64 else torch.float32
    whole = sp.dropout_add(F.linear(x.to(acc), w.to(acc)), residual.to(acc), p=0.1, seed=1)
    assert torch.equal(results[0][1], whole.to(dtype).tensor_split(t, 1)[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [16, 13])
def test_the_same_bits_for_any_chunk_count(world: World, dtype: torch.dtype, length: int) -> None:
    world.run(integer_case, dtype, length)


def test_gradcheck_without_a_group() -> None:
    x = torch.randn(2, 6, K + 2, dtype=F64)[:, 1:, ::2].requires_grad_()
    weight, bias, scale, shift = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((N, 4), (N,), (N,), (N,)))
    residual = torch.randn(2, 5, N, dtype=F64, requires_grad=True)
    for norm in ("layer", "rms", None):

        def fn(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor, h: Tensor, norm: Any = norm) -> Any:
            vectors = {"norm_weight": g if norm else None, "norm_bias": h if norm == "layer" else None}
            y, z = sp.linear_reduce_scatter_dropout_add_norm(
                x, w, b, residual=r, norm=norm, p=0.4, seed=2, group=None, **vectors
            )
            return (z,) if y is None else (y, z)

        assert torch.autograd.gradcheck(fn, (x, weight, bias, residual, scale, shift))


def gradcheck_case() -> None:
    """Across ranks in fp64: the same entry of a replicated tensor is perturbed everywhere."""
    g = group()
    t = g.size()
    x, residual = torch.randn(1, 3, 2 * t, dtype=F64), torch.randn(1, 3, 3, dtype=F64)
    w, vectors = torch.randn(3, 2 * t, dtype=F64), torch.randn(3, 3, dtype=F64)

    def layer(x: Tensor, w: Tensor, residual: Tensor, vectors: Tensor) -> Tensor:
        """A function of whole tensors, replicated in and out."""
        y, z = sp.linear_reduce_scatter_dropout_add_norm(
            sp.scatter_tensor_parallel(x, g), sp.scatter_tensor_parallel(w, g, 1), vectors[0], p=0.3, seed=5,
            residual=sp.scatter_sequence(residual, g), norm_weight=vectors[1], norm_bias=vectors[2], group=g, chunks=2,
        )  # fmt: skip
        assert y is not None
        return sp.gather_sequence(y + z, g, seq_len=3, tensor_parallel_output_grad=False)

    assert torch.autograd.gradcheck(layer, [t.requires_grad_() for t in (x, w, residual, vectors)])


def test_gradcheck_across_ranks(world: World) -> None:
    world.run(gradcheck_case)


def compile_case() -> None:
    g = group()
    whole = inputs(8, 1, g.size(), "layer", torch.float32)
    mine = part(whole, 1)
    leaves = present(mine)

    def fn(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(sorted(mine), tensors, strict=True))
        return sp.linear_reduce_scatter_dropout_add_norm(**named, p=0.2, seed=3, group=g, chunks=2)  # type: ignore[arg-type, return-value]

    def results(fn: Any) -> list[Tensor]:
        y, z = fn(*leaves)
        return [y, z, *torch.autograd.grad(y.square().sum() + z.sum(), leaves)]

    for backend in ("eager", "aot_eager"):
        torch.testing.assert_close(results(torch.compile(fn, fullgraph=True, backend=backend)), results(fn))


def test_compiles_without_graph_breaks(world2: World) -> None:
    world2.run(compile_case)


def opcheck_case() -> None:
    g = group()
    op, check = torch.ops.seqpar.linear_reduce_scatter_dropout_add_norm.default, torch.library.opcheck
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 8, K), (N, K), (N,)))
    residual, seed = torch.randn(2, 4, N, requires_grad=True), torch.tensor(5)
    place = (g.group_name, 1, 8, 2, "p2p")
    scalars = (False, 1e-5, 0.1, 4, 8, 4 * g.rank(), *[torch.float32] * 4, "")
    gate = torch.randn(2, 8, K, requires_grad=True)
    everything = NormTensors(x, residual, b, b, x_bias=b, row_scale=torch.rand(8), seed=seed)
    check(op, (*everything, w, gate, *place, "silu", 1, *scalars))
    check(op, (*NormTensors(x, residual, b), w, None, *place, "", 2, *scalars))
    check(op, (*NormTensors(x, x_bias=b, seed=seed), w, None, *place, "gelu", 0, *scalars))
    alone = NormTensors(x, torch.randn(2, 8, N), b, b, x_bias=b, seed=seed)
    check(op, (*alone, w, None, "", 1, 8, 1, "single", "", 1, *scalars))


def test_opcheck(world2: World) -> None:
    world2.run(opcheck_case)


def needs_case() -> None:
    """Whatever needs no gradient costs none, and the others are not disturbed."""
    whole = inputs(6, 1, group().size(), "layer", F64)
    mine = part(whole, 1)
    names = [name for name in sorted(mine) if mine[name] is not None]

    def grads(wanted: list[str], used: int) -> dict[str, Tensor]:
        t: dict[str, Any] = {name: leaf(mine[name]) if name in wanted else mine[name].detach() for name in names}  # type: ignore[union-attr]
        out = sp.linear_reduce_scatter_dropout_add_norm(**t, p=0.2, seed=3, group=group())[used]
        assert out is not None
        torch.manual_seed(4)
        out.backward(torch.randn_like(out))
        return {name: t[name].grad for name in wanted}

    for used in (0, 1):
        everything = grads(names, used)
        for name in names:
            (alone,) = grads([name], used).values()
            if used == 1 and name.startswith("norm_"):
                assert alone is None or not alone.any()
            else:
                torch.testing.assert_close(alone, everything[name], rtol=0, atol=0)


def test_only_what_is_needed_is_computed(world2: World) -> None:
    world2.run(needs_case)


def autocast_case() -> None:
    g = group()
    whole = inputs(6, 1, g.size(), "rms", torch.float32)
    mine: dict[str, Any] = part(whole, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = sp.linear_reduce_scatter_dropout_add_norm(**mine, norm="rms", group=g)
    assert y is not None and y.dtype == torch.bfloat16 and z.dtype == torch.float32
    (y.float().sum() + z.sum()).backward()
    assert all(t.grad.dtype == torch.float32 for t in present(mine))


def test_autocast(world2: World) -> None:
    world2.run(autocast_case)


def in_place_case() -> None:
    """y is nobody's view; z is kept for the backward, and autograd says so."""
    for g in (None, group()):
        x, w = leaf(torch.randn(2, 4, K)), leaf(torch.randn(N, K))
        y, z = sp.linear_reduce_scatter_dropout_add_norm(x, w, norm="rms", group=g)
        assert y is not None
        y.relu_().sum().backward(retain_graph=True)
        z.relu_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_results_may_be_modified_in_place(world2: World) -> None:
    world2.run(in_place_case)


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    x = torch.randn(2, 4, K)
    return {
        "norm": ({"norm": "batch"}, "norm: expected 'layer', 'rms' or None, got 'batch'"),
        "norm_bias": ({"norm": "rms", "norm_bias": torch.ones(N)}, "norm_bias: expected None with norm='rms'"),
        "norm_weight": ({"norm": None, "norm_weight": torch.ones(N)}, "norm_weight: expected None with norm=None"),
        "vector size": ({"norm_weight": torch.ones(N + 1)}, r"norm_weight: expected shape \(10,\), the out_features"),
        "bias size": ({"bias": torch.ones(1)}, r"bias: expected shape \(10,\), the out_features of weight"),
        "bias type": ({"bias": 1.0}, "bias: expected a tensor, got float"),
        "residual": (
            {"residual": torch.ones(2, 4, N)},
            r"residual: expected \(2, 2, 10\), this rank's shard of the ou",
        ),
        "residual dtype": ({"residual": torch.ones(2, 2, N).half()}, "residual_dtype: expected torch.float32"),
        "row_scale": ({"row_scale": torch.ones(2, 4)}, r"row_scale: expected \(2, 2\)"),
        "row_scale grad": ({"row_scale": torch.ones(2, 2).requires_grad_()}, "row_scale: expected a tensor without gr"),
        "weight": ({"weight": torch.randn(N, K + 1)}, "weight: expected in_features = 6"),
        "x": ({"x": x.long()}, "x: expected float32"),
        "p": ({"p": 1.5}, r"p: expected a probability in \[0, 1\], got 1.5"),
        "eps": ({"eps": 0.0}, "eps: expected a positive finite number"),
        "seed": ({"seed": 1.5}, "seed: expected an int"),
        "chunks": ({"chunks": 0}, "chunks: expected a positive int or None, got 0"),
        "engine": ({"engine": "magic"}, "engine: expected one of"),
        "seq_dim": ({"seq_dim": 2}, "seq_dim: expected a dimension of x"),
    }


def bad_case(name: str) -> None:
    changed, message = bad_calls()[name]
    good: dict[str, Any] = {"x": torch.randn(2, 4, K), "weight": torch.randn(N, K), "group": group()}
    with pytest.raises(ValueError, match=message):
        sp.linear_reduce_scatter_dropout_add_norm(**{**good, **changed})
    sp.linear_reduce_scatter_dropout_add_norm(**good)  # the group still works


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_named_on_every_rank(world2: World, name: str) -> None:
    world2.run(bad_case, name)


@pytest.mark.parametrize("seq_dim", [0, 1])
def test_the_same_bits_over_another_transport(seq_dim: int) -> None:
    """Three virtual ranks in one process: exact matmuls, so that z is that of one rank, its mask included."""
    x, w = torch.randint(-6, 7, (7, 7, 3 * K)).bfloat16(), torch.randint(-6, 7, (N, 3 * K)).bfloat16()
    residual, bias = torch.randn(7, 7, N).bfloat16(), torch.randn(N).bfloat16()
    options: dict[str, Any] = {"p": 0.1, "seed": 3, "seq_dim": seq_dim}

    def rank(g: dist.ProcessGroup) -> tuple[Tensor | None, Tensor]:
        cut = slice(g.rank() * K, g.rank() * K + K)
        mine = residual.tensor_split(3, seq_dim)[g.rank()]
        return sp.linear_reduce_scatter_dropout_add_norm(
            x[..., cut], w[:, cut], bias, residual=mine, group=g, chunks=2, **options
        )

    with Loopback(3) as virtual:
        shards = virtual.run(rank)
    exact = F.linear(x.float(), w.float())
    whole = sp.dropout_add(exact, residual.float(), x_bias=bias.float(), **options).bfloat16()
    assert torch.equal(torch.cat([z for _, z in shards], seq_dim), whole)
