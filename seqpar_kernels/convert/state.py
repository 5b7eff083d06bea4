"""Whole parameters and gradients of a parallelized model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.sharding import ShardSpec, full_tensor
from .parallelize import conversion_of


def _specs(model: nn.Module) -> dict[int, ShardSpec]:
    """id(parameter) -> how it is cut."""
    specs = {}
    for module in model.modules():
        for name, spec in getattr(module, "sharded", {}).items():
            param = getattr(module, name)
            if param is not None:
                specs[id(param)] = spec
    return specs


@torch.no_grad()
def gather_full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """{parameter name: whole gradient} on every rank; parameters without a gradient are left out. A collective call."""
    group, specs = conversion_of(model).region.group, _specs(model)
    full = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            spec = specs.get(id(param))
            full[name] = param.grad.clone() if spec is None else full_tensor(param.grad, spec, group)
    return full


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the model before conversion, on every rank. A collective call."""
    group, specs = conversion_of(model).region.group, _specs(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    full = {}
    for name, tensor in model.state_dict().items():
        spec = specs.get(id(params[name])) if name in params else None
        full[name] = tensor.clone() if spec is None else full_tensor(tensor, spec, group)
    return full
