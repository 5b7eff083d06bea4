"""Selects the transport of a group: one function for each kind of transport."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from ..caches import per_group
from . import symm_mem
from .loopback import LoopbackGroup, LoopbackTransport
from .p2p import P2PTransport
from .transport import Transport


@per_group
def messages(group: ProcessGroup) -> Transport:
    """Point-to-point messages of torch.distributed; for virtual ranks, copies. One transport for each group."""
    return LoopbackTransport(group) if isinstance(group, LoopbackGroup) else P2PTransport(group)


def symmetric_memory(group: ProcessGroup) -> Transport:
    """Workspaces that all ranks can read.

    Raises:
        RuntimeError: the group cannot use symmetric memory (:func:`.symm_mem.why_not`).
    """
    return symm_mem.transport_over(group)


def symmetric_memory_or_loopback(group: ProcessGroup) -> Transport:
    """The transport of a matmul kernel that waits for its own input: no other kernel may move its bytes."""
    return LoopbackTransport(group) if isinstance(group, LoopbackGroup) else symm_mem.transport_over(group)
