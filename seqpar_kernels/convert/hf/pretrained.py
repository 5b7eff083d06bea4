"""What Transformers, Accelerate and peft ask of a model, answered for one that lies on several ranks."""

from __future__ import annotations

import functools
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from ..conversion import Conversion
from .save_pretrained import save_from_one_rank


def answer_for_ranks(conversion: Conversion) -> None:
    """Answer Transformers and Accelerate for a model on several ranks."""
    if conversion.mesh is not None:
        describe_ranks(conversion.model, conversion.mesh)


def describe_ranks(model: Any, mesh: DeviceMesh) -> None:
    """Make ``Trainer`` and ``Accelerator`` take the ranks of ``mesh`` for what they are, and ``save_pretrained`` whole.

    Transformers' own attributes of a model that it has cut: with them every rank is given the same batches, the loss is
    not averaged over ranks that hold the same one, and nothing is wrapped in DistributedDataParallel.
    """
    if not hasattr(model, "save_pretrained"):
        return
    model._tp_size, model._device_mesh = mesh.size(), mesh
    model._is_distributed_loading_by_transformers = True  # what Trainer asks since Transformers 5.19
    _describe(model)
    save_from_one_rank(model, mesh)
    if hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings = functools.partial(_refuse_to_resize, model.resize_token_embeddings)


def _refuse_to_resize(
    resize: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    if new_num_tokens is None and pad_to_multiple_of is None:  # asks for the embedding
        return resize(None, None, *args, **kwargs)
    raise ValueError(
        f"resize_token_embeddings: expected a model that has not been parallelized, got new_num_tokens="
        f"{new_num_tokens}: the parameters of a parallelized one cannot be replaced; resize first, then parallelize"
    )


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
