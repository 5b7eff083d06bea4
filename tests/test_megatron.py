"""``seqpar_kernels.megatron`` means what Megatron-Core means: arguments, order, default group, gradients."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels import megatron as m
from seqpar_kernels.functional import doubled

from .world import World

# megatron/core/tensor_parallel/mappings.py, as its callers know it
ARGUMENTS = {
    "copy_to_tensor_model_parallel_region": {"input_": ..., "group": None},
    "reduce_from_tensor_model_parallel_region": {"input_": ..., "group": None},
    "scatter_to_tensor_model_parallel_region": {"input_": ..., "group": None},
    "gather_from_tensor_model_parallel_region": {"input_": ..., "group": None},
    "scatter_to_sequence_parallel_region": {"input_": ..., "group": None},
    "gather_from_sequence_parallel_region": {
        "input_": ..., "tensor_parallel_output_grad": True, "group": None, "output_split_sizes": None,
        "use_global_buffer": False,
    },
    "reduce_scatter_to_sequence_parallel_region": {
        "input_": ..., "group": None, "input_split_sizes": None, "use_global_buffer": False,
    },
    "all_gather_last_dim_from_tensor_parallel_region": {"input_": ..., "group": None},
    "reduce_scatter_last_dim_to_tensor_parallel_region": {"input_": ..., "group": None},
    "all_to_all": {"group": ..., "input_": ..., "output_split_sizes_": None, "input_split_sizes": None},
    "all_to_all_sp2hp": {"input_": ..., "group": None},
    "all_to_all_hp2sp": {"input_": ..., "group": None},
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_and_their_order(name: str) -> None:
    found = inspect.signature(getattr(m, name)).parameters.values()
    positional = {p.name: ... if p.default is p.empty else p.default for p in found if p.kind != p.KEYWORD_ONLY}
    assert list(positional.items()) == list(ARGUMENTS[name].items())


def test_no_default_group_is_an_error() -> None:
    x = torch.ones(4, 2, 8)
    for name in ARGUMENTS:
        if name == "all_to_all":
            continue
        with pytest.raises(RuntimeError, match=r"group: None is the default tensor-parallel group, and there is none"):
            getattr(m, name)(x)
    with pytest.raises(ValueError, match=r"group: expected .* got None; all_to_all has no default group"):
        m.all_to_all(None, x)


def test_other_names_say_where_to_go() -> None:
    with pytest.raises(AttributeError, match=r"for ColumnParallelLinear use seqpar_kernels\.nn\.ColumnParallelLinear"):
        m.ColumnParallelLinear  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        m.nonsense  # noqa: B018


def _grad(f: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def _all(x: Tensor) -> list[Tensor]:

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def _gather(args: tuple[Any, ...], options: dict[str, Any], x: Tensor) -> Tensor:
    return m.gather_from_sequence_parallel_region(x, *args, **options)


def mappings_case() -> None:
    g, t, r = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert g is not None
    torch.manual_seed(10 + r)
    x, wide = torch.randn(4, 2, 8), torch.randn(4 * t, 2, 8)
    xs, wides = _all(x), _all(wide)
    m.set_default_group(g)
    try:
        # Megatron's own calls: positional, by keyword, default group
        for grad_is_partial, args, options in (
            (True, (), {}), (False, (False,), {}), (False, (False, g), {}), (True, (), {"group": None}),
            (True, (), {"group": g, "use_global_buffer": True}), (True, (g,), {}),
            (False, (), {"tensor_parallel_output_grad": False, "group": g}),
        ):  # fmt: skip
            y, dx = _grad(functools.partial(_gather, args, options), x, wide)
            assert torch.equal(y, torch.cat(xs))
            mine = slice(4 * r, 4 * r + 4)
            torch.testing.assert_close(dx, sum(w[mine] for w in wides) if grad_is_partial else wide[mine])
        y, dx = _grad(m.reduce_scatter_to_sequence_parallel_region, wide, x)
        torch.testing.assert_close(y, sum(w[4 * r : 4 * r + 4] for w in wides))
        assert torch.equal(dx, torch.cat(xs))
        y, dx = _grad(m.scatter_to_sequence_parallel_region, wides[0], x)
        assert torch.equal(y, wides[0][4 * r : 4 * r + 4]) and torch.equal(dx, torch.cat(xs))
        long = torch.randn(4, 2, 8 * t)
        y, dx = _grad(m.all_gather_last_dim_from_tensor_parallel_region, x, long)
        assert torch.equal(y, torch.cat(xs, -1))
        torch.testing.assert_close(dx, sum(v[..., 8 * r : 8 * r + 8] for v in _all(long)))
        y, dx = _grad(m.reduce_scatter_last_dim_to_tensor_parallel_region, long, x)
        torch.testing.assert_close(y, sum(v[..., 8 * r : 8 * r + 8] for v in _all(long)))
        assert torch.equal(dx, torch.cat(xs, -1))
        y, dx = _grad(m.reduce_from_tensor_model_parallel_region, x, x)
        torch.testing.assert_close(y, sum(xs))
        assert torch.equal(dx, x)
        torch.testing.assert_close(_grad(m.copy_to_tensor_model_parallel_region, x, x)[1], sum(xs))
    finally:
        m.set_default_group(None)
    with pytest.raises(RuntimeError, match="there is none"):
        m.copy_to_tensor_model_parallel_region(x)


@pytest.mark.filterwarnings("ignore:gather_sequence")
def test_mappings(world: World) -> None:
    world.run(mappings_case)


def sizes_case() -> None:
    g, t, r = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    sizes = [3, 0, 5, 1][:t]
    torch.manual_seed(r)
    x, whole = torch.randn(sizes[r], 2), torch.randn(sum(sizes), 2)
    wholes, start = _all(whole), sum(sizes[:r])
    y, dx = _grad(lambda v: m.gather_from_sequence_parallel_region(v, True, g, sizes), x, whole)
    assert torch.equal(y, torch.cat(_all(x)))
    torch.testing.assert_close(dx, sum(w[start : start + sizes[r]] for w in wholes) + torch.zeros_like(x))
    y, dx = _grad(lambda v: m.reduce_scatter_to_sequence_parallel_region(v, g, sizes), whole, x)
    torch.testing.assert_close(y, sum(w[start : start + sizes[r]] for w in wholes) + torch.zeros_like(x))
    assert torch.equal(dx, torch.cat(_all(x)))
    with pytest.raises(ValueError, match=f"output_split_sizes: expected {t} sizes, one for each rank"):
        m.gather_from_sequence_parallel_region(x, True, g, [*sizes, 1])
    with pytest.raises(ValueError, match="input_split_sizes: expected a sum of"):
        m.reduce_scatter_to_sequence_parallel_region(whole[1:], g, sizes)
    # integers: communicated, without gradient
    ids = torch.arange(4) + 10 * r
    assert torch.equal(m.gather_from_sequence_parallel_region(ids, group=g), torch.cat(_all(ids)))
    mask = torch.arange(8).view(4, 2) % 3 == r
    assert torch.equal(m.gather_from_sequence_parallel_region(mask, group=g), torch.cat(_all(mask)))
    assert torch.equal(m.reduce_from_tensor_model_parallel_region(ids, g), sum(_all(ids)))
    total = sum(_all(torch.arange(4 * t) + r))
    scattered = m.reduce_scatter_to_sequence_parallel_region(torch.arange(4 * t) + r, g)
    assert torch.equal(scattered, total[4 * r : 4 * r + 4])
    tokens = torch.arange(8 * t).view(4 * t, 2)
    assert torch.equal(m.scatter_to_sequence_parallel_region(tokens, g), tokens[4 * r : 4 * r + 4])
    assert torch.equal(m.copy_to_tensor_model_parallel_region(tokens, g), tokens)
    with pytest.raises(ValueError, match=r"expected numbers to sum over ranks, got torch\.bool"):
        m.reduce_from_tensor_model_parallel_region(mask, g)


@pytest.mark.filterwarnings("ignore:gather_sequence")
def test_sizes_and_integers(world: World) -> None:
    world.run(sizes_case)


def all_to_all_case() -> None:
    g, t, r = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    torch.manual_seed(r)
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = torch.randn(3, 2, 4 * t).to(dtype), torch.randn(6 * t, 4).to(dtype)
        xs, dys = (_all(v) for v in (x, dy))
        y, dx = _grad(lambda v: m.all_to_all_sp2hp(v, g), x, dy)
        assert torch.equal(y, torch.cat([v.reshape(6, -1)[:, 4 * r : 4 * r + 4] for v in xs]))
        assert torch.equal(dx, torch.cat([v[6 * r : 6 * r + 6] for v in dys], -1).view_as(x))
        back, _ = _grad(lambda v: m.all_to_all_hp2sp(v, g), y, dx.reshape(6, -1))
        assert torch.equal(back, x.reshape(6, -1))
    counts = torch.arange(t * t).view(t, t) % 3  # [sender, receiver]
    inputs, outputs = counts[r].tolist(), counts[:, r].tolist()
    x = torch.randn(sum(inputs), 2)
    y, dx = _grad(lambda v: m.all_to_all(g, v, outputs, inputs), x, torch.ones(sum(outputs), 2))
    expected = [v.split(counts[s].tolist())[r] for s, v in enumerate(_all(x))]
    assert torch.equal(y, torch.cat(expected)) and torch.equal(dx, torch.ones_like(x))
    flags = torch.arange(2 * t) % 2 == 0
    assert m.all_to_all(g, flags).dtype == torch.bool
    with pytest.raises(RuntimeError, match="output_split_sizes: rank 0 expects 9 rows from rank 0"):
        m.all_to_all(g, x, [9, *outputs[1:]] if r == 0 else outputs, inputs)
    with pytest.raises(ValueError, match="input_: expected dimension 0 to be a multiple"):
        m.all_to_all(g, torch.ones(t + 1, 2))
    assert torch.equal(m.all_to_all(g, x, outputs, inputs), y)  # and the group lives on


def test_all_to_all(world: World) -> None:
    world.run(all_to_all_case)


def trap_case() -> int:
    g, t = dist.group.WORLD, dist.get_world_size()
    assert g is not None
    group = other = g
    doubled._of(g).left = 4  # looked at afresh, whatever ran on this group before
    torch.manual_seed(0)
    x, w = torch.randn(1, 4 * t, 3, requires_grad=True), torch.randn(1, 4 * t, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tensor_parallel in (False, True):
            shard = sp.scatter_sequence(x, group)
            whole = sp.gather_sequence(shard, group, tensor_parallel_output_grad=tensor_parallel)
            (dx,) = torch.autograd.grad((whole * w).sum(), x)
            torch.testing.assert_close(dx, w * (t if tensor_parallel else 1))
            said = [str(c.message) for c in caught if "tensor_parallel_output_grad=False" in str(c.message)]
            assert len(said) == tensor_parallel, said
        # what is tensor-parallel behind the gather has other gradients on every rank, and is not warned of
        doubled._of(g).left = 4
        whole = sp.gather_sequence(sp.scatter_sequence(x, other), other)
        (whole * w * (1 + dist.get_rank())).sum().backward()
    return sum("tensor_parallel_output_grad=False" in str(c.message) for c in caught)


def test_a_gradient_summed_that_was_whole_is_warned_of(world2: World) -> None:
    assert world2.run(trap_case) == [1, 1]
