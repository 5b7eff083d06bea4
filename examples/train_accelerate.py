"""An Accelerate loop on a model that is cut over all ranks.

    torchrun --nproc-per-node 2 examples/train_accelerate.py

The same command on one process trains the same model.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3Config

from seqpar_kernels import parallelize

CONFIG = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("accelerate_out"))
    out = options.parse_args().out
    dist.init_process_group()
    ranks, device = dist.get_world_size(), torch.cuda.is_available()
    if not device:  # Accelerate takes tensor-parallel ranks on devices only; CPUs do to try this
        ParallelismConfig._validate_accelerator = lambda config, accelerator: None
    accelerator = Accelerator(
        cpu=not device,
        gradient_accumulation_steps=2,
        parallelism_config=ParallelismConfig(tp_size=ranks) if ranks > 1 else None,  # every rank gets the same batches
    )

    torch.manual_seed(0)  # the same weights on every rank; AutoModelForCausalLM.from_pretrained(...) in earnest
    model = parallelize(AutoModelForCausalLM.from_config(CONFIG), dist.group.WORLD).to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(64, (40, 24), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(rows, batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses, norms = [], []
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    accelerator.unwrap_model(model).save_pretrained(out / "final")  # a plain checkpoint; called on every rank
    if accelerator.is_main_process:
        result = {"loss": losses, "grad_norm": norms}
        (out / "losses.json").write_text(json.dumps(result))
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
