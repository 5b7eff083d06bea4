"""Transformers' Trainer on a model that is cut over ranks: train, evaluate, save, resume.

    torchrun --nproc-per-node 2 examples/train_trainer.py
    torchrun --nproc-per-node 4 examples/train_trainer.py --tensor-parallel 2

With fewer tensor-parallel ranks than there are, the others are data parallel (fully_shard). The same command on one
process trains the same model: Trainer is given the same data and reports the same losses (with data-parallel ranks:
where there is no dropout, whose masks follow the rows of a rank's own batch).
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, set_seed

from seqpar_kernels import parallelize
from seqpar_kernels.convert.hf.trainer import SaveOptimizer, parallelism_config

ROWS = 4  # of one batch of all data-parallel ranks


def model_of(config: GPT2Config, mesh: DeviceMesh) -> torch.nn.Module:
    set_seed(0)  # the same weights on every rank; AutoModelForCausalLM.from_pretrained(...) in earnest
    model = parallelize(AutoModelForCausalLM.from_config(config), mesh["tp"])
    if mesh["dp"].size() > 1:
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("trainer_out"))
    options.add_argument("--tensor-parallel", type=int, help="ranks that share a batch; default: all")
    options.add_argument("--dropout", type=float, default=0.1)
    given = options.parse_args()
    out: Path = given.out
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = min(given.tensor_parallel or dist.get_world_size(), dist.get_world_size())
    mesh = init_device_mesh(device, (dist.get_world_size() // shared, shared), mesh_dim_names=("dp", "tp"))
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, resid_pdrop=given.dropout, embd_pdrop=given.dropout,
    )  # fmt: skip
    ids = torch.randint(64, (48, 24), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    args = TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=ROWS // mesh["dp"].size(),
        per_device_eval_batch_size=ROWS // mesh["dp"].size(),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        save_only_model=True,  # the optimizer is saved by SaveOptimizer
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=True,
    )

    def trainer() -> Trainer:
        model = model_of(config, mesh)
        args.parallelism_config = parallelism_config(model)
        return Trainer(model, args, train_dataset=rows[:40], eval_dataset=rows[40:], callbacks=[SaveOptimizer()])

    whole = trainer()
    whole.train()
    whole.save_model(str(out / "final"))  # a plain checkpoint, written by rank 0
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-3"))

    if dist.get_rank() == 0:

        def losses(run: Trainer, key: str) -> list[float]:
            return [entry[key] for entry in run.state.log_history if key in entry]

        result = {
            "loss": losses(whole, "loss"),
            "grad_norm": losses(whole, "grad_norm"),
            "eval_loss": losses(whole, "eval_loss"),
            "resumed_loss": losses(resumed, "loss"),
        }
        (out / "losses.json").write_text(json.dumps(result))
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
