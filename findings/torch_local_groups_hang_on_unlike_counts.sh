#!/usr/bin/env bash
# torch 2.13.0, gloo. new_group(use_local_synchronization=True) hangs if its members are in unlike numbers of groups.
#
# With that argument only the members of a group need to call. They find each other under a name, a hash of the ranks
# and of the number of groups that the process is in. Members for which that number differs, because one of them is in
# another group too, look under different names and wait until the time-out. The documentation asks for one order of
# creation on all ranks; here there is one.
# Seen: ranks 0, 1, 2. A group of 0 and 1, then one of 1 and 2: ranks 1 and 2 time out. With a group of rank 2 alone
# made beforehand they meet.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def meets(rank, groups):
    """Whether this rank makes all of the groups that it is in, in their order."""
    try:
        for ranks in groups:
            if rank in ranks:
                dist.new_group(list(ranks), use_local_synchronization=True, timeout=timedelta(seconds=10))
    except Exception as error:
        print(f"rank {rank}, groups {groups}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return False
    return True


def run(rank, folder, case, groups, expected):
    store = dist.FileStore(f"{folder}/store{case}", 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=60))
    met = meets(rank, groups)
    assert met == expected[rank], f"changed: rank {rank}, groups {groups}: {met}"


if __name__ == "__main__":
    print("torch", torch.__version__)
    like, unlike = [(0, 1), (2,), (1, 2)], [(0, 1), (1, 2)]
    for case, (groups, expected) in enumerate(((like, [True] * 3), (unlike, [True, False, False]))):
        mp.start_processes(run, args=(sys.argv[1], case, groups, expected), nprocs=3, start_method="fork")
PY
