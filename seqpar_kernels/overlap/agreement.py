"""Ranks agree on what they are about to do before they do it, and hear of one another when it goes wrong.

A shape that differs between ranks makes NCCL hang and gloo abort the process. So the first time a rank meets an op
signature it says so in the group's store and waits until the others have met it too: all go on, or all raise. Later
calls cost a set look-up. A rank that fails its own argument checks says that too, so that its peers do not wait for it.

Every op on a group has a place: the epoch of the group and the number of the op in it, the same on all ranks. A rank
that has waited long for a transfer says at which place it stands and reads where the others stand: two ranks with
different ops at one place will never meet, and both raise. A rank that fails in the midst of an op breaks the epoch,
which ranks that wait for it find in the store; the next op of each rank begins a new epoch together with the others.
Places are part of the tags of messages, so nothing left over from a broken epoch is taken for something newer.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .schedule import Transfer

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

# What a rank says of itself: waiting for the others to meet a signature, running, failed its checks, stuck in a
# transfer. A status is one of these letters, the rank's place, a blank and a text.
_WAITING, _RUNNING, _FAILED, _STUCK = "W", "R", "F", "S"
# A rank that failed may have caught its error and be on its way: so long its peers wait before they believe it.
_GRACE_SECONDS = 2.0
#: Who has waited longer than this for a transfer asks the others where they are.
PATIENCE_SECONDS = 1.0


class Ticket(NamedTuple):
    """One op of one group: its signature, and its place among all ops of the group."""

    signature: str
    epoch: int
    number: int

    @property
    def place(self) -> str:
        return f"{self.epoch}.{self.number}"

    @property
    def tag(self) -> int:
        """31 bits that tell this op's messages from those of others."""
        return zlib.crc32(f"{self.place} {self.signature}".encode()) & 0x7FFFFFFF


class _Status(NamedTuple):
    letter: str
    place: str
    text: str

    @property
    def epoch(self) -> int:
        return int(self.place.split(".")[0] or 0)


class Agreement:
    """The signatures the ranks of one group have agreed on so far, and the place where this rank stands."""

    def __init__(self, group: ProcessGroup):
        store = group.get_group_store() if hasattr(group, "get_group_store") else None
        if store is None:
            store = dist.PrefixStore(group.group_name, dist.distributed_c10d._get_default_store())
        self._store = dist.PrefixStore("seqpar", store)
        self._rank, self._ranks = group.rank(), group.size()
        self.timeout = _timeout_of(group)
        self._known: set[str] = set()
        self._latest = "nothing"
        self._failed = False
        self._epoch = self._number = 0
        self._broken: str | None = None
        self.conversions = 0  # how often parallelize has been called on this group

    def begin(self, signature: str) -> Ticket:
        """:meth:`require`, and the op's place among those of the group."""
        self.require(signature)
        self._number += 1
        return Ticket(signature, self._epoch, self._number)

    def require(self, signature: str) -> None:
        """Return when every rank is about to run ``signature``; asks once.

        Raises:
            RuntimeError: another rank runs something else, failed its checks, or did not come within the time-out.
        """
        self._latest = signature
        if self._broken is not None:
            self._start_afresh()
        if signature in self._known and not self._failed:
            return
        self._failed = False
        if signature in self._known:
            self._say(_RUNNING, signature)
            return
        self._store.set(self._key(signature, self._rank), "1")
        self._say(_WAITING, signature)
        try:
            self._meet(signature)
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._store.delete_key(self._key(signature, self._rank))
            self.fail(str(error))  # not waiting any more
            raise
        self._say(_RUNNING, signature)
        self._known.add(signature)

    def fail(self, reason: str) -> None:
        """Tell peers that wait for us in :meth:`require` why this rank will not come."""
        with contextlib.suppress(Exception):  # the original error matters more than the store's
            self._failed = True
            self._say(_FAILED, reason)

    def give_up(self, ticket: Ticket, error: BaseException) -> None:
        """This rank failed in the midst of an op: peers that wait for it hear why, and the epoch is over."""
        self.note_break(ticket, f"rank {self._rank} failed in {ticket.signature}: {type(error).__name__}: {error}")

    def refuse(self, reason: str) -> None:
        """This rank stopped between two ops, and peers that have not met the reason may wait for it in the next."""
        self._break(f"rank {self._rank} stopped before its next op: {reason}")

    def note_break(self, ticket: Ticket, reason: str) -> None:
        """The epoch of ``ticket`` is over because of ``reason``, which was found while this rank waits in it."""
        if ticket.epoch == self._epoch and self._broken is None:
            self._break(reason)

    def suspect(self, ticket: Ticket) -> str | None:
        """Where the others stand, for a rank that has waited long in ``ticket``: why the wait is in vain, if it is."""
        broken = self.cause_of_break(ticket.epoch)
        if broken is not None:
            return broken
        self._say(_STUCK, ticket.signature, ticket.place)
        for rank in range(self._ranks):
            if rank == self._rank:
                continue
            status = self._status(rank)
            # Where a rank waits for what we have met already, it does not wait for us.
            elsewhere = status.letter == _STUCK or (status.letter == _WAITING and status.text not in self._known)
            if status.place == ticket.place and status.text != ticket.signature and elsewhere:
                return f"the ranks disagree: {self._both(ticket.signature, rank, status.text)}"
        return None

    @property
    def broken(self) -> bool:
        """Whether this rank knows that the present epoch is over."""
        return self._broken is not None

    @property
    def epoch(self) -> int:
        return self._epoch

    def cause_of_break(self, epoch: int) -> str | None:
        """What broke ``epoch``; None where nothing is known to have done so."""
        key = f"broken/{epoch}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def publish(self, key: str, text: str) -> None:
        """For the eyes of the peers: :meth:`read` it there."""
        self._store.set(f"{key}/{self._rank}", text)

    def read(self, key: str, rank: int) -> str:
        """What ``rank`` has published under ``key``; "" for nothing."""
        key = f"{key}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def share(self, name: str, text: str | None) -> str:
        """Rank 0's ``text`` on every rank; the others pass None and wait for it.

        Raises:
            RuntimeError: rank 0 did not come within the time-out.
        """
        if text is not None:
            self._store.set(name, text)
            return text
        try:
            self._store.wait([name], self.timeout)
        except Exception as error:
            raise RuntimeError(
                f"rank 0 did not reach its first op on this group within the time-out of {self.timeout}, or is gone; "
                f"the others plan with its {name}"
            ) from error
        shared: str = self._store.get(name).decode()
        return shared

    def diagnose(self, peer: int) -> str:
        """After a failed transfer: what ``peer`` says it was doing, if it still says anything."""
        try:
            self.publish("failed", self._latest)
            key = f"failed/{peer}"
            self._store.wait([key], timedelta(seconds=2))
            return f"rank {peer} was in {self._store.get(key).decode()}"
        except Exception:
            return f"rank {peer} gave no sign of life"

    def _start_afresh(self) -> None:
        """Begin a new epoch, with all ranks, after something broke the last one."""
        reason, signature = self._broken, f"a fresh start after epoch {self._epoch}"
        self._epoch, self._number, self._failed = self._epoch + 1, 0, False
        self._store.set(self._key(signature, self._rank), "1")
        self._say(_WAITING, signature)
        try:
            self._meet(signature)
        except BaseException as error:
            self._epoch -= 1
            raise RuntimeError(f"this group stopped when {reason}; the ranks did not start afresh: {error}") from error
        self._broken = None
        self._say(_RUNNING, signature)
        self._known.add(signature)

    def _meet(self, signature: str) -> None:
        """Poll until all peers have said ``signature``, or what they say shows that they never will."""
        missing = [rank for rank in range(self._ranks) if rank != self._rank]
        start, pause = time.monotonic(), 0.0002
        failed_since: dict[int, float] = {}
        while True:
            missing = [rank for rank in missing if not self._store.check([self._key(signature, rank)])]
            if not missing:
                return
            broken = self.cause_of_break(self._epoch)
            if broken is not None:
                self._broken = broken
                raise RuntimeError(f"{signature}: the ranks will not meet, {broken}")
            now = time.monotonic()
            for rank in missing:
                status = self._status(rank)
                if status.letter == _FAILED:
                    if now - failed_since.setdefault(rank, now) > _GRACE_SECONDS:
                        raise RuntimeError(
                            f"rank {rank} refused its arguments while this rank came to {signature}: {status.text}"
                        )
                    continue
                failed_since.pop(rank, None)
                # A rank that has met us meanwhile may be further on: its key came before what it says now.
                if status.epoch != self._epoch or self._store.check([self._key(signature, rank)]):
                    continue
                if status.letter == _WAITING and status.text != signature and status.text not in self._known:
                    raise RuntimeError(
                        f"the ranks disagree, nothing was sent: {self._both(signature, rank, status.text)}"
                    )
                if status.letter == _STUCK and status.place == f"{self._epoch}.{self._number + 1}":
                    self._break(f"the ranks disagree: {self._both(signature, rank, status.text)}")
                    raise RuntimeError(self._broken)
            if now - start > self.timeout.total_seconds():
                last = self._status(missing[0]).text or "nothing"
                raise RuntimeError(
                    f"{signature}: rank {missing[0]} did not reach this op within the time-out of {self.timeout}, "
                    f"or is gone; the last that was heard of it: {last}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _both(self, signature: str, rank: int, other: str) -> str:
        return "; ".join(f"rank {who}: {what}" for who, what in sorted([(self._rank, signature), (rank, other)]))

    def _break(self, reason: str) -> None:
        self._broken = reason
        with contextlib.suppress(Exception):
            if self.cause_of_break(self._epoch) is None:  # the first to fail knows the cause
                self._store.set(f"broken/{self._epoch}", reason)

    @staticmethod
    def _key(signature: str, rank: int) -> str:
        return f"{zlib.crc32(signature.encode()):08x}-{len(signature)}/{rank}"

    def _say(self, letter: str, text: str, place: str = "") -> None:
        # A rank that waits for a signature stands before its next op.
        self.publish("status", f"{letter}{place or f'{self._epoch}.{self._number + 1}'} {text}")

    def _status(self, rank: int) -> _Status:
        said = self.read("status", rank)
        place, _, text = said[1:].partition(" ")
        return _Status(said[:1], place, text)


def _timeout_of(group: ProcessGroup) -> timedelta:
    """The group's own time-out; a subgroup may have another than the world."""
    own = getattr(group, "timeout", None)
    if isinstance(own, timedelta):
        return own
    for device in group._device_types:
        with contextlib.suppress(Exception):
            timeout = group._get_backend(device).options._timeout
            if isinstance(timeout, timedelta):
                return timeout
    return dist.default_pg_timeout


def per_group(make: Callable[[ProcessGroup], T]) -> Callable[[ProcessGroup], T]:
    """``make(group)``, once for each group of this process; forgotten with the group."""
    made: weakref.WeakKeyDictionary[ProcessGroup, T] = weakref.WeakKeyDictionary()

    @functools.wraps(make)
    def of(group: ProcessGroup) -> T:
        found = made.get(group)
        if found is None:
            found = made[group] = make(group)
        return found

    return of


class Remembered(dict[K, V]):
    """What was worked out for kinds of calls. Lengths that never come again must not fill memory: a full one starts
    anew."""

    MOST = 1024

    def __setitem__(self, kind: K, found: V) -> None:
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(kind, found)


@per_group
def agreement_of(group: ProcessGroup) -> Agreement:
    """The one Agreement of ``group`` in this process."""
    return Agreement(group)


def failure(rank: int, ticket: Ticket, doing: str, transfer: Transfer, cause: str) -> RuntimeError:
    """The error of a transfer that failed on ``rank``: op, chunk, both ranks and the cause."""
    rows, peer = transfer.rows, transfer.source if doing == "receiving" else transfer.target
    return RuntimeError(
        f"{ticket.signature}: {doing} chunk {rows.index} (rows {rows.start}..{rows.stop} of rank {rows.owner}, "
        f"{transfer.kind}) failed between rank {rank} and rank {peer}; {cause}"
    )


@contextlib.contextmanager
def checked_together(group: ProcessGroup | None) -> Iterator[None]:
    """Around argument checks: an error raised inside reaches the peers that wait for this rank."""
    try:
        yield
    except Exception as error:
        if group is not None and not torch.compiler.is_compiling():
            agreement_of(group).fail(f"{type(error).__name__}: {error}")
        raise
