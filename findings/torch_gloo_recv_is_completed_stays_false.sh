#!/usr/bin/env bash
# torch 2.13.0, gloo, 2 ranks. is_completed() of an isend or irecv stays False after the data arrived, until wait().
#
# For collectives (all_reduce and the like with async_op=True) is_completed() turns True by itself. For point-to-point
# work it only turns True inside wait(): a loop that polls it to overlap a ring exchange with compute never ends,
# though the received numbers are in place. Calling wait() then returns at once.
# Seen: data [7, 7, 7, 7] present, is_completed() False for send and receive; True after wait(); all_reduce True
# unasked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - "$folder/store" <<'PY'
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def check(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = torch.full((4,), 7.0) if rank == 0 else torch.zeros(4)
    work = dist.isend(data, 1) if rank == 0 else dist.irecv(data, 0)
    while data[0] != 7.0:  # until the receiver sees the data
        time.sleep(0.01)
    dist.barrier()
    time.sleep(0.5)
    before = work.is_completed()
    work.wait()
    reduce = dist.all_reduce(torch.ones(4), async_op=True)
    while not reduce.is_completed():  # ends without a wait()
        time.sleep(0.01)
    after = work.is_completed()
    print(f"torch {torch.__version__} rank {rank} data {data.tolist()} before wait {before} after {after}")
    assert not before, "changed: is_completed() sees the arrived data now"
    assert after
    dist.destroy_process_group()


mp.start_processes(check, args=(sys.argv[1],), nprocs=2, start_method="fork")
PY
