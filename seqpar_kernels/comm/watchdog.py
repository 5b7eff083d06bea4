"""Ranks that block in gloo for nothing are freed, and the group lives on.

A wait in gloo ends when its message comes or, after the group's time-out, with the end of all connections. So a thread
looks after the waits of its rank. One that lasts is told to the peers through the store, with all that is needed to end
it; a rank that has left the epoch of a wait for it ends that wait with a message of the same tag and size. The waiter
looks up whether that may have been (:mod:`.protocol`, "Dummies") and raises.

The thread sleeps through waits that are short, and looks into the store only where something is wrong or slow.
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
from .coordination import PATIENCE_SECONDS, Agreement, agreement_of
from .gloo_threads import calm_gloo
from .protocol import Ticket

Doing = Literal["receiving", "sending"]


class Blocked:
    """A wait: of which step, for whom, and what would end it."""

    __slots__ = ("doing", "nbytes", "number", "peer", "since", "ticket")

    def __init__(self, ticket: Ticket, doing: Doing, peer: int, nbytes: int):
        self.ticket, self.doing, self.peer, self.nbytes = ticket, doing, peer, nbytes
        self.since = time.monotonic()
        self.number = 0  # among the waits of this rank that were told of; 0: it was not

    def __str__(self) -> str:
        return f"{self.ticket.epoch} {self.number} {self.doing} {self.peer} {self.ticket.tag} {self.nbytes}"


class Watch:
    """The waits of one group in this process, the thread that looks after them, and what lies about after faults."""

    def __init__(self, group: ProcessGroup, *, thread: bool = True):
        #: Works that will never be waited for, and their buffers.
        self.abandoned: list[object] = []
        #: What this rank waits for; set before the wait. :meth:`end` ends it.
        self.blocked: Blocked | None = None
        self._ending = threading.Lock()  # a wait is told of, or has ended
        self._told = 0
        self._freed: dict[int, int] = {}  # of each rank, the number of the last wait that was ended
        self._rank, self._ranks = group.rank(), group.size()
        calm_gloo()  # a group has been used first now: its mover is there
        if thread:
            threading.Thread(target=_watch, args=(weakref.ref(group),), daemon=True, name="seqpar-watch").start()

    def end(self, agreement: Agreement) -> bool:
        """The wait has ended. Whether it was told of, so that a dummy may have ended it or may yet come."""
        with self._ending:
            blocked, self.blocked = self.blocked, None
        if blocked is None or not blocked.number:
            return False
        with contextlib.suppress(Exception):
            agreement.publish("wait", " ")
        return True

    def look(self, group: ProcessGroup, agreement: Agreement) -> bool:
        """What the thread does each time. Whether there is more to look after soon."""
        with self._ending:
            blocked = self.blocked
            late = blocked is not None and time.monotonic() - blocked.since > PATIENCE_SECONDS
            if blocked is not None and late:
                if not blocked.number:
                    self._told += 1
                    blocked.number = self._told
                    agreement.publish("wait", str(blocked))
                agreement.suspect(blocked.ticket)
        if agreement.unsettled:
            self._free_others(group, agreement)
        return late or agreement.unsettled

    def _free_others(self, group: ProcessGroup, agreement: Agreement) -> None:
        """End the waits for this rank in epochs that it has left."""
        for rank in range(self._ranks):
            wait = agreement.read("wait", rank).split() if rank != self._rank else []
            if not wait:
                continue
            epoch, number, doing, peer, tag, nbytes = int(wait[0]), int(wait[1]), wait[2], *map(int, wait[3:])
            if peer != self._rank or epoch >= agreement.told_epoch or number <= self._freed.get(rank, 0):
                continue
            self._freed[rank] = number
            move = group.send if doing == "receiving" else group.recv
            buffer = torch.zeros(nbytes, dtype=torch.uint8)
            self.abandoned.append((buffer, move([buffer], rank, tag)))


def _watch(group_ref: weakref.ref[ProcessGroup]) -> None:
    busy = False
    while True:
        time.sleep(PATIENCE_SECONDS / (8 if busy else 2))
        group = group_ref()
        if group is None:
            return
        busy = False
        with contextlib.suppress(Exception):  # a store that is gone has nothing to tell
            busy = watch_of(group).look(group, agreement_of(group))
        del group


@per_group
def watch_of(group: ProcessGroup) -> Watch:
    """The one Watch of ``group`` in this process."""
    return Watch(group)
