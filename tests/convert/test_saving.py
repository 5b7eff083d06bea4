"""Files of a converted model: who writes ``save_pretrained``, what ``torch.save`` writes and ``torch.load`` reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, VOCAB, group, llama
from .test_pretrained import phi3
from .test_state import assert_identical
from .test_training_loops import launched

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


def file_case(kind: str, folder: str) -> None:
    """``torch.save`` of each rank's state_dict, parameters and optimizer, read by ``torch.load`` with its defaults."""
    makes = {"phi3": phi3, **MODELS}
    path = f"{folder}/{kind}{dist.get_rank()}.pt"
    ids = torch.arange(18).view(2, 9) % VOCAB
    model = sp.parallelize(makes[kind](), group(), loss_parallel=kind == "gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    whole = sp.full_state_dict(model)
    torch.save([model.state_dict(), dict(model.named_parameters()), optimizer.state_dict()], path)
    state, listed, stepped = torch.load(path)
    for name, value in state.items():
        if isinstance(value, DTensor):
            assert torch.equal(value.full_tensor(), whole[name]), name
            assert name not in listed or torch.equal(listed[name].full_tensor(), whole[name]), name
    other = sp.parallelize(makes[kind](), group(), loss_parallel=kind == "gpt2")
    other.load_state_dict(state)
    assert_identical(sp.full_state_dict(other), whole)
    again = torch.optim.AdamW(other.parameters(), 1e-2)
    again.load_state_dict(stepped)
    for one, its in ((model, optimizer), (other, again)):
        one.eval()
        one.zero_grad()
        one(ids, labels=ids).loss.backward()
        its.step()
    assert_identical(sp.full_state_dict(other), sp.full_state_dict(model))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3"])
def test_a_saved_state_dict_is_loaded_by_default(world2: World, tmp_path: Path, kind: str) -> None:
    world2.run(file_case, kind, str(tmp_path))


def test_a_file_is_read_without_ranks(world2: World, tmp_path: Path) -> None:
    """By a process that has imported the conversion, and no other: torch says what to import."""
    world2.run(file_case, "phi3", str(tmp_path))
    script = (
        "import sys, torch\n{}\nstate = torch.load(sys.argv[1])[0]\n"
        "print(next(tuple(v.to_local().shape) for n, v in state.items() if 'qkv_proj' in n))"
    )
    rows, columns = next(p.shape for n, p in phi3().named_parameters() if "qkv_proj" in n)
    for line, answer in (
        ("import seqpar_kernels.convert", f"({rows // 2}, {columns})"),
        ("", "torch.distributed.tensor`` must be imported"),
    ):
        command = [sys.executable, "-c", script.format(line), str(tmp_path / "phi30.pt")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert answer in done.stdout + done.stderr, done.stderr


def hugging_face_case(folder: str) -> None:
    """torch's writer of that name: shards that its files cannot hold are refused."""
    for model in (sp.parallelize(llama(), group()), sp.parallelize(MODELS["gpt2"](), group())):
        for options, message in (({}, "expected save_distributed=True"), ({"save_distributed": True}, "packed")):
            if not options or type(model).__name__.startswith("GPT2"):
                with pytest.raises(CheckpointException) as caught:
                    dcp.save(model.state_dict(), storage_writer=dcp.HuggingFaceStorageWriter(folder, **options))
                assert any(message in str(e[0]) for e in caught.value.failures.values()), caught.value.failures
    model = sp.parallelize(llama(), group())
    writer = dcp.HuggingFaceStorageWriter(f"{folder}/shards", save_distributed=True, enable_consolidation=True)
    dcp.save(model.state_dict(), storage_writer=writer)
    if dist.get_rank() == 0:
        name = next(name for name in os.listdir(f"{folder}/shards") if name.endswith(".safetensors"))
        assert_identical(load_file(f"{folder}/shards/{name}"), dict(llama().state_dict()))


def test_a_writer_that_would_lose_shards_is_refused(world2: World, tmp_path: Path) -> None:
    world2.run(hugging_face_case, str(tmp_path))


def accelerator_case(folder: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from seqpar_kernels.convert.hf.accelerate import parallelism_config

    launched()
    model = sp.parallelize(llama(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"])
    accelerator = accelerate.Accelerator(cpu=True, parallelism_config=parallelism_config(model))
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    main = accelerator.is_main_process
    accelerator.unwrap_model(prepared).save_pretrained(f"{folder}/a", is_main_process=main)
    reads_back(f"{folder}/a", llama())
    state = accelerator.get_state_dict(prepared)
    accelerator.unwrap_model(prepared).save_pretrained(f"{folder}/b", is_main_process=main, state_dict=state)
    accelerator.save_model(prepared, f"{folder}/c")
    accelerator.wait_for_everyone()
    reads_back(f"{folder}/b", llama())
    found = load_file(f"{folder}/c/model.safetensors")
    assert_identical(found, {n: t for n, t in llama().state_dict().items() if n in found})
    assert len(found) >= len(list(llama().parameters()))


def test_what_accelerate_saves(world2: World, tmp_path: Path) -> None:
    world2.run(accelerator_case, str(tmp_path))


def inner_case(folder: str) -> None:
    """The decoder inside a model is one of Transformers' models too."""
    whole, model = llama(), sp.parallelize(llama(), group())
    ways: dict[str, dict[str, Any]] = {"plain": {}, "listed": {"state_dict": model.model.state_dict()}}
    for way, options in ways.items():
        model.model.save_pretrained(f"{folder}/{way}", **options)
        reads_back(f"{folder}/{way}", whole.model)
    model.save_pretrained(f"{folder}/all")
    reads_back(f"{folder}/all", whole)


def test_the_model_inside_is_saved_whole(world2: World, tmp_path: Path) -> None:
    world2.run(inner_case, str(tmp_path))
