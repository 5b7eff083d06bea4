"""Ranks that block in gloo for nothing are freed, and the group lives on.

A wait in gloo ends when its message comes or, after the group's time-out, with the end of all connections. So a thread
looks after the waits of its rank. One that lasts is told to the peers through the store, with all that is needed to end
it; where it proves to be in vain (:meth:`.agreement.Agreement.suspect`) the epoch is broken, and the peer it waits for
ends it with a message of the same tag and size. The waiter finds the epoch broken and raises.

The thread sleeps through waits that are short, and looks into the store only where something is wrong or slow.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .agreement import PATIENCE_SECONDS, Agreement, Ticket, agreement_of, per_group
from .gloo_threads import calm_gloo


class Blocked(NamedTuple):
    """A wait: of which op, for whom, and what would end it."""

    ticket: Ticket
    doing: Literal["receiving", "sending"]
    peer: int
    nbytes: int
    since: float


class Watch:
    """The thread of one group in this process, and what it shares with the one that waits."""

    def __init__(self, group: ProcessGroup):
        self.blocked: Blocked | None = None
        #: Works that will never be waited for, and their buffers.
        self.abandoned: list[object] = []
        self._verdict: tuple[int, str] | None = None
        self._freed: set[tuple[int, str]] = set()
        self._rank, self._ranks = group.rank(), group.size()
        calm_gloo()  # a group has been used first now: its mover is there
        thread = threading.Thread(target=self._watch, args=(weakref.ref(group),), daemon=True, name="seqpar-watch")
        thread.start()

    def verdict(self, ticket: Ticket) -> str | None:
        """Why the waits of the epoch of ``ticket`` are over."""
        return self._verdict[1] if self._verdict is not None and self._verdict[0] == ticket.epoch else None

    def _watch(self, group_ref: weakref.ref[ProcessGroup]) -> None:
        while True:
            time.sleep(PATIENCE_SECONDS / 2)
            group = group_ref()
            if group is None:
                return
            agreement = agreement_of(group)
            with contextlib.suppress(Exception):  # a store that is gone has nothing to tell
                blocked = self.blocked
                if blocked is not None and time.monotonic() - blocked.since > PATIENCE_SECONDS:
                    self._judge(agreement, blocked)
                if agreement.broken or self._verdict is not None:
                    self._free_others(group, agreement)
            del group, agreement

    def _judge(self, agreement: Agreement, blocked: Blocked) -> None:
        ticket = blocked.ticket
        agreement.publish("blocked", f"{ticket.epoch} {blocked.doing} {blocked.peer} {ticket.tag} {blocked.nbytes}")
        found = agreement.suspect(ticket)
        if found is not None and self.blocked is blocked:
            self._verdict = (ticket.epoch, found)
            agreement.note_break(ticket, found)

    def _free_others(self, group: ProcessGroup, agreement: Agreement) -> None:
        """End the waits of a broken epoch that only this rank can end."""
        for rank in range(self._ranks):
            said = agreement.read("blocked", rank) if rank != self._rank else ""
            if not said or (rank, said) in self._freed:
                continue
            epoch, doing, peer, tag, nbytes = said.split()
            if int(peer) != self._rank or agreement.cause_of_break(int(epoch)) is None:
                continue
            self._freed.add((rank, said))
            move = dist.isend if doing == "receiving" else dist.irecv
            buffer = torch.zeros(int(nbytes), dtype=torch.uint8)
            work = move(buffer, group=group, tag=int(tag), **{f"group_{'dst' if move is dist.isend else 'src'}": rank})
            self.abandoned.append((buffer, work))


@per_group
def watch_of(group: ProcessGroup) -> Watch:
    """The one Watch of ``group`` in this process."""
    return Watch(group)
