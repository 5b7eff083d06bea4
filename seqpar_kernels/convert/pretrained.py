"""What Transformers, Accelerate and peft ask of a model, answered for one that lies on several ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .state import full_state_dict


def answer_for_ranks(model: Any, mesh: DeviceMesh) -> None:
    """Make ``Trainer`` and ``Accelerator`` take the ranks of ``mesh`` for what they are, and ``save_pretrained`` whole.

    Transformers' own attributes of a model that it has cut: with them every rank is given the same batches, the loss is
    not averaged over ranks that hold the same one, and nothing is wrapped in DistributedDataParallel.
    """
    if not hasattr(model, "save_pretrained"):
        return
    model._tp_size, model._device_mesh = mesh.size(), mesh
    model._is_distributed_loading_by_transformers = True  # what Trainer asks since Transformers 5.19
    _describe(model)
    save = model.save_pretrained

    @functools.wraps(save)
    def save_pretrained(
        save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """A collective call without ``state_dict``: the whole weights are put together, and rank 0 writes them."""
        collective = state_dict is None
        if collective:
            state_dict = full_state_dict(model)
        save(save_directory, is_main_process, state_dict, *args, **kwargs)
        if collective:
            dist.barrier(mesh.get_group())  # nobody reads what is not there yet
            listed = next(model.parameters())
            if isinstance(listed, DTensor) and listed.device_mesh.ndim > 1:  # fully_shard's: rank 0 is in another row
                dist.barrier(listed.device_mesh.get_group(0))

    model.save_pretrained = save_pretrained


def _describe(model: Any) -> None:
    """Give Transformers' models the description that its Trainer reads since Transformers 5.23: one that says nothing.

    It lies in the configuration, which other models may share, also whole ones, and so is never taken away. Sizes of 1
    leave those as they are; how many ranks there are Trainer learns from ``_tp_size`` and ``parallelism_config``.
    """
    if not any(kind.__module__ == "transformers.modeling_utils" for kind in type(model).__mro__):
        return
    from transformers.distributed import DistributedConfig

    if hasattr(DistributedConfig, "dp_size") and getattr(model.config, "distributed_config", None) is None:
        model.config.distributed_config = DistributedConfig(tp_size=1, fsdp_size=1)


def refuse_adapters(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Refuse peft's adapters on the modules called ``names`` and inside them; None: anywhere.

    A module of the plan is fed shards or computes this rank's features: an adapter there would get a part of its
    gradient, other on every rank. Embeddings and heads that are whole, and prompts, may be adapted.

    Raises:
        ValueError: there is one.
    """
    for name, module in model.named_modules():
        of_peft = any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
        if of_peft and (names is None or any(f"{name}.".startswith(f"{other}.") for other in names)):
            raise ValueError(
                f"{name or 'model'}: is a {type(module).__name__} of peft, and an adapter on what parallelize cuts "
                "would be trained wrongly: merge it first (merge_and_unload), or train it without parallelize"
            )
