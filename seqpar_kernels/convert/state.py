"""Parameters, gradients and optimizer state of a parallelized model: whole, or sharded for a checkpoint.

``model.state_dict()`` holds DTensors. ``model.load_state_dict`` takes those, or the whole tensors of a plain
checkpoint. The functions here return whole tensors, and state dicts for ``torch.distributed.checkpoint``, which saves
them on any number of ranks and loads them on any other. Of a packed projection (q|k|v) a rank holds several rectangles,
which a plain DTensor cannot describe.
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
        if tensor.device_mesh.ndim == 2:  # of fully_shard: first gather this rank's part of the whole
            names = tensor.device_mesh.mesh_dim_names or ()
            mesh = tensor.device_mesh[names[0]]
            shape = cut.part_shape()
            rows = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=part.stride())
            part = rows.full_tensor()
    if cut is None or cut.spec is None or group is None:
        return part.detach().clone()
    return full_tensor(part, cut.spec, group)


@torch.no_grad()
def gather_full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """{parameter name: whole gradient} on every rank; parameters without a gradient are left out. A collective call.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16))
        >>> model = sp.parallelize(model, None, {"0": "scatter_input+norm+gather_output"})
        >>> model(torch.randn(2, 8, 16)).sum().backward()
        >>> {name: tuple(gradient.shape) for name, gradient in sp.gather_full_gradients(model).items()}
        {'0.weight': (16,), '0.bias': (16,)}
    """
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

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16))
        >>> model = sp.parallelize(model, None, {"0": "scatter_input+norm+gather_output"})
        >>> list(sp.full_state_dict(model))
        ['0.weight', '0.bias']
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
    """``model.state_dict()`` for ``torch.distributed.checkpoint``, to ``save``, or to ``load`` into, in place.

    Examples:
        >>> import tempfile, torch, seqpar_kernels as sp
        >>> from torch.distributed import checkpoint
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16))
        >>> model = sp.parallelize(model, None, {"0": "scatter_input+norm+gather_output"})
        >>> folder = tempfile.mkdtemp()
        >>> saved = checkpoint.save(sp.sharded_state_dict(model), checkpoint_id=folder)
        >>> checkpoint.load(sp.sharded_state_dict(model), checkpoint_id=folder)  # loads into the parameters
    """
    cuts = conversion_of(model).cuts
    return {
        name: for_checkpoint(tensor, cuts[name]) if name in cuts and isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def sharded_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of ``optimizer`` by parameter name, for ``torch.distributed.checkpoint``.

    If the optimizer has no state yet, a step that changes nothing creates it, to load a checkpoint into.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16))
        >>> model = sp.parallelize(model, None, {"0": "scatter_input+norm+gather_output"})
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sorted(sp.sharded_optimizer_state_dict(model, optimizer)["state"]["0.weight"])
        ['exp_avg', 'exp_avg_sq', 'step']
    """
    cuts = conversion_of(model).cuts
    found: Any = get_optimizer_state_dict(model, optimizer)
    for name, entry in found["state"].items():
        for key, value in entry.items():
            if name in cuts and isinstance(value, DTensor) and value.shape == cuts[name].shape:
                entry[key] = for_checkpoint(value, cuts[name])
    return found


def load_sharded_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> None:
    """Load a :func:`sharded_optimizer_state_dict`, read by ``torch.distributed.checkpoint``, into ``optimizer``.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16))
        >>> model = sp.parallelize(model, None, {"0": "scatter_input+norm+gather_output"})
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> state = sp.sharded_optimizer_state_dict(model, optimizer)  # checkpoint.load(state, ...) fills it
        >>> sp.load_sharded_optimizer_state_dict(model, optimizer, state)
    """
    state: Any = {
        name: {
            key: DTensor(value._local_tensor, value._spec, requires_grad=False)
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

    A collective call. Hooks and modules that were added after :func:`parallelize`, and gradients, are lost. Build a new
    optimizer afterwards.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has not been parallelized, or fully_shard has been applied to it since.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> plan = {"0": "scatter_input+norm", "1": "colwise", "3": "rowwise+gather_output"}
        >>> model = torch.nn.Sequential(
        ...     torch.nn.LayerNorm(16), torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)
        ... )
        >>> type(sp.parallelize(model, None, plan)[1]).__name__
        'ColumnParallelLinear'
        >>> type(sp.unparallelize(model)[1]).__name__
        'Linear'
    """
    conversion = conversion_of(model)
    if any(hasattr(module, "unshard") for module in model.modules()):
        raise ValueError("model: expected no fully_shard on it; load full_state_dict(model) into a plain model instead")
    assert conversion.undo is not None
    conversion.undo.restore(model, full_state_dict(model))
    if conversion.context is not None:
        conversion.context.undo()
    return model
