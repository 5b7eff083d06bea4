"""Pending sums: what waits for the norm, what does not, and that numbers and gradients are those of plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqpar_kernels import nn as spnn
from seqpar_kernels.nn.deferred_sum import DeferredSum
from seqpar_kernels.nn.linear import SharedGather

from ..world import World

H, F = 8, 12

#: What a block may do with the row-parallel output before the norm: (statements, whether norm and sum are one kernel).
WAYS: dict[str, tuple[Callable[[Tensor, Tensor, nn.Module], Tensor], bool]] = {
    "add": (lambda out, residual, drop: residual + out, True),
    "add the other way": (lambda out, residual, drop: torch.add(out, residual), True),
    "dropout, add": (lambda out, residual, drop: residual + drop(out), True),
    "no residual": (lambda out, residual, drop: out, True),
    "a sum of two": (lambda out, residual, drop: (residual + out) + out, True),
    "add, dropout": (lambda out, residual, drop: drop(residual + out), False),
    "a multiplier": (lambda out, residual, drop: residual + out * 0.5, False),
    "in place": (lambda out, residual, drop: residual.clone().add_(out), False),
    "looked at without gradient": (lambda out, residual, drop: looked_at(residual + out), False),
    "a scalar": (lambda out, residual, drop: out + 1.0, False),
    "another dtype": (lambda out, residual, drop: (residual.double() + out).float(), False),
}


def looked_at(x: Tensor) -> Tensor:
    with torch.no_grad():
        assert torch.isfinite(x.norm())
    return x


def way_case(way: str, kind: str) -> None:
    statements, fused = WAYS[way]
    group = dist.group.WORLD
    results = []
    for deferring in (None, True):
        torch.manual_seed(0)
        region = spnn.Region(group)
        linear = spnn.RowParallelLinear(F, H, group=group)
        norm: Any = spnn.LayerNorm(H, group=group) if kind == "layer" else spnn.RMSNorm(H, group=group)
        drop = spnn.Dropout(0.4, group=group)
        nn.init.normal_(norm.weight)
        for module in (linear, norm, drop):
            module.region = region
        region.deferring = deferring
        whole = torch.randn(2, 6, F)
        x = whole.chunk(2, -1)[region.rank].clone().requires_grad_()
        residual = torch.randn(2, 6, H).chunk(2, 1)[region.rank].clone().requires_grad_()
        out = linear(x)
        assert isinstance(out, DeferredSum) == bool(deferring)
        assert (out.shape, out.dtype, out.device.type) == ((2, 3, H), torch.float32, "cpu")
        z = statements(out, residual, drop)
        y = norm(z)
        assert norm.fused == (fused and bool(deferring))
        (y.square().sum() + (z * z.detach()).sum()).backward()
        grads = [t.grad for t in (x, residual, *linear.parameters(), *norm.parameters()) if t.grad is not None]
        results.append([y.detach(), (z * 1).detach(), *grads, torch.rand(1)])  # the generator too is where it was
    assert len(results[0]) == len(results[1])
    for plain, pending in zip(*results):
        torch.testing.assert_close(pending, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_and_gradients_are_those_of_plain_tensors(world2: World, way: str, kind: str) -> None:
    world2.run(way_case, way, kind)


def not_waiting_case() -> None:
    linear = spnn.RowParallelLinear(F, H, group=dist.group.WORLD)
    x = torch.randn(2, 6, F // 2)
    assert not isinstance(linear(x), DeferredSum)
    linear.region.deferring = True
    with torch.no_grad():
        assert not isinstance(linear(x), DeferredSum)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not isinstance(linear(x), DeferredSum)
    pending = linear(x)
    assert isinstance(pending, DeferredSum) and "waiting" in repr(pending)
    torch.testing.assert_close(torch.stack([pending, pending])[0], pending.value())
    assert "computed" in repr(pending)
    with pytest.raises(RuntimeError, match="still to be summed over the ranks"):
        Identity.apply(linear(x)).sum().backward()
    Identity.apply(linear(x).clone()).sum().backward()
    assert linear.weight.grad is not None
    for trained in ("bias", "residual"):  # nothing else is, and the sum wants its gradient all the same
        linear.requires_grad_(False)
        linear.bias.requires_grad_(trained == "bias")
        residual = torch.zeros(linear(x).shape, requires_grad=trained == "residual")
        with pytest.raises(RuntimeError, match="still to be summed over the ranks"):
            Identity.apply(linear(x) + residual).sum().backward()


class Identity(torch.autograd.Function):
    """Goes past torch functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.aten.mul(x, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def test_when_nothing_waits(world2: World) -> None:
    world2.run(not_waiting_case)


def change(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(3.0)


@pytest.mark.parametrize("use", [lambda norm, z: norm(z), lambda norm, z: z * 1.0], ids=["norm", "value"])
@pytest.mark.parametrize("changed", ["x", "residual", None])
def test_what_a_pending_sum_is_made_of_must_stay(changed: str | None, use: Callable[..., Tensor]) -> None:
    linear, norm = spnn.RowParallelLinear(6, 4), spnn.LayerNorm(4)
    norm.region = linear.region
    linear.region.deferring = True
    made = {"x": torch.randn(2, 3, 6), "residual": torch.randn(2, 3, 4)}
    z = linear(made["x"]) + made["residual"]
    assert isinstance(z, DeferredSum)
    value = made["residual"] + torch.nn.functional.linear(made["x"], linear.weight, linear.bias)
    if changed is None:
        torch.testing.assert_close(use(norm, z), use(norm, value))
        change(made["residual"])  # now the sum has its value
        torch.testing.assert_close(z * 1.0, value)
    else:
        change(made[changed])
        with pytest.raises(RuntimeError, match=r"RowParallelLinear.*changed in place before the norm"):
            use(norm, z)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_shared_gather_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    first, second = members = [spnn.ColumnParallelLinear(6, size) for size in (4, 8)]
    first.shared_gather = second.shared_gather = shared = SharedGather(members)
    with mode():
        x = torch.randn(2, 3, 6)
        for member in members:
            torch.testing.assert_close(member(x), torch.nn.functional.linear(x, member.weight, member.bias))
            assert list(shared._waiting) == ([1] if member is first else [])


def test_an_input_changed_before_the_addition() -> None:
    linear = spnn.RowParallelLinear(6, 4)
    linear.region.deferring = True
    x = torch.randn(2, 3, 6)
    out = linear(x)
    change(x)
    with pytest.raises(RuntimeError, match="changed in place before the norm"):
        out + torch.randn(2, 3, 4)
