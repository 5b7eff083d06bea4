#!/usr/bin/env bash
# torch 2.13.0, gloo, 2 and 4 ranks. reduce_scatter_tensor sends as many bytes as all_reduce: twice what it has to.
#
# A reduce-scatter over n ranks has to move n - 1 parts from each rank, as its mirror image, the all-gather, does. On
# gloo the whole tensor is all-reduced and cut afterwards, with `reduce_scatter` of a list too. Sequence parallelism
# replaces one all-reduce by a reduce-scatter and an all-gather "of the same bytes": on gloo they are 1.5 times as many.
# all_to_all_single and a local sum take half of the bytes of reduce_scatter_tensor.
# Seen: bytes that a rank sends, in parts (as the kernel counts them per connection, TCP_INFO): reduce_scatter_tensor 2
# on 2 ranks and 6 on 4, reduce_scatter the same, all_reduce the same; all_gather and all_to_all_single 1 and 3.
# Linux 4.19 or newer (tcpi_bytes_sent).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/check.py" <<'PY'
import os
import socket
import struct
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PART = 1 << 18  # float32 numbers
BYTES_SENT = 200  # where struct tcp_info has tcpi_bytes_sent


def sent():
    """Bytes that this process has sent on its TCP connections."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, BYTES_SENT)[0]
        except OSError:  # closed meanwhile, or it listens
            continue
    return total


def check(rank, ranks, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    whole, part = torch.ones(ranks * PART), torch.empty(PART)
    calls = {
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, whole),
        "reduce_scatter": lambda: dist.reduce_scatter(part, list(whole.chunk(ranks))),
        "all_reduce": lambda: dist.all_reduce(whole.clone()),
        "all_gather": lambda: dist.all_gather(list(torch.empty(ranks, PART)), part),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    found = {}
    for name, call in calls.items():
        call()
        dist.barrier()
        before = sent()
        call()
        found[name] = (sent() - before) / (4 * PART)
        dist.barrier()
    if rank == 0:
        print(f"torch {torch.__version__}, {ranks} ranks:", *(f"{name} {parts:.2f}" for name, parts in found.items()))
    needed = ranks - 1
    for name in ("all_gather", "all_to_all_single"):
        assert abs(found[name] - needed) < 0.1 * needed, (name, found[name])
    for name in ("reduce_scatter_tensor", "reduce_scatter", "all_reduce"):
        assert found[name] > 1.8 * needed, f"changed: {name} sends {found[name]:.2f} parts"
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in (2, 4):
        mp.spawn(check, (ranks, f"{sys.argv[1]}/store{ranks}"), nprocs=ranks)
PY
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder"
