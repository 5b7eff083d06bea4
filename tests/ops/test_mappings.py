"""Region mappings on real ranks: values, conjugate backwards, Megatron's names."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels import functional, megatron

from ..world import World


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def mappings_case(length: int, dim: int, dtype: torch.dtype) -> None:
    g = group()
    t, rank = g.size(), g.rank()
    shape = [3, 5, 4]
    shape[dim] = length
    whole = torch.randn(shape).to(dtype)
    parts = whole.tensor_split(t, dim)
    # split <-> gather
    x = whole.clone().requires_grad_()
    y = sp.scatter_tensor_parallel(x, g, dim)
    assert torch.equal(y, parts[rank])
    (dx,) = torch.autograd.grad(y, x, parts[rank] * 2)
    assert torch.equal(dx, whole * 2)
    # gather, whole gradients: split
    p = parts[rank].detach().clone().requires_grad_()
    y = sp.gather_tensor_parallel(p, g, dim, size=length)
    assert torch.equal(y, whole)
    (dp,) = torch.autograd.grad(y, p, whole * 3)
    assert torch.equal(dp, parts[rank] * 3)
    if dim == 2:
        return
    # gather, partial gradients: reduce-scatter
    y = sp.gather_sequence(p, g, dim, seq_len=length)
    (dp,) = torch.autograd.grad(y, p, whole * 2.0**rank)
    total = sum((whole * 2.0**r).double() for r in range(t))
    torch.testing.assert_close(
        dp.double(), total.tensor_split(t, dim)[rank], rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0
    )  # type: ignore[union-attr]
    # reduce-scatter <-> gather
    x = (whole * (rank + 1)).requires_grad_()
    y = sp.reduce_scatter_sequence(x, g, dim)
    assert y.shape == parts[rank].shape
    (dx,) = torch.autograd.grad(y, x, parts[rank])
    assert torch.equal(dx, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("length", [8, 5, 2])
def test_mappings_and_their_backwards(world: World, length: int, dim: int, dtype: torch.dtype) -> None:
    world.run(mappings_case, length, dim, dtype)


def all_reduce_case(count: int) -> torch.Tensor:
    g = group()
    torch.manual_seed(g.rank())
    x = torch.randn(count, dtype=torch.bfloat16, requires_grad=True)
    y = sp.reduce_from_tensor_parallel(x, g)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y) * 5)
    assert torch.equal(dx, torch.full_like(dx, 5))
    z = sp.copy_to_tensor_parallel(x, g)
    assert torch.equal(z, x)
    (dx,) = torch.autograd.grad(z, x, torch.ones_like(z))
    assert torch.equal(dx, torch.full_like(dx, g.size()))
    return y.detach()


@pytest.mark.parametrize("count", [0, 1, 7, 100_003])
def test_all_reduce_sums_in_rank_order_in_fp32(world: World, count: int) -> None:
    results = world.run(all_reduce_case, count)
    total = torch.zeros(count)
    for rank in range(world.ranks):
        torch.manual_seed(rank)
        total = total + torch.randn(count, dtype=torch.bfloat16).float()
    for result in results:
        assert torch.equal(result, total.bfloat16())


def replicated_case() -> None:
    """16-bit gradients are summed before they are rounded; one exchange serves all parameters."""
    g = group()
    t, rank = g.size(), g.rank()
    params = [
        torch.randn(s).to(d).requires_grad_()
        for s, d in ((5, torch.bfloat16), ((2, 3), torch.float32), (4, torch.bfloat16))
    ]
    calls = []
    original = torch.ops.seqpar.sum_over_ranks.default
    import seqpar_kernels.ops.mappings as mappings

    mappings.sum_over_ranks = lambda *args: calls.append(1) or original(*args)
    try:
        out = functional.replicated(params, g)
        assert [o.dtype for o in out] == [torch.float32] * 3
        grads = [torch.full_like(o, 1 + rank * 2.0**-10) for o in out[:2]]
        torch.autograd.backward(out[:2], grads)
    finally:
        mappings.sum_over_ranks = original
    assert len(calls) == 1
    expected = sum(1 + r * 2.0**-10 for r in range(t))
    assert torch.equal(params[0].grad, torch.full((5,), expected, dtype=torch.bfloat16))
    torch.testing.assert_close(params[1].grad, torch.full((2, 3), expected))
    assert params[2].grad is None


def test_replicated_parameters_share_one_exchange(world: World) -> None:
    world.run(replicated_case)


def megatron_case() -> None:
    g = group()
    t, rank = g.size(), g.rank()
    x = torch.randn(4 * t, 2, 3)
    shard = megatron.scatter_to_sequence_parallel_region(x, g)
    assert torch.equal(shard, x.chunk(t)[rank])
    assert torch.equal(megatron.gather_from_sequence_parallel_region(shard, g), x)
    torch.testing.assert_close(megatron.reduce_scatter_to_sequence_parallel_region(x, g), shard * t)
    torch.testing.assert_close(megatron.reduce_from_tensor_model_parallel_region(x, g), x * t)
    y = torch.randn(2, 3 * t)
    part = megatron.scatter_to_tensor_model_parallel_region(y, g)
    assert torch.equal(megatron.gather_from_tensor_model_parallel_region(part, g), y)
    assert torch.equal(megatron.copy_to_tensor_model_parallel_region(y, g), y)


def test_megatron_names(world2: World) -> None:
    world2.run(megatron_case)


def subgroup_case() -> str:
    """A rank outside the group is told so; the others are not disturbed. A 1-D mesh works, a 2-D one is refused."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    t = group().size()
    sub = dist.new_group(list(range(t - 1)))
    if group().rank() == t - 1:
        with pytest.raises(ValueError, match="group: this process is not a member of the group"):
            sp.gather_sequence(torch.ones(2, 3), sub)
    else:
        assert sp.gather_sequence(torch.ones(2, 3), sub, 0).shape == (2 * (t - 1), 3)
    alone = DeviceMesh("cpu", [0], _init_backend=False) if group().rank() else None
    if alone is not None:
        with pytest.raises(ValueError, match="group: this process is not a member of the mesh"):
            sp.gather_sequence(torch.ones(2, 3), alone)
    mesh = init_device_mesh("cpu", (2, t // 2), mesh_dim_names=("dp", "tp"))
    assert sp.gather_sequence(torch.ones(2, 3), mesh["tp"], 0).shape == (t, 3)
    with pytest.raises(ValueError, match="group: expected a 1-D DeviceMesh, got one of 2 dimensions"):
        sp.gather_sequence(torch.ones(2, 3), mesh, 0)
    return "ok"


def test_subgroups_and_meshes(world4: World) -> None:
    world4.run(subgroup_case)
