"""Ranks agree on what they are about to do before they do it.

A shape that differs between ranks makes NCCL hang and gloo abort the process. So the first time a rank meets an op
signature it says so in the group's store and waits until the others have met it too: all go on, or all raise. Later
calls cost a set look-up. A rank that fails its own argument checks says that too, so that its peers do not wait for it.
"""

from __future__ import annotations

import contextlib
import time
import weakref
import zlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# What a rank says of itself: the first letter of its status.
_WAITING, _RUNNING, _FAILED = "W", "R", "F"
# A rank that failed may have caught its error and be on its way: so long its peers wait before they believe it.
_GRACE_SECONDS = 2.0


class Agreement:
    """The signatures the ranks of one group have agreed on so far."""

    def __init__(self, group: ProcessGroup):
        store = group.get_group_store() if hasattr(group, "get_group_store") else None
        if store is None:
            store = dist.PrefixStore(group.group_name, dist.distributed_c10d._get_default_store())
        self._store = dist.PrefixStore("seqpar", store)
        self._rank, self._ranks = group.rank(), group.size()
        self._timeout = _timeout_of(group)
        self._known: set[str] = set()
        self._latest = "nothing"
        self._failed = False
        self.conversions = 0  # how often parallelize has been called on this group

    def require(self, signature: str) -> None:
        """Return when every rank is about to run ``signature``; asks once.

        Raises:
            RuntimeError: another rank runs something else, failed its checks, or did not come within the time-out.
        """
        self._latest = signature
        if signature in self._known and not self._failed:
            return
        self._failed = False
        if signature in self._known:
            self._say(_RUNNING + signature)
            return
        self._store.set(self._key(signature, self._rank), "1")
        self._say(_WAITING + signature)
        try:
            self._meet(signature)
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._store.delete_key(self._key(signature, self._rank))
            self.fail(str(error))  # not waiting any more
            raise
        self._say(_RUNNING + signature)
        self._known.add(signature)

    def fail(self, reason: str) -> None:
        """Tell peers that wait for us in :meth:`require` why this rank will not come."""
        with contextlib.suppress(Exception):  # the original error matters more than the store's
            self._failed = True
            self._say(_FAILED + reason)

    def diagnose(self, peer: int) -> str:
        """After a failed transfer: what ``peer`` says it was doing, if it still says anything."""
        try:
            self._store.set(f"failed/{self._rank}", self._latest)
            key = f"failed/{peer}"
            self._store.wait([key], timedelta(seconds=2))
            return f"rank {peer} was in {self._store.get(key).decode()}"
        except Exception:
            return f"rank {peer} gave no sign of life"

    def _meet(self, signature: str) -> None:
        """Poll until all peers have said ``signature``, or what they say shows that they never will."""
        missing = [rank for rank in range(self._ranks) if rank != self._rank]
        start, pause = time.monotonic(), 0.0002
        failed_since: dict[int, float] = {}
        while True:
            missing = [rank for rank in missing if not self._store.check([self._key(signature, rank)])]
            if not missing:
                return
            now = time.monotonic()
            for rank in missing:
                status = self._status(rank)
                if status.startswith(_FAILED):
                    if now - failed_since.setdefault(rank, now) > _GRACE_SECONDS:
                        raise RuntimeError(
                            f"rank {rank} refused its arguments while this rank came to {signature}: {status[1:]}"
                        )
                    continue
                failed_since.pop(rank, None)
                if status.startswith(_WAITING) and status[1:] != signature and status[1:] not in self._known:
                    both = sorted([(self._rank, signature), (rank, status[1:])])
                    listing = "; ".join(f"rank {who}: {what}" for who, what in both)
                    raise RuntimeError(f"the ranks disagree, nothing was sent: {listing}")
            if now - start > self._timeout.total_seconds():
                last = self._status(missing[0])[1:] or "nothing"
                raise RuntimeError(
                    f"{signature}: rank {missing[0]} did not reach this op within the time-out of {self._timeout}, "
                    f"or is gone; the last that was heard of it: {last}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    @staticmethod
    def _key(signature: str, rank: int) -> str:
        return f"{zlib.crc32(signature.encode()):08x}-{len(signature)}/{rank}"

    def _say(self, status: str) -> None:
        self._store.set(f"status/{self._rank}", status)

    def _status(self, rank: int) -> str:
        key = f"status/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _timeout_of(group: ProcessGroup) -> timedelta:
    """The group's own time-out; a subgroup may have another than the world."""
    for device in group._device_types:
        with contextlib.suppress(Exception):
            timeout = group._get_backend(device).options._timeout
            if isinstance(timeout, timedelta):
                return timeout
    return dist.default_pg_timeout


_agreements: weakref.WeakKeyDictionary[ProcessGroup, Agreement] = weakref.WeakKeyDictionary()


def agreement_of(group: ProcessGroup) -> Agreement:
    """The one Agreement of ``group`` in this process."""
    found = _agreements.get(group)
    if found is None:
        found = _agreements[group] = Agreement(group)
    return found


@contextlib.contextmanager
def checked_together(group: ProcessGroup | None) -> Iterator[None]:
    """Around argument checks: an error raised inside reaches the peers that wait for this rank."""
    try:
        yield
    except Exception as error:
        if group is not None and not torch.compiler.is_compiling():
            agreement_of(group).fail(f"{type(error).__name__}: {error}")
        raise
