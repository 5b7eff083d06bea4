"""Whether the ranks of a group share one host, as far as one rank can tell without asking the others."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed import ProcessGroup


def on_one_host(group: ProcessGroup, environment: Mapping[str, str] = os.environ) -> bool | None:
    """True or False where something here tells, None where nothing does.

    torchrun tells which ranks this host's agent has started: False stands for ranks of several agents. Ranks that gloo
    connects over the loopback interface share a host. An address at which they met tells nothing: the host of a store
    may call itself localhost.
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
    """The ranks of the world that torchrun has started on this host; none without it."""
    try:
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
        rank, local, count, world = (int(environment[name]) for name in names)
    except (KeyError, ValueError):
        return range(0)
    # Other launchers set these too, some with ranks dealt out round-robin; and a rank may have spawned this world.
    if "TORCHELASTIC_RUN_ID" not in environment or world != dist.get_world_size():
        return range(0)
    return range(rank - local, rank - local + count)
