"""A sequence that no single rank could hold: a Transformers model whose ranks share it.

    python examples/train_long_context.py --length 4096
    torchrun --nproc-per-node 8 examples/train_long_context.py --length 32768

Eight ranks train on a sequence eight times as long in about the same memory each: what a rank holds beyond the weights
is that of its own rows. Prints loss and peak memory of a training step (on CPU the growth of the resident set).
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from seqpar_kernels import parallelize


class Peak:
    """The most memory that this process takes, in MiB, beyond what it had at the beginning."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = self.now()

    def now(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10

    def growth(self) -> float:
        return self.now() - self.before


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--length", type=int, default=4096, help="tokens of the sequence, on all ranks together")
    options.add_argument("--engine", default="auto")
    options.add_argument("--out", type=Path, help="for a line of JSON from each rank")
    given = options.parse_args()
    several = dist.is_torchelastic_launched()
    if several:
        dist.init_process_group()
    group, rank = (dist.group.WORLD, dist.get_rank()) if several else (None, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=given.length,
    )  # fmt: skip
    torch.manual_seed(0)  # the same weights on every rank; from_pretrained(...) in earnest
    model = AutoModelForCausalLM.from_config(config).to(device)
    parallelize(model, group, context_parallel=given.engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss  # the whole sequence, on every rank
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    generator = torch.Generator().manual_seed(1)
    step(torch.randint(512, (1, 64), generator=generator).to(device))  # libraries and gradients are loaded once
    ids = torch.randint(512, (1, given.length), generator=generator).to(device)
    peak = Peak()
    losses = [step(ids) for _ in range(2)]
    found = {"length": given.length, "losses": losses, "peak_mib": round(peak.growth(), 1)}
    print(f"rank {rank}: {found}", flush=True)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"rank{rank}.json").write_text(json.dumps(found))
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
