"""Transformers' Trainer on a model that is cut over all ranks: train, evaluate, save, resume.

    torchrun --nproc-per-node 2 examples/train_trainer.py

The same command on one process trains the same model: Trainer is given the same data and reports the same losses.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, set_seed

from seqpar_kernels import parallelize
from seqpar_kernels.convert.trainer import SaveOptimizer


def model_of(config: GPT2Config) -> torch.nn.Module:
    set_seed(0)  # the same weights on every rank; AutoModelForCausalLM.from_pretrained(...) in earnest
    return parallelize(AutoModelForCausalLM.from_config(config), dist.group.WORLD)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("trainer_out"))
    out = options.parse_args().out
    dist.init_process_group()
    if not torch.cuda.is_available():  # Accelerate takes tensor-parallel ranks on devices only; CPUs do to try this
        ParallelismConfig._validate_accelerator = lambda config, accelerator: None
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0
    )
    ids = torch.randint(64, (48, 24), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    args = TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        save_only_model=True,  # the optimizer is saved by SaveOptimizer
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )

    def trainer() -> Trainer:
        return Trainer(
            model_of(config), args, train_dataset=rows[:40], eval_dataset=rows[40:], callbacks=[SaveOptimizer()]
        )

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
            "eval_loss": losses(whole, "eval_loss"),
            "resumed_loss": losses(resumed, "loss"),
        }
        (out / "losses.json").write_text(json.dumps(result))
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
