"""Whether the ranks of a group share one host, as far as one rank can tell without asking the others."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed import ProcessGroup


def on_one_host(group: ProcessGroup, environment: Mapping[str, str] = os.environ) -> bool | None:
    """True or False where something here proves it, None where nothing does.

    torchrun tells which of the ranks it has started are here; ranks that meet at a loopback address, or talk over the
    loopback interface, share a host.
    """
    try:
        members, me = dist.get_process_group_ranks(group), dist.get_rank()
    except (KeyError, RuntimeError, ValueError):  # a group that torch.distributed does not know
        return None
    here = _started_here(environment)
    if me in here:
        return all(member in here for member in members)
    return True if environment.get("GLOO_SOCKET_IFNAME") == "lo" or _is_loopback(_meeting_point()) else None


def _started_here(environment: Mapping[str, str]) -> range:
    """The ranks of the world that torchrun has started on this host; none without it."""
    try:
        rank, local, count = (int(environment[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError):
        return range(0)
    return range(rank - local, rank - local + count)


def _meeting_point() -> str:
    """The host of the store by which the ranks of this process found one another; "" for none."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store.host if isinstance(store, dist.TCPStore) else ""


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
