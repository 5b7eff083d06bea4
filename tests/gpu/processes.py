"""Several NCCL ranks as processes: one GPU each where there are enough, else all on one (function only, not timing)."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def join(rank: int, ranks: int, store: str) -> dist.ProcessGroup:
    """The world, on this process's device."""
    devices = torch.cuda.device_count()
    if devices < ranks:
        os.environ["NCCL_HOSTID"] = f"virtual-host-{rank}"  # NCCL refuses two ranks of one host on one device
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    torch.cuda.set_device(rank % devices)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def exit_codes(target: Callable[..., None], ranks: int, *args: Any, seconds: float = 85.0) -> list[int | None]:
    """Of ``target(rank, ranks, store, *args)`` on each rank; None of one that took too long."""
    context = multiprocessing.get_context("spawn")
    store = os.path.join(tempfile.mkdtemp(), "store")
    processes = [context.Process(target=target, args=(rank, ranks, store, *args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
