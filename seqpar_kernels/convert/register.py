"""Last pass of a conversion: lists parameters as DTensors, and sets what reads, compares or initialises them."""

from __future__ import annotations

from .comparison import compare_ranks
from .conversion import Conversion
from .dtensor_params import cut_whole_tensors, cuts_of, list_as_dtensors, mesh_of, shard_specs
from .initialising import initialise_whole


def record(conversion: Conversion) -> None:
    """Store the conversion on the model, and release the parameters of modules that were replaced."""
    vars(conversion.model)["_seqpar"] = conversion
    if conversion.undo is not None:
        conversion.undo.release(conversion.model)


def list_parameters(conversion: Conversion) -> None:
    """Let ``model.parameters()`` list DTensors on the mesh."""
    model, given, group = conversion.model, conversion.device_mesh, conversion.region.group
    if group is None:
        return
    conversion.mesh = mesh_of(given, group, model)
    list_as_dtensors(model, conversion.mesh, shard_specs(model), conversion.release)
    conversion.cuts = cuts_of(model)


def compare_forwards(conversion: Conversion) -> None:
    """Compare the inputs of forwards between the ranks."""
    conversion.alike = compare_ranks(conversion.model, conversion)


def initialise_whole_tensors(conversion: Conversion) -> None:
    """Let ``reset_parameters`` and ``apply`` draw whole tensors and keep this rank's part."""
    if conversion.region.group is not None:
        initialise_whole(conversion.model, conversion.originals, conversion)


def take_whole_checkpoints(conversion: Conversion) -> None:
    """Let ``load_state_dict`` take the whole tensors of a plain checkpoint."""
    if conversion.region.group is not None:
        conversion.model.register_load_state_dict_pre_hook(cut_whole_tensors)


def remember_structure(conversion: Conversion) -> None:
    """Remember modules, hooks and forwards as the conversion leaves them."""
    if conversion.structure is not None:
        conversion.structure.remember(checked=False)
