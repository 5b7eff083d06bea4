"""Tells Accelerate, and Transformers' ``Trainer``, which ranks hold a parallelized model.

The package does not import this module, because it needs Accelerate.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import recursively_apply
from torch import nn
from torch.distributed.tensor import DTensor

from ..conversion import Conversion, conversion_of
from ..state import full_state_dict
from .same_order import same_order


def parallelism_config(model: nn.Module) -> ParallelismConfig | None:
    """The value for ``Accelerator`` or ``TrainingArguments(parallelism_config=...)``; None on one rank.

    The ranks that share ``model`` by :func:`parallelize` get the same batches in the order of rank 0, also from a
    loader that shuffles and with different seeds. All other ranks are data parallel. Over those ``fully_shard`` must
    have been applied to ``model``, on a mesh whose last dimension is the tensor-parallel one::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "tp"))
        parallelize(model, mesh["tp"])
        for block in model.model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])

    The configuration also works on CPU ranks. With it ``gather_for_metrics`` returns each row once. It refuses to
    dispatch batches from rank 0 where all data-parallel ranks would get the same ones. The number of ranks is set on
    ``model`` where Trainer and Accelerate read it.

    Raises:
        ValueError: ``model`` has not been parallelized, or its ranks are not those, in the order, for which Accelerate
            hands out batches.
    """
    tensor_parallel = conversion_of(model).batch_ranks  # context parallelism takes one batch on all its ranks, too
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return None
    if tensor_parallel == 1:
        raise ValueError(
            f"model: expected one that parallelize has cut over several of the {world} ranks, got one that is whole on "
            "each; Accelerate's own data parallelism is for that"
        )
    if world % tensor_parallel:
        raise ValueError(f"model: expected a divisor of the {world} ranks to share it, got {tensor_parallel} ranks")
    data_parallel = world // tensor_parallel
    _check_ranks(model, data_parallel, tensor_parallel)
    told: Any = model
    if hasattr(model, "save_pretrained"):
        told._fsdp_size = data_parallel
    elif getattr(model, "tp_size", None) is None:
        told.tp_size = tensor_parallel
    if data_parallel > 1:  # fully_shard renames the class, by whose name Trainer decides whether labels are shifted
        told._get_name = functools.partial(str, type(model).__name__.removeprefix("FSDP"))
    return _OverRanks(dp_shard_size=data_parallel, tp_size=tensor_parallel)


def _check_ranks(model: nn.Module, data_parallel: int, tensor_parallel: int) -> None:
    """Refuse other meshes than Accelerate assumes: rank r gets batch r // tensor_parallel."""
    grid = torch.arange(data_parallel * tensor_parallel).view(data_parallel, tensor_parallel)
    mine = dist.get_rank() % tensor_parallel
    # Parameters added after parallelize (adapters) are on fully_shard's mesh only.
    right = [grid, grid[:, mine]] if data_parallel > 1 else [grid[0]]
    inner = conversion_of(model).region.ranks
    if inner < tensor_parallel:  # the mesh is (..., cp, tp): fully_shard is over all but the last
        rows = grid.view(-1, inner)
        right = [rows, rows[:, dist.get_rank() % inner], rows[dist.get_rank() // inner]]
    for name, param in model.named_parameters():
        if not isinstance(param, DTensor):
            if data_parallel > 1:
                raise ValueError(
                    f"model: expected fully_shard on all of it over the {data_parallel} data-parallel ranks, "
                    f"got {name} without"
                )
            continue
        ranks = param.device_mesh.mesh.cpu()
        if any(torch.equal(ranks, expected) for expected in right):
            continue
        if data_parallel > 1 and ranks.dim() == 1:
            raise ValueError(
                f"model: expected fully_shard over the other {data_parallel} of {grid.numel()} ranks before a training "
                f"loop gets it, got {name} on ranks {ranks.tolist()} alone"
            )
        raise ValueError(
            f"model: expected the ranks of its mesh to be {right[0].tolist()}, tensor parallel last, as batches are "
            f"handed out; got {name} on {ranks.tolist()}"
        )


class _OverRanks(ParallelismConfig):
    """Accelerate's configuration, also valid on CPU ranks, for groups of ranks that compute one batch together."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep ``dp_shard_size`` as constructed: Trainer of Transformers 5.23 overwrites it with its own guess."""
        if name != "dp_shard_size" or vars(self).get(name) is None:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave process groups out: Trainer pickles its arguments with each checkpoint."""
        return {name: value for name, value in self.__dict__.items() if name != "device_mesh"}

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)
        elif self.total_size != accelerator.num_processes:
            raise ValueError(
                f"parallelism_config: expected {self.total_size} ranks, as the model lies on, got "
                f"{accelerator.num_processes}"
            )
        accelerator.get_state_dict = functools.partial(_get_state_dict, accelerator)
        group = self.device_mesh["dp_shard"].get_group() if self.dp_shard_enabled else None
        accelerator.gather_for_metrics = functools.partial(_gather_for_metrics, accelerator, group)
        accelerator.prepare_data_loader = functools.partial(_prepare_data_loader, accelerator, self.dp_shard_enabled)


def _get_state_dict(accelerator: Accelerator, model: Any, unwrap: bool = True) -> dict[str, Any]:
    """Accelerate's ``get_state_dict``. For a parallelized model: whole tensors on every rank, a collective call."""
    inner = accelerator.unwrap_model(model)
    if isinstance(getattr(inner, "_seqpar", None), Conversion):
        return full_state_dict(inner)
    return Accelerator.get_state_dict(accelerator, model, unwrap)


def _gather_for_metrics(
    accelerator: Accelerator, group: dist.ProcessGroup | None, input_data: Any, use_gather_object: bool = False
) -> Any:
    """``gather_for_metrics`` over the data-parallel ranks. Accelerator's own repeats each row for every rank."""
    if not use_gather_object:
        try:
            recursively_apply(lambda x: x, input_data, error_on_other_type=True)
        except TypeError:
            use_gather_object = True
    state = accelerator.gradient_state
    # Accelerate pads the last batch where it does not divide. The remainder is -1 for a data set without length.
    rows = slice(state.remainder if state.end_of_dataloader and state.remainder > 0 else None)
    if use_gather_object:
        return _all_objects(input_data, group)[rows]
    return recursively_apply(lambda x: _all_rows(x, group)[rows], input_data)


def _all_objects(objects: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return list(objects)
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, objects, group=group)
    return [entry for entries in found for entry in entries]


def _all_rows(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    rows = rows.reshape(1) if rows.dim() == 0 else rows.contiguous()
    if group is None:
        return rows
    found = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(found, rows, group=group)
    return torch.cat(found)


def _prepare_data_loader(
    accelerator: Accelerator,
    data_parallel: bool,
    data_loader: Any,
    device_placement: bool | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    placed = accelerator.device_placement if device_placement is None else device_placement
    dispatched = accelerator.dispatch_batches
    if dispatched is None:
        dispatched = placed and isinstance(data_loader.dataset, torch.utils.data.IterableDataset)
    if dispatched and data_parallel:
        raise ValueError(
            "dispatch_batches: expected False with data-parallel and tensor-parallel ranks (accelerator_config="
            "{'dispatch_batches': False} of TrainingArguments, DataLoaderConfiguration of Accelerate), got "
            f"{accelerator.dispatch_batches} with a {type(data_loader.dataset).__name__}: Accelerate would give every "
            "rank the same batches"
        )
    prepared = Accelerator.prepare_data_loader(accelerator, data_loader, device_placement, *args, **kwargs)
    if not dispatched:
        same_order(prepared, accelerator.device)
    return prepared
