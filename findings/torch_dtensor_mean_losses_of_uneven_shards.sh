#!/usr/bin/env bash
# torch 2.13.0, gloo, 2 ranks. A mean loss of a DTensor whose shards are of unequal size has the wrong value.
#
# mse_loss gives a Partial(avg): the plain average of the ranks' local means, though the ranks hold unequal numbers of
# elements. Tensor.mean() on the same DTensor knows that trap, gathers first and is right.
# binary_cross_entropy_with_logits is off in the same way. No error, no warning; equal shards hide it.
# Seen, 3 rows over 2 ranks (2 and 1) with squared errors 1, 1, 4: mse_loss 2.5, ((a - b) ** 2).mean() 2.0; the right
# value is 2.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - "$folder/store" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


def check(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x, target = torch.tensor([[1.0], [1.0], [2.0]]), torch.zeros(3, 1)
    a, b = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, target))
    loss = F.mse_loss(a, b)
    by_hand = ((a - b) ** 2).mean()
    entropy = F.binary_cross_entropy_with_logits(a, b).full_tensor()
    right_entropy = F.binary_cross_entropy_with_logits(x, target)
    value, by_hand_value = loss.full_tensor().item(), by_hand.full_tensor().item()
    if rank == 0:
        print("torch", torch.__version__, "mse_loss", value, loss.placements)
        print("by hand", by_hand_value, by_hand.placements)
        print("binary_cross_entropy_with_logits", entropy.item(), "right", right_entropy.item())
    assert F.mse_loss(x, target).item() == 2.0
    assert by_hand_value == 2.0
    assert value == 2.5, "changed: the shards are weighted now"
    assert abs(entropy - right_entropy) > 0.1, "changed: the shards are weighted now"
    dist.destroy_process_group()


mp.start_processes(check, args=(sys.argv[1],), nprocs=2, start_method="fork")
PY
