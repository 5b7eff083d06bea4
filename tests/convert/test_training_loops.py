"""Accelerate and Transformers' Trainer on data-parallel times tensor-parallel ranks: batches, metrics, refusals."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

import seqpar_kernels as sp

from ..world import World
from .models import VOCAB, assert_same_loss, gpt2, transformers

pytest.importorskip("accelerate")


def launched() -> None:
    """As torchrun does; Accelerate keeps its state for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if dist.is_initialized():
        rank = str(dist.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # asked for, not used


def mesh_of(data_parallel: int) -> DeviceMesh:
    shape = (data_parallel, dist.get_world_size() // data_parallel)
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))


def converted(mesh: DeviceMesh | None, **options: Any) -> nn.Module:
    """GPT-2 without dropout, over ``mesh``."""
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0)
    if mesh is None:
        return sp.parallelize(model, None, **options)
    sp.parallelize(model, mesh["tp"], **options)
    if mesh["dp"].size() > 1:
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


class Numbers(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(10))


def batches_case(data_parallel: int) -> list[int]:
    """Batches of 2 out of 10: those of the ranks that share a model, and all rows once."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from seqpar_kernels.convert.hf.accelerate import parallelism_config

    launched()
    mesh = mesh_of(data_parallel)
    model = converted(mesh)
    config = parallelism_config(model)
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    loader = accelerator.prepare(DataLoader(torch.arange(10), batch_size=2))
    found, objects, mine = [], [], []
    for batch in loader:
        mine += batch.tolist()
        found += accelerator.gather_for_metrics({"rows": batch})["rows"].tolist()
        objects += accelerator.gather_for_metrics([f"row {row}" for row in batch.tolist()])
    assert found == list(range(10)) and objects == [f"row {row}" for row in range(10)]
    if data_parallel > 1:
        with pytest.raises(ValueError, match=r"dispatch_batches: expected False .* got None with a Numbers"):
            accelerator.prepare(DataLoader(Numbers(), batch_size=2))
        launched()
        apart = DataLoaderConfiguration(dispatch_batches=False)
        accelerator = Accelerator(cpu=True, parallelism_config=parallelism_config(model), dataloader_config=apart)
    loader = accelerator.prepare(DataLoader(Numbers(), batch_size=2))
    streamed = [row for batch in loader for row in batch.tolist()]
    assert streamed == mine, (streamed, mine)
    again = pickle.loads(pickle.dumps(config))
    assert (again.tp_size, again.dp_shard_size) == (mesh["tp"].size(), data_parallel)
    return mine


def test_tensor_parallel_ranks_get_the_same_batches(world2: World) -> None:
    assert world2.run(batches_case, 1) == [list(range(10))] * 2


def test_data_parallel_ranks_get_their_own_batches(world4: World) -> None:
    first, second = [0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 0, 1]  # the last batch is filled up from the first
    assert world4.run(batches_case, 2) == [first, first, second, second]


def refusals_case() -> None:
    from seqpar_kernels.convert.hf.accelerate import parallelism_config

    def refused(message: str, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=message):
            parallelism_config(model)

    refused("has not been parallelized", gpt2())
    refused("got one that is whole on each", sp.parallelize(gpt2(), None))
    mesh = mesh_of(2)
    plain = sp.parallelize(gpt2(), mesh["tp"])
    refused(r"expected fully_shard over the other 2 of 4 ranks .* got transformer.wte.weight on ranks", plain)
    for block in plain.transformer.h:
        fully_shard(block, mesh=mesh["dp"])
    refused("got transformer.wte.weight on ranks", plain)
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    refused(r"tensor parallel last, as batches are handed out; got .* on \[\[0, 2\], \[1, 3\]\]", converted(other))
    adapted = sp.parallelize(gpt2(), mesh["tp"])
    adapted.transformer.register_parameter("late", nn.Parameter(torch.zeros(2)))
    refused("expected fully_shard on all of it .* got transformer.late without", adapted)


def test_refusals(world4: World) -> None:
    world4.run(refusals_case)


def rows_of(seed: int, count: int, ignored: bool) -> list[dict[str, Tensor]]:
    """``ignored``: each row counts another number of labels, so that data-parallel ranks do."""
    ids = torch.randint(VOCAB, (count, 9), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for number, row in enumerate(labels):
        row[: 1 + number % 7 if ignored else 0] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def trainer_case(folder: str, data_parallel: int | None, options: dict[str, Any], loss_parallel: bool) -> Any:
    """Losses, gradient norms, loss of a set whose last batch is short, and predictions."""
    from seqpar_kernels.convert.hf.trainer import SaveOptimizer, parallelism_config

    launched()
    mesh = None if data_parallel is None else mesh_of(data_parallel)
    model = converted(mesh, loss_parallel=loss_parallel)
    rows = 4 // (data_parallel or 1)
    args = transformers.TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=rows, per_device_eval_batch_size=rows,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, max_grad_norm=0.3, save_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True, parallelism_config=parallelism_config(model), **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=rows_of(1, 24, True), callbacks=[SaveOptimizer()])
    trainer.train()
    test = rows_of(2, 10, False)
    found = trainer.predict(test)
    history = trainer.state.log_history
    losses, norms = ([entry[key] for entry in history if key in entry] for key in ("loss", "grad_norm"))
    assert trainer.evaluate(test)["eval_loss"] == found.metrics["test_loss"]
    return losses, norms, found.metrics["test_loss"], found.predictions


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "smoothed", "loss_parallel"])
def test_trainer_gives_what_it_gives_on_one_rank(world4: World, tmp_path: Path, case: str) -> None:
    options = {"label_smoothing_factor": 0.1} if case == "smoothed" else {}
    parallel = case == "loss_parallel"
    if parallel:
        options["prediction_loss_only"] = True
    expected = trainer_case(str(tmp_path), None, options, parallel)
    for got in world4.run(trainer_case, str(tmp_path), 2, options, parallel):
        for a, b in zip([*got[0], *got[1], got[2]], [*expected[0], *expected[1], expected[2]], strict=True):
            assert_same_loss(a, b)
        assert (got[3] is None) == parallel
        if not parallel:
            torch.testing.assert_close(*map(torch.as_tensor, (got[3], expected[3])), rtol=1e-3, atol=1e-4)


def resumed_case(folder: str, steps: int) -> None:
    """Resumed in the middle and at the end of an epoch: the dropout masks of the training that went on."""
    from seqpar_kernels.convert.hf.trainer import SaveOptimizer, parallelism_config

    launched()
    args = transformers.TrainingArguments(
        output_dir=folder, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_steps=steps, save_only_model=True, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    found = []
    for resume in (None, f"{folder}/checkpoint-{steps}"):
        model = gpt2()
        sp.parallelize(model, mesh_of(1)["tp"] if dist.is_initialized() else None)
        args.parallelism_config = parallelism_config(model)
        trainer = transformers.Trainer(model, args, train_dataset=rows_of(1, 6, True), callbacks=[SaveOptimizer()])
        trainer.train(resume_from_checkpoint=resume)
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [2, 3])
def test_resumed_training_goes_on_as_if_it_had_not_stopped(world2: World, tmp_path: Path, steps: int) -> None:
    world2.run(resumed_case, str(tmp_path), steps)
