#!/usr/bin/env bash
# torch 2.13.0, gloo, 2 ranks. GradScaler skips the step on the one rank that holds an inf and takes it on the other.
#
# Whether the ranks agree depends on the order of the parameters. The check runs over the whole list of gradients and
# its result takes its placement from the first. A sharded gradient first: the result is reduced over the ranks. A
# replicated one first (a norm's weight before a sharded linear): it is not, so an inf in a shard stays on its rank.
# Parameters and scales then differ between ranks, without an error.
# Seen: order sharded, replicated: scale 2.0 on both ranks, no step. Order replicated, sharded, inf on rank 1: rank 0
# steps and keeps scale 4.0, rank 1 skips the step and halves its scale to 2.0.
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
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh


def scale_and_steps(rank, mesh, order):
    """One scaled step with an inf in rank 1's shard: the scale after it, and whether the parameters moved."""
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [place])) for place in order]
    optimizer = torch.optim.SGD(params, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(1))  # the scale tensor exists only after a first scale()
    for param, place in zip(params, order):
        grad = torch.ones_like(param.to_local())
        if rank == 1 and place == Shard(0):
            grad[0] = float("inf")
        param.grad = DTensor.from_local(grad, mesh, [place])
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), any((p.to_local() != 1).any().item() for p in params)


def check(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for order, wanted in (
        ((Shard(0), Replicate()), [(2.0, False), (2.0, False)]),
        ((Replicate(), Shard(0)), [(4.0, True), (2.0, False)]),
    ):
        seen = [None, None]
        dist.all_gather_object(seen, scale_and_steps(rank, mesh, order))
        if rank == 0:
            print("torch", torch.__version__, order, "(scale, stepped) by rank:", seen)
        assert seen == wanted, "changed: the ranks behave otherwise now"
    dist.destroy_process_group()


mp.start_processes(check, args=(sys.argv[1],), nprocs=2, start_method="fork")
PY
