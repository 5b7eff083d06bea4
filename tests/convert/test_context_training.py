"""Training loops around a model whose sequence is shared: Trainer, fully_shard, optimizers in the backward, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import seqpar_kernels as sp

from ..world import World
from .context_models import TOLERANCE, assert_alike, batch, difference, gradients, plain_model, shared
from .test_training_loops import launched


def trainer_case(folder: str) -> list[float]:
    """Two steps on two accumulated batches, with labels of unlike numbers."""
    from transformers import Trainer, TrainingArguments

    from seqpar_kernels.convert.hf.accelerate import parallelism_config

    launched()
    plain, model = plain_model("llama"), shared("llama")
    rows = [{key: value[i] for key, value in batch(4).items()} for i in range(4)]
    rows[1] = {**rows[1], "labels": rows[1]["labels"].clone()}
    rows[1]["labels"][2:] = -100
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        parallelism_config=parallelism_config(model),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer: Any = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, constant))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    whole = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    expected, reference = torch.optim.SGD(plain.parameters(), lr=0.5), []
    for _ in range(2):
        loss = plain(**whole, use_cache=False).loss
        loss.backward()
        expected.step()
        expected.zero_grad()
        reference.append(loss.item())
    assert losses == pytest.approx(reference, abs=2e-4)  # Trainer rounds to four digits
    assert_alike({n: p.detach() for n, p in model.named_parameters()}, dict(plain.named_parameters()))
    return losses


def test_trainer(world2: World, tmp_path: Path) -> None:
    one, other = world2.run(trainer_case, str(tmp_path))
    assert one == other


def fsdp_case(data_parallel: int) -> None:
    """fully_shard over all ranks: it averages over batches and sums over those that share one."""
    sharing = dist.get_world_size() // data_parallel
    mesh = init_device_mesh("cpu", (data_parallel, sharing), mesh_dim_names=("dp", "cp"))
    plain, model = plain_model("llama"), shared("llama", mesh=mesh["cp"])
    everything = mesh["dp", "cp"]._flatten("dp_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=everything)
    fully_shard(model, mesh=everything)
    batches = [batch(pad=True, seed=seed) for seed in range(data_parallel)]
    for _ in range(2):  # accumulated
        losses = [plain(**given, use_cache=False).loss for given in batches]
        (sum(losses) / data_parallel).backward()
        got = model(**batches[mesh["dp"].get_local_rank()]).loss
        assert difference(got, losses[mesh["dp"].get_local_rank()]) <= TOLERANCE
        got.backward()
    assert_alike(sp.gather_full_gradients(model), gradients(plain))


def test_fully_shard_over_the_ranks_of_a_sequence(world2: World) -> None:
    world2.run(fsdp_case, 1)


def test_fully_shard_over_data_and_sequence(world4: World) -> None:
    world4.run(fsdp_case, 2)


def wrong_mesh_case() -> None:
    """Over the data-parallel ranks alone nothing would sum over those of a sequence."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = shared("llama", mesh=mesh["cp"])
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ValueError, match=r"fully_shard: expected a mesh with the ranks .* shard over both"):
        model(**batch())


def test_fully_shard_over_other_ranks_is_refused(world4: World) -> None:
    world4.run(wrong_mesh_case)


def hooks_case() -> None:
    """What would take a gradient before it is summed is refused; an interrupted backward leaves nothing behind."""
    plain, model = plain_model("llama"), shared("llama")
    handle = model.lm_head.weight.register_post_accumulate_grad_hook(lambda param: None)
    with pytest.raises(ValueError, match="register_post_accumulate_grad_hook: expected none"):
        model(**batch())
    handle.remove()

    def fail(grad: torch.Tensor) -> None:
        raise ZeroDivisionError

    for each in (plain, model):
        each(**batch()).loss.backward()
    handle = model.model.embed_tokens.weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(**batch()).loss.backward()
    handle.remove()
    for each in (plain, model):
        each(**batch(length=9)).loss.backward()
    assert_alike(gradients(model), gradients(plain))


def test_gradients_are_summed_where_nothing_comes_between(world2: World) -> None:
    world2.run(hooks_case)


def saving_case(folder: str) -> None:
    """Written by one rank, loaded as any checkpoint, also for another number of ranks."""
    from transformers import AutoModelForCausalLM

    model = shared("llama")
    model.save_pretrained(folder)
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config._attn_implementation == "sdpa"
    assert_alike(dict(loaded.named_parameters()), {n: p.detach() for n, p in model.named_parameters()}, 0.0)
    again = sp.parallelize(loaded, None, context_parallel="ring")
    assert difference(again(**batch()).loss, model(**batch()).loss) <= TOLERANCE


def test_saving(world2: World, tmp_path: Path) -> None:
    world2.run(saving_case, str(tmp_path))
