"""Sets what Transformers and Accelerate read from a model, for one that several ranks share."""

from __future__ import annotations

import functools
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from ..conversion import Conversion
from .save_pretrained import save_from_one_rank


def answer_for_ranks(conversion: Conversion) -> None:
    """Describe the ranks to Transformers and Accelerate, where there are several."""
    if conversion.mesh is not None:
        describe_ranks(conversion.model, conversion.mesh)


def let_accelerate_hook(conversion: Conversion) -> None:
    """Allow a compiled model hooks and forwards of Accelerate (autocast), which train nothing."""
    conversion.harmless_hooks += ("accelerate.",)


def describe_ranks(model: Any, mesh: DeviceMesh) -> None:
    """Tell ``Trainer`` and ``Accelerator`` which ranks share ``model``, and let ``save_pretrained`` write it whole.

    The attributes are those that Transformers sets on a model that it has cut. With them every rank gets the same
    batches, the loss is not averaged over ranks that hold the same one, and DistributedDataParallel is not applied.
    """
    if not hasattr(model, "save_pretrained"):
        return
    model._tp_size, model._device_mesh = mesh.size(), mesh
    model._is_distributed_loading_by_transformers = True  # Trainer reads it since Transformers 5.19
    _describe(model)
    save_from_one_rank(model, mesh)
    if hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings = functools.partial(_refuse_to_resize, model.resize_token_embeddings)


def _refuse_to_resize(
    resize: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    if new_num_tokens is None and pad_to_multiple_of is None:  # a call that returns the embedding
        return resize(None, None, *args, **kwargs)
    raise ValueError(
        f"resize_token_embeddings: expected a model that has not been parallelized, got new_num_tokens="
        f"{new_num_tokens}: the parameters of a parallelized one cannot be replaced; resize first, then parallelize"
    )


def _describe(model: Any) -> None:
    """Set the ``distributed_config`` that Trainer reads since Transformers 5.23, with sizes of 1.

    Other models, also whole ones, may share the configuration. Sizes of 1 do not change them, so it is never removed.
    Trainer learns the number of ranks from ``_tp_size`` and ``parallelism_config``.
    """
    if not any(kind.__module__ == "transformers.modeling_utils" for kind in type(model).__mro__):
        return
    from transformers.distributed import DistributedConfig

    if hasattr(DistributedConfig, "dp_size") and getattr(model.config, "distributed_config", None) is None:
        model.config.distributed_config = DistributedConfig(tp_size=1, fsdp_size=1)
