"""The steps of a conversion that share the sequence of a Transformers model between ranks (``context_parallel``)."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from ...comm.coordination import coordination_of
from ...layout import Group, resolve_group
from ..conversion import Conversion
from ..dtensor_params import mesh_of
from ..validate import digest
from .pretrained import describe_ranks


def axes(device_mesh: Group, context_parallel: str | None) -> tuple[Group, Group]:
    """(ranks that share the sequence, ranks that share heads) of what ``parallelize`` was given.

    Raises:
        ValueError: a mesh of several dimensions that are not "cp" and "tp".
    """
    if context_parallel is None:
        return None, device_mesh
    if not isinstance(device_mesh, DeviceMesh) or device_mesh.ndim == 1:
        return device_mesh, None
    names = device_mesh.mesh_dim_names
    if names is None or sorted(names) != ["cp", "tp"]:
        raise ValueError(
            f"device_mesh: expected a ProcessGroup, a 1-D mesh, or one of the dimensions 'cp' and 'tp' with "
            f"context_parallel, got {names}; pass mesh['cp', 'tp']"
        )
    return device_mesh["cp"], device_mesh["tp"]


def find_context(conversion: Conversion) -> None:
    """Find how the model shares its sequence.

    Raises:
        ValueError: an argument that does not fit, or a model that cannot.
    """
    if conversion.context_parallel is None:
        if conversion.input_is_sharded:
            got = conversion.input_is_sharded
            raise ValueError(f"input_is_sharded: expected False without context_parallel, got {got!r}")
        return
    if conversion.loss_parallel:
        raise ValueError("loss_parallel: expected False with context_parallel, got True")
    from .context_parallel import ContextParallel  # imports Transformers

    asked = conversion.context_parallel, conversion.input_is_sharded
    conversion.context = ContextParallel(conversion.model, conversion.sharing, *asked)
    if conversion.device_mesh is None and conversion.given_plan is None:
        conversion.given_plan = {}  # modules stay as they are


def compare_contexts(conversion: Conversion) -> None:
    """Compare what the ranks that share the sequence were asked for, and their weights. A collective call."""
    group = resolve_group(conversion.sharing)
    if conversion.context is not None and group is not None:
        call = f"parallelize {type(conversion.model).__name__}, {conversion.context.describe()}"
        coordination_of(group).require(f"{call}, {digest(conversion.model)}")


def install_context(conversion: Conversion) -> None:
    """Let forwards take whole batches, and attention go over the rows of all ranks."""
    if conversion.context is None:
        return
    model: Any = conversion.model
    conversion.context.install(model, conversion.region.rank)
    group = resolve_group(conversion.sharing)
    if group is not None and conversion.region.group is None:
        describe_ranks(model, mesh_of(conversion.sharing, group, model))
    elif group is not None and hasattr(model, "_tp_size"):
        model._tp_size = conversion.batch_ranks
