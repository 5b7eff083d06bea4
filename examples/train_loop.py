"""A plain training loop on a model that is cut over all ranks, stopped and resumed.

    torchrun --nproc-per-node 2 examples/train_loop.py

The checkpoint may be resumed on another number of ranks.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig

from seqpar_kernels import (
    load_sharded_optimizer_state_dict,
    parallelize,
    sharded_optimizer_state_dict,
    sharded_state_dict,
)

CONFIG = LlamaConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Training:
    def __init__(self) -> None:
        torch.manual_seed(0)  # the same weights on every rank; AutoModelForCausalLM.from_pretrained(...) in earnest
        model = AutoModelForCausalLM.from_config(CONFIG)
        self.model = parallelize(model, dist.group.WORLD, loss_parallel=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, number: int) -> float:
        """One step; every rank sees the same batch."""
        ids = torch.randint(67, (4, 24), generator=torch.Generator().manual_seed(number))
        loss = self.model(input_ids=ids, labels=ids).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def state(self) -> dict[str, object]:
        optimizer = sharded_optimizer_state_dict(self.model, self.optimizer)
        return {"model": sharded_state_dict(self.model), "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["model"])
        load_sharded_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("loop_out"))
    out = options.parse_args().out
    dist.init_process_group()

    training = Training()
    losses = [training.step(number) for number in range(3)]
    training.save(out / "step-3")
    losses += [training.step(number) for number in range(3, 6)]

    resumed = Training()
    resumed.load(out / "step-3")
    result = {"loss": losses, "resumed_loss": losses[:3] + [resumed.step(number) for number in range(3, 6)]}
    resumed.model.save_pretrained(out / "final")  # a plain checkpoint; called on every rank
    if dist.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(result))
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
