"""Megatron-style code: parallel layers on [S, B, H], region mappings, weight gradients summed in float32 main_grad.

torchrun --nproc-per-node 2 examples/train_megatron.py
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seqpar_kernels import ColumnParallelLinear, DropoutAddNorm, RMSNorm, RowParallelLinear
from seqpar_kernels.megatron import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region

VOCAB, HIDDEN, HEADS, LAYERS, SEQ, BATCH, MICRO_BATCHES = 64, 32, 4, 2, 24, 4, 2


class Block(nn.Module):
    """Pre-norm; takes and gives shards of the residual stream and of its norm, both [S/t, B, H]."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        parallel = {"bias": False, "group": group, "seq_dim": 0, "accumulate_into_main_grad": True}
        self.qkv = ColumnParallelLinear(HIDDEN, 3 * HIDDEN, sections=3, **parallel)
        self.proj = RowParallelLinear(HIDDEN, HIDDEN, **parallel)
        self.up = ColumnParallelLinear(HIDDEN, 4 * HIDDEN, **parallel)
        self.down = RowParallelLinear(4 * HIDDEN, HIDDEN, **parallel)
        self.middle, self.next = (DropoutAddNorm(HIDDEN, p=0.1, norm="rms", group=group, seq_dim=0) for _ in range(2))

    def forward(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        # [S, B, 3 H/t] -> three of [B, heads/t, S, H/heads]
        q, k, v = (
            part.unflatten(-1, (-1, HIDDEN // HEADS)).permute(1, 2, 0, 3) for part in self.qkv(normed).chunk(3, -1)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        normed, x = self.middle(self.proj(heads.permute(2, 0, 1, 3).flatten(-2)), x)
        normed, x = self.next(self.down(F.gelu(self.up(normed))), x)
        return x, normed


class Model(nn.Module):
    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group
        self.embedding, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.first = RMSNorm(HIDDEN, group=group, seq_dim=0)
        self.blocks = nn.ModuleList(Block(group) for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        """[S, B] -> the loss of predicting the next token."""
        x = scatter_to_sequence_parallel_region(self.embedding(ids), self.group)
        normed = self.first(x)
        for block in self.blocks:
            x, normed = block(x, normed)
        # The statements below compute the same on every rank, so that each rank has the whole gradient.
        whole = gather_from_sequence_parallel_region(normed, tensor_parallel_output_grad=False, group=self.group)
        return F.cross_entropy(self.head(whole[:-1]).flatten(0, 1), ids[1:].flatten())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("megatron_out"))
    out = options.parse_args().out
    dist.init_process_group()
    torch.manual_seed(0)  # layers are drawn whole and then cut: any number of ranks starts with the same weights
    model = Model(dist.group.WORLD)
    for param in model.parameters():
        param.main_grad = torch.zeros_like(param, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    losses = []
    for step in range(5):
        ids = torch.randint(VOCAB, (MICRO_BATCHES, SEQ, BATCH), generator=torch.Generator().manual_seed(step))
        for micro_batch in ids:
            loss = model(micro_batch) / MICRO_BATCHES
            loss.backward()  # parallel layers add their weights' gradients to main_grad
            losses.append(loss.item() * MICRO_BATCHES)
        for param in model.parameters():
            if param.grad is not None:  # norms, embedding, head: what Megatron's DDP hooks do
                param.main_grad += param.grad
            param.grad = param.main_grad.clone()
            param.main_grad.zero_()
        optimizer.step()
        optimizer.zero_grad()

    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "losses.json").write_text(json.dumps({"loss": losses}))
        print(losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
