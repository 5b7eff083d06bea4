"""Whether the ranks of a group share one host, from what one rank knows without communication."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed import ProcessGroup


def on_one_host(group: ProcessGroup, environment: Mapping[str, str] = os.environ) -> bool | None:
    """Whether all ranks of ``group`` are on this host; None where that is not known.

    Under torchrun each rank knows which ranks the agent of its host has started. Ranks that gloo connects over the
    loopback interface share a host. The store's address proves nothing: any host may be called localhost.
    """
    try:
        members, me = dist.get_process_group_ranks(group), dist.get_rank()
    except (KeyError, RuntimeError, ValueError):  # a group that torch.distributed does not know
        return None
    here = _started_here(environment)
    if me in here:
        return all(member in here for member in members)
    return True if environment.get("GLOO_SOCKET_IFNAME") == "lo" else None


def _started_here(environment: Mapping[str, str]) -> range:
    """The ranks of the world that torchrun has started on this host; empty without torchrun."""
    try:
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
        rank, local, count, world = (int(environment[name]) for name in names)
    except (KeyError, ValueError):
        return range(0)
    # Other launchers set these variables too, some with ranks assigned round-robin. And a rank may have spawned this
    # world, whose size then differs.
    if "TORCHELASTIC_RUN_ID" not in environment or world != dist.get_world_size():
        return range(0)
    return range(rank - local, rank - local + count)
