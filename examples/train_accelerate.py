"""An Accelerate loop on a model that is cut over ranks.

    torchrun --nproc-per-node 2 examples/train_accelerate.py
    torchrun --nproc-per-node 4 examples/train_accelerate.py --tensor-parallel 2

With fewer tensor-parallel ranks than there are, the others are data parallel (fully_shard). The same command on one
process trains the same model.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3Config

from seqpar_kernels import parallelize
from seqpar_kernels.convert.hf.accelerate import parallelism_config

CONFIG = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
ROWS = 4  # of one batch of all data-parallel ranks


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("accelerate_out"))
    options.add_argument("--tensor-parallel", type=int, help="ranks that share a batch; default: all")
    given = options.parse_args()
    out: Path = given.out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    shared = min(given.tensor_parallel or dist.get_world_size(), dist.get_world_size())
    mesh = init_device_mesh(device, (dist.get_world_size() // shared, shared), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)  # the same weights on every rank; AutoModelForCausalLM.from_pretrained(...) in earnest
    model = parallelize(AutoModelForCausalLM.from_config(CONFIG), mesh["tp"]).to(device)
    if mesh["dp"].size() > 1:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    accelerator = Accelerator(
        cpu=device == "cpu",
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the same order on any number of ranks
        parallelism_config=parallelism_config(model),  # ranks that share a batch get the same one
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(64, (40, 24), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(rows, batch_size=ROWS // mesh["dp"].size(), shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses, norms = [], []
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())

    accelerator.unwrap_model(model).save_pretrained(out / "final")  # a plain checkpoint; called on every rank
    if accelerator.is_main_process:
        result = {"loss": losses, "grad_norm": norms}
        (out / "losses.json").write_text(json.dumps(result))
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
