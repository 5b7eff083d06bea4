"""Files of a converted model: who writes ``save_pretrained``, what ``torch.save`` writes and ``torch.load`` reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, llama

SEVERAL_FILES = {"max_shard_size": "10KB"}


def reads_back(folder: str, expected: nn.Module) -> None:
    files = [name for name in os.listdir(folder) if not name.startswith(".")]
    assert any(name.endswith(".safetensors") for name in files), files
    plain = type(expected).from_pretrained(folder)
    for (name, got), want in zip(plain.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, want), name


def second_group_case(kind: str, folder: str) -> None:
    """A model on ranks 0 and 1, another on 2 and 3; each is saved by its own ranks."""
    row = dist.get_rank() // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, first = groups[row], dist.get_rank(groups[row]) == 0
    make = MODELS[kind]
    whole = make(n_layer=3) if kind == "gpt2" and row else make()
    model = sp.parallelize(make(n_layer=3) if kind == "gpt2" and row else make(), mine)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "several files": SEVERAL_FILES,
        "main": {"is_main_process": first},
        "other main": {"is_main_process": not first},
        "all main": {"is_main_process": True},
        "listed": {"state_dict": model.state_dict()},
    }
    for way, options in ways.items():
        model.save_pretrained(f"{folder}/{row}/{way}", **options)
        reads_back(f"{folder}/{row}/{way}", whole)
    state = sp.full_state_dict(model)
    if first:  # no collective call
        model.save_pretrained(f"{folder}/{row}/state", state_dict=dict(state))
        reads_back(f"{folder}/{row}/state", whole)
    else:
        model.save_pretrained(f"{folder}/{row}/main state", True, dict(state))
        reads_back(f"{folder}/{row}/main state", whole)
    with pytest.raises(ValueError, match=rf"expected True on one of the ranks \[{2 * row}, {2 * row + 1}\], .* False"):
        model.save_pretrained(f"{folder}/{row}/nobody", is_main_process=False)


@pytest.mark.parametrize("kind", MODELS)
def test_each_group_saves_its_own_model(world4: World, tmp_path: Path, kind: str) -> None:
    world4.run(second_group_case, kind, str(tmp_path))


def mesh_case(folder: str) -> None:
    """Rows that hold the same model save it to one folder, or row by row; fully_shard makes them one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row = mesh["dp"].get_local_rank()
    model = sp.parallelize(llama(), mesh["tp"])
    for number in range(3):
        model.save_pretrained(f"{folder}/together", **(SEVERAL_FILES if number == 0 else {}))
        reads_back(f"{folder}/together", llama())
    model.save_pretrained(f"{folder}/{row}", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    assert os.path.exists(f"{folder}/0/model.safetensors") and not os.path.exists(f"{folder}/1/model.safetensors")
    assert not [name for name in os.listdir(f"{folder}/together") if "-of-" in name or name.startswith(".")]
    model = sp.parallelize(llama(), mesh["tp"])
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    for way, options in {"plain": {}, "main": {"is_main_process": dist.get_rank() == 2}}.items():
        model.save_pretrained(f"{folder}/sharded {way}", **options)
        reads_back(f"{folder}/sharded {way}", llama())
    with pytest.raises(ValueError, match=r"expected True on one of the ranks \[0, 1, 2, 3\]"):
        model.save_pretrained(f"{folder}/nobody", is_main_process=False)


def test_rows_of_a_mesh_and_fully_shard(world4: World, tmp_path: Path) -> None:
    world4.run(mesh_case, str(tmp_path))
