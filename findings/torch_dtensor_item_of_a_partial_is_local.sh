#!/usr/bin/env bash
# torch 2.13.0, gloo, 2 ranks. item() and float() of a DTensor that is Partial give the rank's own share, not the sum.
#
# x.sum() of a sharded DTensor is Partial. Comparing it reduces over the ranks first, so (total > 25).item() is right.
# total.item() does not reduce: every rank reads another number, each of them wrong. A loss printed, logged or tested
# for NaN with item() is the loss of one shard, without an error.
# Seen, sum of 0..7 over two ranks: item() 6.0 on rank 0 and 22.0 on rank 1, full_tensor() 28.0, (total > 25) True on
# both while total.item() > 25 is False on both.
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
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


def check(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    total = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (2,)), [Shard(0)]).sum()
    large = (total > 25).item()
    whole = total.full_tensor().item()
    print(f"torch {torch.__version__} rank {rank} {total.placements} item {total.item()} full {whole} > 25 {large}")
    assert whole == 28.0
    assert large, "changed: the comparison sees the local value now"
    assert total.item() == float(total) == (6.0, 22.0)[rank], "changed: item() reduces now"
    dist.destroy_process_group()


mp.start_processes(check, args=(sys.argv[1],), nprocs=2, start_method="fork")
PY
