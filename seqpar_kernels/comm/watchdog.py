"""A watchdog ends gloo waits whose message will never come, so that the group can still be used.

A wait in gloo ends in one of two ways: its message comes, or the group's time-out closes all connections. So each
process has a watchdog thread for each group. It publishes every long wait of its rank in the store, with the tag and
the size of the expected message. A peer that has left the epoch of that wait sends a dummy message of that tag and
size, which ends the wait. The waiting rank then checks whether it received a dummy (:mod:`.protocol`, "Dummies"), and
raises.

The thread ignores short waits. It reads the store only when a wait is long or this rank has left an epoch.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from typing import Literal

import torch
from torch.distributed import ProcessGroup

from ..caches import per_group
from .background import pause, start_watching
from .coordination import PATIENCE_SECONDS, Coordination, coordination_of
from .gloo_threads import calm_gloo
from .protocol import Ticket

Doing = Literal["receiving", "sending"]


class Blocked:
    """One wait: its step, the peer it waits for, and the message that would end it."""

    __slots__ = ("doing", "nbytes", "number", "peer", "since", "ticket")

    def __init__(self, ticket: Ticket, doing: Doing, peer: int, nbytes: int):
        self.ticket, self.doing, self.peer, self.nbytes = ticket, doing, peer, nbytes
        self.since = time.monotonic()
        self.number = 0  # counts the published waits of this rank; 0: this wait is not published

    def __str__(self) -> str:
        return f"{self.ticket.epoch} {self.number} {self.doing} {self.peer} {self.ticket.tag} {self.nbytes}"


class Watchdog:
    """The wait of this process on one group, the watchdog thread, and the works that faults left unfinished."""

    def __init__(self, group: ProcessGroup, *, thread: bool = True):
        #: Works that nobody waits for after a fault, and their buffers: the backend may still use these.
        self.abandoned: list[object] = []
        #: What this rank waits for; set before the wait. :meth:`end` ends it.
        self.blocked: Blocked | None = None
        self._ending = threading.Lock()  # held while a wait is published or ends, so that one excludes the other
        self._told = 0
        self._freed: dict[int, int] = {}  # rank -> number of its last wait that this rank ended by a dummy
        self._rank, self._ranks = group.rank(), group.size()
        calm_gloo()  # gloo starts its thread at the group's first use, which is now
        if thread:
            start_watching(_watchdog, weakref.ref(group), name="seqpar-watchdog")

    def end(self, coordination: Coordination) -> bool:
        """Note that the wait has ended.

        Returns:
            bool: whether the wait was published, so that a dummy may have ended it or may still come.
        """
        with self._ending:
            blocked, self.blocked = self.blocked, None
        if blocked is None or not blocked.number:
            return False
        with contextlib.suppress(Exception):
            coordination.publish("wait", " ")
        return True

    def look(self, group: ProcessGroup, coordination: Coordination) -> bool:
        """One pass of the watchdog thread; returns whether the next pass should come soon."""
        with self._ending:
            blocked = self.blocked
            late = blocked is not None and time.monotonic() - blocked.since > PATIENCE_SECONDS
            if blocked is not None and late:
                if not blocked.number:
                    self._told += 1
                    blocked.number = self._told
                    coordination.publish("wait", str(blocked))
                coordination.suspect(blocked.ticket)
        if coordination.unsettled:
            self._free_others(group, coordination)
        return late or coordination.unsettled

    def _free_others(self, group: ProcessGroup, coordination: Coordination) -> None:
        """Send dummies to the peers that wait for this rank in an epoch that this rank has left."""
        for rank in range(self._ranks):
            wait = coordination.read("wait", rank).split() if rank != self._rank else []
            if not wait:
                continue
            epoch, number, doing, peer, tag, nbytes = int(wait[0]), int(wait[1]), wait[2], *map(int, wait[3:])
            if peer != self._rank or epoch >= coordination.told_epoch or number <= self._freed.get(rank, 0):
                continue
            self._freed[rank] = number
            move = group.send if doing == "receiving" else group.recv
            buffer = torch.zeros(nbytes, dtype=torch.uint8)
            self.abandoned.append((buffer, move([buffer], rank, tag)))


def _watchdog(group_ref: weakref.ref[ProcessGroup]) -> None:
    busy = False
    while pause(PATIENCE_SECONDS / (8 if busy else 2)):
        group = group_ref()
        if group is None:
            return
        busy = False
        with contextlib.suppress(Exception):  # the store may be gone
            busy = watchdog_of(group).look(group, coordination_of(group))
        del group


@per_group
def watchdog_of(group: ProcessGroup) -> Watchdog:
    """The one Watchdog of ``group`` in this process."""
    return Watchdog(group)
