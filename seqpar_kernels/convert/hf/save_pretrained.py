"""``save_pretrained`` of a model that lies on several ranks: gathered by all of them, written by one."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..state import full_state_dict, whole_tensors

_NUMBERED = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")


def save_from_one_rank(model: Any, mesh: DeviceMesh) -> None:
    """Replace ``save_pretrained`` of ``model``, and of the models of Transformers' inside it.

    Transformers' own writes on rank 0 of the world and nowhere else, and cannot write what lies on several ranks.
    ``mesh``: the one that the model lies on.
    """
    for name, module in model.named_modules():
        if hasattr(module, "save_pretrained"):
            _replace(module, model, f"{name}." if name else "", mesh)


def _replace(model: Any, whole: Any, prefix: str, mesh: DeviceMesh) -> None:
    """``model`` is all of the parallelized model ``whole``, or what its names with ``prefix`` are of.

    ``mesh`` is the one that the model lies on. Where it is a row of a larger mesh, other rows may hold the same model
    and save it to the same folder: each file is then put there as a whole.
    """
    save = model.save_pretrained
    writes = False  # in the call under way

    def should_save_on_this_rank(is_main_process: bool = True) -> bool:
        """In place of Transformers': the ranks of a model, not those of the world, settle who writes."""
        return writes

    @functools.wraps(save)
    def save_pretrained(
        save_directory: Any, is_main_process: bool | None = None, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Write the plain checkpoint of the whole model, from the first rank that holds it.

        Without ``state_dict``, or with one of DTensors, a collective call of all ranks that hold the model: the weights
        are gathered. With whole tensors each rank calls for itself.

        Args:
            save_directory: the folder.
            is_main_process: False keeps a rank from writing. None: True on the first rank that holds the model, and on
                others where no such rank is called (``state_dict`` of whole tensors).
            state_dict: whole tensors, or DTensors such as ``model.state_dict()``; None: the model's weights.

        Raises:
            ValueError: ``is_main_process`` is False on all ranks that hold the model, and their mesh is not the row of
                a larger one, of which another may write.
            RuntimeError: nothing has been written.
        """
        nonlocal writes
        groups = _groups_of(model, mesh.get_group())
        in_rows = len(groups) == 1 and _is_row(mesh)
        collective = state_dict is None or any(isinstance(value, DTensor) for value in state_dict.values())
        if collective:
            writes = _chosen(groups, is_main_process, in_rows)
            if state_dict is None:
                state_dict = full_state_dict(whole)
            else:
                state_dict = whole_tensors(whole, {prefix + name: value for name, value in state_dict.items()})
            inside = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
            state_dict = {name.removeprefix(prefix): value for name, value in inside.items()}
        else:
            first = all(dist.get_rank(g) == 0 for g in groups)
            writes = first if is_main_process is None else bool(is_main_process)
        try:
            if writes and in_rows and not kwargs.get("push_to_hub"):
                _save_aside(save, save_directory, state_dict, *args, **kwargs)
            else:
                save(save_directory, writes, state_dict, *args, **kwargs)
        finally:
            written, writes = writes, False
        if written and not kwargs.get("distributed_checkpoint") and not _weights_in(save_directory):
            raise RuntimeError(
                f"save_pretrained: {type(model).__name__} wrote no weights to {os.fspath(save_directory)!r} on rank "
                f"{dist.get_rank()}, which was to; save full_state_dict(model) with safetensors.torch.save_file"
            )
        if collective:
            for g in groups:  # nobody reads what is not there yet
                dist.barrier(g)

    model.save_pretrained = save_pretrained
    model.should_save_on_this_rank = should_save_on_this_rank


def _groups_of(model: Any, group: ProcessGroup) -> list[ProcessGroup]:
    """The ranks that hold ``model``: its own group, and fully_shard's across."""
    listed = next(model.parameters())
    if isinstance(listed, DTensor) and listed.device_mesh.ndim > 1:
        return [group, listed.device_mesh.get_group(0)]
    return [group]


def _is_row(mesh: DeviceMesh) -> bool:
    """Whether ``mesh`` is part of a mesh of more ranks."""
    root: Any = getattr(mesh, "_get_root_mesh", lambda: mesh)()
    return bool(root.mesh.numel() > mesh.mesh.numel())


def _save_aside(save: Any, save_directory: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
    """``save`` beside the folder, then each file moved into it: nobody sees half of one, whoever else moves his."""
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        save(aside, True, state_dict, *args, **kwargs)
        new = {path.name: path for path in Path(aside).iterdir()}
        for name, path in new.items():
            os.replace(path, folder / name)
    for path in folder.iterdir():  # of an earlier save in more files
        if _NUMBERED.fullmatch(path.name) and path.name not in new:
            path.unlink(missing_ok=True)


def _chosen(groups: list[ProcessGroup], is_main_process: bool | None, in_rows: bool) -> bool:
    """Whether this rank is the first of those that ``is_main_process`` does not keep from writing."""
    wanted = [(dist.get_rank(), is_main_process is None or bool(is_main_process))]
    for group in groups:
        found: list[Any] = [None] * group.size()
        dist.all_gather_object(found, wanted, group=group)
        wanted = sorted({entry for entries in found for entry in entries})
    mains = [rank for rank, main in wanted if main]
    if not mains and in_rows:
        return False
    if not mains:
        ranks = [rank for rank, _ in wanted]
        raise ValueError(
            f"is_main_process: expected True on one of the ranks {ranks}, which hold this model, got False on all: "
            "nothing would be written. Leave it out, and the first of them writes"
        )
    return mains[0] == dist.get_rank()


def _weights_in(folder: Any) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in Path(folder).iterdir())
