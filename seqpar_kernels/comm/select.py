"""Which transport moves the messages of a group."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from . import symm_mem
from .loopback import LoopbackGroup, LoopbackTransport
from .p2p import P2PTransport
from .transport import Transport


def transport_of(group: ProcessGroup, engine: str) -> Transport:
    """Who moves the chunks of ``group``."""
    if isinstance(group, LoopbackGroup) and engine != "peer":
        return LoopbackTransport(group)
    return symm_mem.transport_over(group) if engine in ("peer", "fused") else P2PTransport(group)
