"""Parameters, gradients and optimizer state of a parallelized model: whole, or sharded for a checkpoint.

``model.state_dict()`` holds DTensors, ``model.load_state_dict`` takes those or the whole tensors of a plain checkpoint.
The functions here give whole tensors, and state dicts that ``torch.distributed.checkpoint`` saves on any number of
ranks and loads on any other, also of packed projections (q|k|v), of which a rank holds several rectangles, which a
DTensor alone cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, Shard

from ..nn.sharding import full_tensor
from .conversion import conversion_of
from .cut import Cut
from .cut_tensor import CutTensor, for_checkpoint

ModelT = TypeVar("ModelT", bound=nn.Module)


def _whole(tensor: Tensor, cut: Cut | None, group: Any) -> Tensor:
    """The whole of a listed parameter, its gradient, or a buffer."""
    if isinstance(tensor, DTensor) and cut is None:
        return tensor.full_tensor().detach()
    part = tensor
    if isinstance(tensor, DTensor) and cut is not None:
        part = tensor._local_tensor
        if tensor.device_mesh.ndim == 2:  # fully_shard's: first this rank's part of the whole
            mesh = tensor.device_mesh[tensor.device_mesh.mesh_dim_names[0]]  # type: ignore[index]
            shape = cut.part_shape()
            rows = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=part.stride())
            part = rows.full_tensor()
    if cut is None or cut.spec is None or group is None:
        return part.detach().clone()
    return full_tensor(part, cut.spec, group)


@torch.no_grad()
def gather_full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """{parameter name: whole gradient} on every rank; parameters without a gradient are left out. A collective call."""
    conversion = conversion_of(model)
    full = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            full[name] = _whole(param.grad, conversion.cuts.get(name), conversion.region.group)
    return full


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the model before conversion, on every rank. A collective call.

    What ``save_pretrained(..., state_dict=...)`` and ``safetensors.torch.save_file`` take.
    """
    conversion = conversion_of(model)
    group, cuts = conversion.region.group, conversion.cuts
    return {name: _whole(tensor, cuts.get(name), group) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def whole_tensors(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` of a parallelized model with whole tensors in place of DTensors. A collective call."""
    conversion = conversion_of(model)
    group, cuts = conversion.region.group, conversion.cuts
    return {n: _whole(t, cuts.get(n), group) if isinstance(t, DTensor) else t for n, t in state_dict.items()}


def sharded_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` for ``torch.distributed.checkpoint``: ``save`` it, or ``load`` into it, in place."""
    cuts = conversion_of(model).cuts
    return {
        name: for_checkpoint(tensor, cuts[name]) if name in cuts and isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def sharded_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of ``optimizer`` by parameter name, for ``torch.distributed.checkpoint``.

    Where the optimizer has none yet it is created (by a step that changes nothing), so that it can be loaded into.
    """
    cuts = conversion_of(model).cuts
    found: Any = get_optimizer_state_dict(model, optimizer)
    for name, entry in found["state"].items():
        for key, value in entry.items():
            if name in cuts and isinstance(value, DTensor) and value.shape == cuts[name].shape:
                entry[key] = for_checkpoint(value, cuts[name])
    return found  # type: ignore[no-any-return]


def load_sharded_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> None:
    """Give ``optimizer`` what :func:`sharded_optimizer_state_dict` gave and ``torch.distributed.checkpoint`` loaded."""
    state: Any = {
        name: {
            key: DTensor(value._local_tensor, value._spec, requires_grad=False)  # type: ignore[call-arg]
            if isinstance(value, CutTensor)
            else value
            for key, value in entry.items()
        }
        for name, entry in state_dict["state"].items()
    }
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": state_dict["param_groups"]})


@torch.no_grad()
def unparallelize(model: ModelT) -> ModelT:
    """Make a parallelized model the plain model again, in place, with gathered weights on every rank.

    A collective call. Hooks and modules that were added after :func:`parallelize` are gone, gradients too, and an
    optimizer has to be built anew.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has not been parallelized, or fully_shard has been applied to it since.
    """
    conversion = conversion_of(model)
    if any(hasattr(module, "unshard") for module in model.modules()):
        raise ValueError("model: expected no fully_shard on it; load full_state_dict(model) into a plain model instead")
    assert conversion.snapshot is not None
    conversion.snapshot.restore(model, full_state_dict(model))
    if conversion.context is not None:
        conversion.context.undo()
    return model
