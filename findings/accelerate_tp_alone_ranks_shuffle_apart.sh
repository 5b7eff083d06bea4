#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0, gloo. With tensor parallelism alone, the ranks of one shard group shuffle apart.
#
# prepare_data_loader gives tensor-parallel ranks the same batches when there is a data-parallel dimension too: it
# broadcasts the sampler's generator. With a mesh of "tp" alone it computes one data process, does nothing, and drops
# "generator" from the types to synchronise. Each rank then shuffles with its own generator; unless the seeds agree,
# the ranks feed different tokens into one sharded model. No error, no warning.
# Seen: mesh (dp_shard 2, tp 2): equal batches within each tp pair. Mesh (tp 2): two different orders, rng_types [].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy accelerate==1.15.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import os
import sys

import accelerate
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader


def batches(rank, folder, names, sizes):
    world = torch.Size(sizes).numel()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group exists
    Accelerator(cpu=True)
    torch.manual_seed(100 + rank)
    loader = prepare_data_loader(
        DataLoader(list(range(16)), batch_size=2, shuffle=True),
        put_on_device=False,
        rng_types=["generator"],
        torch_device_mesh=dist.init_device_mesh("cpu", sizes, mesh_dim_names=names),
    )
    seen = [None] * world
    dist.all_gather_object(seen, [batch.tolist() for batch in loader])
    if rank == 0:
        print("accelerate", accelerate.__version__, dict(zip(names, sizes)), "rng_types", loader.rng_types)
        print("batches", seen)
    if world == 4:
        assert seen[0] == seen[1] and seen[2] == seen[3] and seen[0] != seen[2]
    else:
        assert loader.rng_types == [] and seen[0] != seen[1], "changed: tensor-parallel ranks get the same batches now"
    dist.destroy_process_group()


for names, sizes in ((("dp_shard", "tp"), (2, 2)), (("tp",), (2,))):
    mp.start_processes(batches, args=(sys.argv[1], names, sizes), nprocs=torch.Size(sizes).numel(), start_method="fork")
PY
