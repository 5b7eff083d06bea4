"""Inputs of linears that are made again from what their producers keep."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqpar_kernels as sp
from seqpar_kernels.nn import SplitRMSNorm
from seqpar_kernels.ops.split_norm import SplitNorm


def leaves(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for _ in range(count)]


def linear(remake: bool, features: int = 33, dtype: torch.dtype = torch.float32) -> sp.RowParallelLinear:
    torch.manual_seed(2)
    made = sp.RowParallelLinear(features, 7, dtype=dtype)
    made.remake_input = remake
    return made


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda a, b: F.silu(a * 1.5),
    "gelu": lambda a, b: F.gelu(a * 1.5),
    "gelu_tanh": lambda a, b: F.gelu(a * 1.5, approximate="tanh"),
    "mish": lambda a, b: F.mish(a * 1.5),
    "hardswish": lambda a, b: F.hardswish(a * 1.5),
    "gated": lambda a, b: F.silu(a * 1.5) * (b * 2),
    "gated, views": lambda a, b: F.silu((a * 1.5).view(-1, 33)).view(a.shape) * (b * 2),
    "both factors": lambda a, b: F.gelu(a * 1.5) * F.silu(b * 2),
    "one factor twice": lambda a, b: (lambda s: s * s)(F.silu(a * 1.5)),
    "square": lambda a, b: F.relu(a * 1.5).square(),
    "cast": lambda a, b: F.silu(a.double() * 1.5).to(a.dtype),
    "flattened": lambda a, b: (F.silu(a * 1.5) * (b * 2)).view(-1, 33),
    "strided": lambda a, b: F.silu(a.mT.contiguous().mT * 1.5) * (b * 2),
    "norm": lambda a, b: sp.dropout_add_rms_norm(a * 1.5, None, b[0, 0]),
    "dropout, add, norm": lambda a, b: sp.dropout_add_layer_norm(a * 1.5, b * 2, b[0, 0], b[0, 1], p=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_results_have_the_bits_of_the_forward(way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    a, b = leaves(2, 2, 5, 33, dtype=dtype)
    found = []
    for remake in (False, True):
        torch.manual_seed(4)
        layer = linear(remake, dtype=dtype)
        y = layer(WAYS[way](a, b))
        grads = torch.autograd.grad(y.square().sum(), (a, b, layer.weight), allow_unused=True, retain_graph=True)
        again = torch.autograd.grad(y.square().sum(), (a, b, layer.weight), allow_unused=True)
        found.append((y, *grads, *again))
    for kept, made in zip(*found, strict=True):
        assert (kept is None) == (made is None)
        assert kept is None or torch.equal(kept, made)


def test_a_product_and_its_factor_are_not_kept() -> None:
    a, b = leaves(2, 2, 5, 33)
    layer = linear(True)
    gate, up = a * 1.5, b * 2
    activated = F.silu(gate)
    product = activated * up
    gone = weakref.ref(activated.untyped_storage()), weakref.ref(product.untyped_storage())
    y = layer(product)
    del activated, product
    gc.disable()
    try:
        report = sp.activation_bytes(lambda: layer(F.silu(gate) * up))
        assert report.total == gate.nbytes + up.nbytes
        assert [ref() for ref in gone] == [None, None]
        y.sum().backward()
    finally:
        gc.enable()


def test_a_change_in_place_is_an_error() -> None:
    for remake in (False, True):
        a, b = leaves(2, 2, 5, 33)
        gate, up = a * 1.5, b * 2
        y = linear(remake)(F.silu(gate) * up)
        with torch.no_grad():
            gate.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        z = a * 1.5
        y = linear(remake)(sp.dropout_add_rms_norm(z, None, torch.ones(33)))
        with torch.no_grad():
            z.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_an_input_that_was_changed_in_place_is_kept() -> None:
    """Where autograd does not look: a hook that prunes or steers."""
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda gate, up: zeroed(F.silu(gate)),
        lambda gate, up: zeroed(F.silu(gate)) * up,
        lambda gate, up: zeroed(F.silu(gate) * up),
        lambda gate, up: zeroed(sp.dropout_add_rms_norm(gate, None, torch.ones(33))),
    ]

    def zeroed(x: Tensor) -> Tensor:
        with torch.no_grad():
            x[..., :4] = 0
        return x

    for way in ways:
        found = []
        for remake in (False, True):
            torch.manual_seed(1)
            a, b = leaves(2, 2, 5, 33)
            layer = linear(remake)
            y = layer(way(a * 1.5, b * 2))
            found.append(torch.autograd.grad(y.square().sum(), (layer.weight, b), allow_unused=True))
        for kept, made in zip(*found, strict=True):
            assert kept is None or torch.equal(kept, made)
        assert not found[1][0][:, :4].any()


def test_a_result_whose_graph_is_gone_is_kept() -> None:
    a, b = leaves(2, 2, 5, 33)
    layer = linear(True)
    norm = sp.dropout_add_rms_norm(a * 1.5, None, torch.ones(33))
    for x in (F.silu(a * 1.5) * (b * 2), F.silu(a * 1.5), norm):
        layer(x).sum().backward()
        (dw,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        torch.testing.assert_close(dw, x.detach().sum((0, 1)).expand_as(dw))


def test_a_norm_of_several_dtypes_is_kept() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (x,) = leaves(1, 2, 5, 33, dtype=dtype)
        residual = torch.randn(2, 5, 33)
        found = []
        for remake in (False, True):
            layer = linear(remake, dtype=dtype)
            y = layer(sp.dropout_add_layer_norm(x, residual, torch.ones(33), torch.zeros(33)))
            found.append(torch.autograd.grad(y.float().sum(), (x, layer.weight)))
        assert all(map(torch.equal, *found))


def test_a_weight_without_memory_is_an_error() -> None:
    """fully_shard gives the memory of a norm's weight back before the linear's backward where the norm is alone."""
    for kind in ("norm", "split"):
        (x,) = leaves(1, 2, 5, 33)
        weight = torch.ones(33)
        norm = SplitRMSNorm.from_torch(torch.nn.RMSNorm(33), group=None)
        y = sp.dropout_add_rms_norm(x, None, weight) if kind == "norm" else norm(x)
        out = linear(True)(y)
        (weight if kind == "norm" else norm.weight).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="a norm's weight has no memory in the backward of the linear behind it"):
            out.sum().backward()


def test_modules_are_pickled_after_a_forward() -> None:
    a, b = leaves(2, 2, 5, 33)
    layer = linear(True)
    layer(F.silu(a * 1.5) * (b * 2))
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.weight, layer.weight) and again.kept.why() == "input made again from a product"


def test_bytes_of_a_graph_that_is_gone_count() -> None:
    x = torch.randn(8, 16)
    layer = torch.nn.Linear(16, 4)
    assert sp.activation_bytes(lambda: layer(x).sum().item()).total == x.nbytes


def test_a_second_backward_needs_the_graph() -> None:
    a, b = leaves(2, 2, 5, 33)
    y = linear(True)(F.silu(a * 1.5) * (b * 2))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_frozen_weight_and_hooks_of_others() -> None:
    a, b = leaves(2, 2, 5, 33)
    layer = linear(True).requires_grad_(False)
    layer(F.silu(a * 1.5) * (b * 2)).sum().backward()
    grads = [a.grad, b.grad]
    for wrapped in (
        lambda x, y: checkpoint(lambda x, y: layer(F.silu(x * 1.5) * (y * 2)), x, y, use_reentrant=False),
        lambda x, y: layer(checkpoint(lambda x, y: F.silu(x * 1.5) * (y * 2), x, y, use_reentrant=False)),
        lambda x, y: layer(checkpoint(lambda x, y: F.silu(x * 1.5) * (y * 2), x, y, use_reentrant=True)),
    ):
        a.grad = b.grad = None
        wrapped(a, b).sum().backward()
        assert torch.equal(a.grad, grads[0]) and torch.equal(b.grad, grads[1])
    a.grad = b.grad = None
    with torch.autograd.graph.save_on_cpu():
        out = layer(F.silu(a * 1.5) * (b * 2))
    out.sum().backward()
    assert torch.equal(a.grad, grads[0])


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """The backward may run in a context other than the forward's."""
    found = []
    for remake in (False, True):
        torch.manual_seed(1)
        a, b = leaves(2, 2, 5, 33)
        layer = linear(remake)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(sp.dropout_add_rms_norm(F.silu(a * 1.5) * (b * 2), None, torch.ones(33)))
            if inside:
                y.float().sum().backward()
        if not inside:
            y.float().sum().backward()
        found.append((a.grad, b.grad, layer.weight.grad))
    assert all(map(torch.equal, *found))


def test_long_chains_are_freed() -> None:
    layer = sp.RowParallelLinear(4, 4)
    layer.remake_input = True
    y = torch.randn(1, 2, 4, requires_grad=True)
    for _ in range(20_000):
        y = layer(F.silu(y))
    del y  # a destructor that called itself for each layer would end the process


def test_split_norm() -> None:
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    for zero_centered in (False, True):
        args = (x.requires_grad_(), weight.requires_grad_(), 5, 1e-6, zero_centered, "")
        assert torch.autograd.gradcheck(SplitNorm.apply, args)
    assert torch.autograd.gradcheck(SplitNorm.apply, (x, None, 5, 1e-6, False, ""))
    plain = torch.nn.RMSNorm(64, eps=1e-6, dtype=torch.bfloat16)
    norm = SplitRMSNorm.from_torch(plain, group=None)
    rows = torch.randn(3, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    report = sp.activation_bytes(norm, rows)
    assert report.total == rows.nbytes + 3 * 9 * 4  # the rows, and one number of each
    wide = rows.detach().double().requires_grad_()
    exact = torch.nn.functional.rms_norm(wide, (64,), eps=1e-6)
    for got, same, expected in (
        (report.result, plain(rows), exact),
        *zip(
            torch.autograd.grad(report.result.sum(), rows),
            torch.autograd.grad(plain(rows).sum(), rows),
            torch.autograd.grad(exact.sum(), wide),
            strict=True,
        ),
    ):
        allowed = 2 * (same.double() - expected).abs().max() + 2**-8 * expected.abs().max()
        assert (got.double() - expected).abs().max() <= allowed
