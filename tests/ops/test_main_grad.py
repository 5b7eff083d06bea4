"""Weight gradients added straight to a float32 main_grad, one rank and several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.functional import NormRecipe, checked_all_gather_linear
from seqpar_kernels.kernels import NormKind
from seqpar_kernels.nn.linear import SharedGather
from seqpar_kernels.ops.main_grad import add_weight_gradient

from ..world import World

K, N = 12, 10
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MICRO_BATCHES = 3


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("rows", [0, 1, 1500])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_exact_and_sums_in_the_wide_dtype(dtype: torch.dtype, rows: int, transposed: bool) -> None:
    torch.manual_seed(0)
    dy, x = torch.randn(rows, N).to(dtype), torch.randn(rows, K).to(dtype)
    wide = F64 if dtype == F64 else F32
    main_grad = torch.randn(K, N, dtype=wide).t() if transposed else torch.randn(N, K, dtype=wide)

    def exact(t: Tensor) -> np.ndarray:  # wider than any dtype under test, float64 included
        return t.to(F64).numpy().astype(np.longdouble)

    oracle = exact(main_grad) + exact(dy).T @ exact(x)
    a, b = (x, dy) if transposed else (dy, x)  # as it lies in memory: the library's order of summation follows that
    product = a.to(wide).t() @ b.to(wide)
    plain = main_grad + (product.t() if transposed else product)
    add_weight_gradient(main_grad, dy, x)
    rounding = torch.finfo(wide).eps * np.abs(oracle).max()
    budget = 2 * (np.abs(exact(plain) - oracle).max() + rounding)
    assert np.abs(exact(main_grad) - oracle).max() <= budget


def layer(which: str, x: Tensor, weights: list[Tensor], g: Any, main_grads: list[Tensor | None] | None) -> Tensor:
    """One op with a whole sequence's worth of output, whatever it is."""
    first = None if main_grads is None else main_grads[0]
    if which == "column":
        outs = sp.all_gather_linear(x, weights, group=g, chunks=2, main_grad=main_grads)
        return torch.cat(outs, -1)
    if which == "row":
        return sp.linear_reduce_scatter(x, weights[0], group=g, chunks=2, main_grad=first)
    options: dict[str, Any] = {"norm": "rms", "group": g, "p": 0.2, "seed": 1, "main_grad": first}
    y, z = sp.linear_reduce_scatter_dropout_add_norm(x, weights[0], **options)
    assert y is not None
    return y + z


OPS = ["column", "row", "norm"]


def accumulation_case(which: str, dtype: torch.dtype, grouped: bool) -> None:
    """Three micro-batches: as exact as fp32 sums of the same gradients in fp64, and better than sums of dtype."""
    g = group() if grouped else None
    torch.manual_seed(3)
    weights = [torch.randn(n, K).to(dtype).requires_grad_() for n in ((N, 7) if which == "column" else (N,))]
    wide = F64 if dtype == F64 else F32
    main_grads: list[Tensor | None] = [torch.zeros(w.shape, dtype=wide) for w in weights]
    doubles = [w.detach().double().requires_grad_() for w in weights]
    summed = [w.detach().clone().requires_grad_() for w in weights]
    length = 8 if g is None else 8 * g.size()
    # Of different sizes, so that a sum in 16 bits swallows the small ones; all forwards before the first backward.
    xs = [
        (torch.randn(2, 8 if which == "column" else length, K) * 4.0**-i).to(dtype).requires_grad_()
        for i in range(MICRO_BATCHES)
    ]
    outs = [layer(which, x, weights, g, main_grads) for x in xs]
    grads = [torch.randn(out.shape).to(dtype) for out in outs]
    for out, x, grad in zip(outs, xs, grads, strict=True):
        (dx,) = torch.autograd.grad(layer(which, x, summed, g, None), x, grad, retain_graph=True)
        out.backward(grad)
        torch.testing.assert_close(x.grad, dx, rtol=0, atol=0)
        layer(which, x.detach(), summed, g, None).backward(grad)
        layer(which, x.detach().double(), doubles, g, None).backward(grad.double())
    for main_grad, weight, in_dtype, exact in zip(main_grads, weights, summed, doubles, strict=True):
        assert weight.grad is None
        assert main_grad is not None and in_dtype.grad is not None and exact.grad is not None
        error = (main_grad.double() - exact.grad).abs().max()
        plain = (in_dtype.grad.double() - exact.grad).abs().max()
        assert main_grad.any() and error <= 2 * plain + 4 * torch.finfo(wide).eps * exact.grad.abs().max()
        if dtype == BF16 and which in ("column", "row"):  # nothing else is rounded on the way
            assert error <= 1e-5 * exact.grad.abs().max() < 1e2 * plain


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("which", OPS)
def test_three_micro_batches(which: str, dtype: torch.dtype) -> None:
    accumulation_case(which, dtype, False)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("which", OPS)
def test_three_micro_batches_on_ranks(world: World, which: str, dtype: torch.dtype) -> None:
    world.run(accumulation_case, which, dtype, True)


def mixed_case() -> None:
    """Of several weights each goes where it is sent; a frozen one nowhere; an output nobody used adds nothing."""
    g = group()
    x = torch.randn(2, 4, K)
    weights = [torch.randn(N, K, requires_grad=i != 2) for i in range(4)]
    main_grads = [torch.zeros(N, K), None, torch.zeros(N, K), torch.zeros(N, K)]
    outs = sp.all_gather_linear(x, weights, group=g, main_grad=main_grads)
    (outs[0] + outs[1] + outs[2]).sum().backward()
    assert weights[0].grad is None and weights[1].grad is not None
    torch.testing.assert_close(main_grads[0], weights[1].grad)
    assert main_grads[2] is not None and not main_grads[2].any() and weights[2].grad is None
    assert main_grads[3] is not None and not main_grads[3].any()


def test_only_where_asked_and_reached(world2: World) -> None:
    world2.run(mixed_case)


def compile_case() -> None:
    """Refused where no eager fallback is allowed, made in the fallback elsewhere."""
    g = group()
    x, w, main_grad = torch.randn(2, 4, K), torch.randn(N, K, requires_grad=True), torch.zeros(N, K)

    def fn(x: Tensor) -> Tensor:
        return sp.all_gather_linear(x, w, group=g, main_grad=main_grad).sum()

    with pytest.raises(Exception, match=r"main_grad: not possible under torch\.compile"):
        torch.compile(fn, fullgraph=True, backend="aot_eager")(x)
    torch.compile(fn, backend="aot_eager")(x).backward()
    expected = torch.zeros(N, K)
    sp.all_gather_linear(x, w, group=g, main_grad=expected).sum().backward()
    assert expected.any() and torch.equal(main_grad, expected) and w.grad is None


def test_compile_refuses_or_falls_back(world2: World) -> None:
    world2.run(compile_case)


def opcheck_case() -> None:
    """All of opcheck that does not functionalise: that is refused for ops which return lists."""
    name, t = group().group_name, group().size()
    ops = torch.ops.seqpar

    def check(op: Any, args: tuple[Any, ...]) -> None:
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, args, test_utils=utilities)

    place = (name, 1, 4 * t, 2, "p2p")
    x, w, main_grad = torch.randn(2, 4, K), torch.randn(3, K), torch.randn(3, K)
    dy, wide, short = torch.randn(2, 4 * t, 3), torch.randn(2, 4 * t, K), torch.randn(2, 4, 3)
    wants = (True, [True, True], [True, True])
    column = (x, [dy, dy], [w, w], *wants, False, *place, [main_grad, None])
    check(ops.all_gather_linear_backward_into.default, column)
    row = (short, wide, w, torch.float32, True, True, True, *place, main_grad)
    check(ops.linear_reduce_scatter_backward_into.default, row)


def test_opcheck(world2: World) -> None:
    world2.run(opcheck_case)


def module_case() -> None:
    """nn's option, with the flag and the placeholder that Megatron's hooks look for; a shared gather too."""
    g = group()
    for transposed in (False, True):
        options: dict[str, Any] = {"group": g, "transposed": transposed, "accumulate_into_main_grad": True}
        torch.manual_seed(g.rank())
        modules = [
            sp.ColumnParallelLinear(K, N * g.size(), **options),
            sp.ColumnParallelLinear(K, N * g.size(), **options),
            sp.RowParallelLinear(K * g.size(), N, **options),
        ]
        shared = SharedGather(modules[:2])  # type: ignore[arg-type]
        modules[0].shared_gather = modules[1].shared_gather = shared  # type: ignore[union-attr, assignment]
        x, wide = torch.randn(2, 4, K), torch.randn(2, 4 * g.size(), K)

        def loss() -> Tensor:
            return sum(m(t).square().sum() for m, t in zip(modules, (x, x, wide), strict=True))  # type: ignore[return-value] # noqa: B023

        for module in modules:
            module.accumulate_into_main_grad = False
        loss().backward()
        expected = [module.weight.grad for module in modules]
        for module in modules:
            module.accumulate_into_main_grad = True
            module.weight.grad = None
        with pytest.raises(ValueError, match="accumulate_into_main_grad: expected weight"):
            loss()
        with torch.no_grad():
            loss()
        for module in modules:
            module.weight.main_grad = torch.zeros_like(module.weight)
        loss().backward()
        assert all(module.weight.grad is None for module in modules)
        seen: list[bool] = []
        for module in modules:
            weight: Any = module.weight
            weight.grad_added_to_main_grad = False
            weight.register_post_accumulate_grad_hook(
                lambda w: seen.append(w.grad_added_to_main_grad and w.grad.shape == w.shape)  # noqa: B023
            )
        loss().backward()
        assert seen == [True] * 3
        for module, once in zip(modules, expected, strict=True):
            torch.testing.assert_close(module.weight.main_grad, 2 * once)
        with pytest.raises(Exception, match=r"main_grad: not possible under torch\.compile"):
            torch.compile(modules[2], fullgraph=True, backend="eager")(wide)


def test_modules(world2: World) -> None:
    world2.run(module_case)


BAD = {
    "shape": (torch.zeros(N, K + 1), r"main_grad: expected torch.float32 \(10, 12\) without gradient, like its weight"),
    "dtype": (torch.zeros(N, K, dtype=BF16), "main_grad: expected torch.float32 .* got torch.bfloat16"),
    "gradient": (torch.zeros(N, K, requires_grad=True), "main_grad: expected .* got .* requires_grad=True"),
    "type": (3, "main_grad: expected a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    main_grad, message = BAD[name]
    x, w = torch.randn(2, 4, K), torch.randn(N, K)
    for fn in (sp.all_gather_linear, sp.linear_reduce_scatter, sp.linear_reduce_scatter_dropout_add_norm):
        with pytest.raises(ValueError, match=message):
            fn(x, w, group=None, main_grad=main_grad)  # type: ignore[operator]


def test_several_weights_want_several_buffers() -> None:
    x, w = torch.randn(2, 4, K), torch.randn(N, K)
    with pytest.raises(ValueError, match=r"main_grad: expected a sequence of 2 entries, .* got a single tensor"):
        sp.all_gather_linear(x, [w, w], group=None, main_grad=torch.zeros(N, K))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="main_grad: expected a tensor or None beside a single weight"):
        sp.all_gather_linear(x, w, group=None, main_grad=[torch.zeros(N, K)])  # type: ignore[call-overload]
    assert torch.equal(sp.all_gather_linear(x, [w], group=None, main_grad=[None])[0], F.linear(x, w))


@pytest.mark.parametrize("gated", [False, True])
def test_a_recomputed_activation(gated: bool) -> None:
    torch.manual_seed(0)
    x, w, gate = torch.randn(2, 4, K), torch.randn(N, K, requires_grad=True), torch.randn(2, 4, K) if gated else None
    for fn in (sp.linear_reduce_scatter, sp.linear_reduce_scatter_dropout_add_norm):
        main_grad = torch.ones(N, K)
        sums = []
        for buffer in (None, main_grad):
            out = fn(x, w, group=None, activation="gelu", gate=gate, main_grad=buffer)  # type: ignore[operator]
            out = out if isinstance(out, Tensor) else out[0]
            (dw,) = torch.autograd.grad(out.square().sum(), w, allow_unused=buffer is not None)
            sums.append(dw)
        assert sums[1] is None
        torch.testing.assert_close(main_grad, 1 + sums[0])


def recipe_case() -> None:
    """A norm that is made again for the weight's gradient, of which one goes to its buffer and one does not."""
    g = group()
    torch.manual_seed(2)
    z, weights = torch.randn(2, 4, K, requires_grad=True), [torch.randn(n, K, requires_grad=True) for n in (N, 7)]
    y, z = sp.dropout_add_rms_norm(z, None, torch.ones(K), prenorm=True, group=g)
    made_from = NormRecipe(z, torch.ones(K), None, NormKind.RMS, False, 1e-5)
    main_grads = [torch.ones(N, K), None]
    common = (y, weights, None, g, -2, 2, "auto", None)
    calls = [checked_all_gather_linear(*common, m, recipe=made_from) for m in (None, main_grads)]
    plain, into = (call(*operands) for call, operands in calls)
    grads = [torch.randn_like(out) for out in plain]
    dz, *dws = torch.autograd.grad(plain, (z, *weights), grads, retain_graph=True)
    dz_into, *dws_into = torch.autograd.grad(into, (z, *weights), grads, allow_unused=True)
    assert torch.equal(dz, dz_into) and dws_into[0] is None and torch.equal(dws[1], dws_into[1])
    torch.testing.assert_close(main_grads[0], 1 + dws[0])


def test_a_norm_made_again(world2: World) -> None:
    world2.run(recipe_case)


def block_case(recompute_activation: bool) -> None:
    torch.manual_seed(5)
    options: dict[str, Any] = {"recompute_activation": recompute_activation, "dropout": 0.0}
    block = sp.nn.TransformerLayer(16, 2, **options, group=group())
    linears = [m for m in block.modules() if isinstance(m, sp.nn.ColumnParallelLinear | sp.nn.RowParallelLinear)]
    x = torch.randn(2, 4, 16)
    block(x).square().sum().backward()
    expected = [linear.weight.grad for linear in linears]
    for linear in linears:
        linear.accumulate_into_main_grad, linear.weight.grad = True, None
        linear.weight.main_grad = torch.zeros_like(linear.weight)  # type: ignore[assignment]
    block(x).square().sum().backward()
    assert len(linears) >= 4
    for linear, grad in zip(linears, expected, strict=True):
        assert linear.weight.grad is None
        torch.testing.assert_close(linear.weight.main_grad, grad)


@pytest.mark.parametrize("recompute_activation", [False, True])
def test_a_block_fills_every_buffer(world2: World, recompute_activation: bool) -> None:
    world2.run(block_case, recompute_activation)


def test_heads_shared_by_ranks_refuse() -> None:
    linear = sp.nn.SharedHeadsLinear.from_torch(torch.nn.Linear(K, N), heads=1)
    linear.accumulate_into_main_grad = True
    with pytest.raises(ValueError, match="accumulate_into_main_grad: expected False for heads shared by ranks"):
        linear(torch.randn(2, 4, K))
