#!/usr/bin/env bash
# torch 2.13.0, gloo, 2 ranks. The gradient of mse_loss on a sharded DTensor is the right one times the number of ranks.
#
# The loss itself is right: a Partial(avg) whose full_tensor() is the unsharded loss. The backward operator divides by
# the number of local elements and nothing divides by the ranks again, so each gradient is twice too large on two
# ranks. smooth_l1_loss, huber_loss and soft_margin_loss do the same; l1_loss, reduction="sum" and ((a - b) **
# 2).mean() are right. No error, no warning, and on one rank the factor is 1.
# Seen: gradient over right gradient 2.0 for the four losses, 1.0 for the three others.
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

TIMES_RANKS = [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss]
RIGHT = [F.l1_loss, lambda a, b: F.mse_loss(a, b, reduction="sum"), lambda a, b: ((a - b) ** 2).mean()]


def check(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, target = torch.randn(8, 3), torch.randn(8, 3).sign()
    for factor, losses in ((2.0, TIMES_RANKS), (1.0, RIGHT)):
        for loss in losses:
            whole = x.clone().requires_grad_()
            value = loss(whole, target)
            value.backward()
            sharded = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
            sharded_value = loss(sharded, distribute_tensor(target, mesh, [Shard(0)]))
            sharded_value.backward()
            torch.testing.assert_close(sharded_value.full_tensor(), value)
            ratio = sharded.grad.full_tensor() / whole.grad
            if rank == 0:
                print("torch", torch.__version__, loss.__name__, "gradient over right gradient:", ratio.mean().item())
            torch.testing.assert_close(ratio, torch.full_like(ratio, factor), msg="changed: another factor")
    dist.destroy_process_group()


mp.start_processes(check, args=(sys.argv[1],), nprocs=2, start_method="fork")
PY
