"""DTensors, and groups that are none, refused by name in every public function and module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import seqpar_kernels as sp
from seqpar_kernels import megatron

from .world import World

H = 8


def _refused(name: str, call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor.* got a DTensor .*to_local") as caught:
        call(*args, **options)
    assert isinstance(caught.value, ValueError)  # as all errors about arguments
    return str(caught.value)


def dtensor_case() -> None:
    g = dist.group.WORLD
    assert g is not None
    mesh = init_device_mesh("cpu", (g.size(),))

    def whole(*shape: int, like: Any = None) -> Any:
        return distribute_tensor(torch.ones(*shape), mesh, [Replicate()])

    x, w, v = torch.ones(2, 4, H), torch.ones(6, H), torch.ones(H)
    dx = distribute_tensor(torch.ones(2, 4 * g.size(), H), mesh, [Shard(1)])
    dw, dv = whole(6, H), whole(H)
    norms = (sp.dropout_add_layer_norm, sp.dropout_add_rms_norm)
    for group in (g, None):
        for norm in norms:
            said = _refused("x", norm, dx, None, v, group=group)
            assert "Shard(dim=1)" in said and "(2, 8, 8)" in said
            _refused("residual", norm, x, whole(2, 4, H), v, group=group)
            _refused("weight", norm, x, None, dv, group=group)
            _refused("x_bias", norm, x, None, v, x_bias=dv, group=group)
            _refused("row_scale", norm, x, None, v, row_scale=whole(2, 4), group=group)
        _refused("x", sp.dropout_add, dx, group=group)
        _refused("x", sp.all_gather_linear, dx, w, group=group)
        sp.all_gather_linear(x, w, group=group)  # such a call is known from now on
        _refused("weight", sp.all_gather_linear, x, dw, group=group)
        _refused(r"weight\[1\]", sp.all_gather_linear, x, [w, dw], group=group)
        _refused("bias", sp.all_gather_linear, x, w, whole(6), group=group)
        _refused("x", sp.linear_reduce_scatter, dx, w, group=group)
        sp.linear_reduce_scatter(x, w, group=group)
        _refused("weight", sp.linear_reduce_scatter, x, dw, group=group)
        _refused("gate", sp.linear_reduce_scatter, x, w, group=group, activation="silu", gate=whole(2, 4, H))
        _refused("x", sp.linear_reduce_scatter_dropout_add_norm, dx, w, group=group)
        shard = 4 // g.size() if group else 4
        residual = whole(2, shard, 6)
        _refused("residual", sp.linear_reduce_scatter_dropout_add_norm, x, w, residual=residual, group=group)
        _refused("norm_weight", sp.linear_reduce_scatter_dropout_add_norm, x, w, norm_weight=whole(6), group=group)
        for mapping in (
            sp.scatter_sequence, sp.gather_sequence, sp.reduce_scatter_sequence, sp.copy_to_tensor_parallel,
            sp.reduce_from_tensor_parallel, sp.scatter_tensor_parallel, sp.gather_tensor_parallel,
        ):  # fmt: skip
            _refused("x", mapping, dx, group)
        target = torch.zeros(2, 4, dtype=torch.long)
        _refused("logits", sp.vocab_parallel_cross_entropy, dx, target, group=group)
        dtarget = distribute_tensor(target, mesh, [Replicate()])
        _refused("target", sp.vocab_parallel_cross_entropy, x, dtarget, group=group)
        _refused("ids", sp.vocab_parallel_embedding, dtarget, w, group=group)
        _refused("weight", sp.vocab_parallel_embedding, target, dw, group=group)
        _refused("x", sp.vocab_parallel_linear_cross_entropy, dx, w, target, group=group)
        for module in (
            sp.LayerNorm(H, group=group), sp.RMSNorm(H, group=group), sp.DropoutAddNorm(H, group=group),
            sp.Dropout(0.5, group=group), sp.ColumnParallelLinear(H, 4, group=group),
            sp.RowParallelLinear(H * (g.size() if group else 1), 4, group=group),
            sp.TransformerLayer(H, 2, group=group),
        ):  # fmt: skip
            _refused("x", module, dx)
    _refused("x", megatron.gather_from_sequence_parallel_region, dx, group=g)
    _refused("x", megatron.copy_to_tensor_model_parallel_region, dtarget, group=g)
    _refused("seed", sp.dropout_add, x, p=0.5, seed=distribute_tensor(torch.tensor(1), mesh, [Replicate()]))
    # All ranks refused alike, and go on.
    assert sp.gather_sequence(x, g).shape == (2, 4 * g.size(), H)
    local = sp.dropout_add_rms_norm(dx.to_local(), None, v, group=g)
    assert isinstance(local, Tensor) and local.shape == (2, 4, H)


def test_dtensors_are_refused_by_name(world2: World) -> None:
    world2.run(dtensor_case)


WRONG = {
    "False": (False, "got bool False; pass torch.distributed.group.WORLD"),
    "True": (True, "got bool True"),
    "0": (0, "got int 0"),
    "name": ("tp", r"got str 'tp'; pass that dimension of the mesh, mesh\['tp'\]"),
    "ranks": ([0, 1], r"got list \[0, 1\]; make a group of these ranks once, .*new_group"),
    "range": (range(2), "got range .*new_group"),
    "class": (object, "got type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_group(name: str) -> None:
    group, message = WRONG[name]
    x, w, v = torch.ones(2, 4, H), torch.ones(6, H), torch.ones(H)
    match = rf"^group: expected a ProcessGroup, a 1-D DeviceMesh or None, {message}"
    calls: list[Any] = [
        lambda: sp.dropout_add_rms_norm(x, None, v, group=group),
        lambda: sp.all_gather_linear(x, w, group=group),
        lambda: sp.linear_reduce_scatter(x, w, group=group),
        lambda: sp.linear_reduce_scatter_dropout_add_norm(x, w, group=group),
        lambda: sp.gather_sequence(x, group),
        lambda: sp.vocab_parallel_cross_entropy(x, torch.zeros(2, 4, dtype=torch.long), group=group),
        lambda: sp.LayerNorm(H, group=group),
        lambda: sp.ColumnParallelLinear(H, H, group=group),
        lambda: sp.TransformerLayer(H, 2, group=group),
        lambda: megatron.reduce_from_tensor_model_parallel_region(x, group),
        lambda: megatron.set_default_group(group),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=match) as caught:
            call()
        assert isinstance(caught.value, ValueError)


def mesh_case() -> None:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"group: expected a 1-D DeviceMesh, got one of 2 dimensions .*mesh\['tp'\]"):
        sp.gather_sequence(torch.ones(2, 4, H), mesh)
    assert sp.gather_sequence(torch.ones(2, 4, H), mesh["tp"]).shape == (2, 8, H)
    with pytest.raises(ValueError, match="group: this process is not a member of the group"):
        sp.gather_sequence(torch.ones(2, 4, H), dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]


def test_a_mesh_of_two_dimensions(world2: World) -> None:
    world2.run(mesh_case)
