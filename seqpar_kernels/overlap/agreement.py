"""Ranks agree on what they are about to do before they do it.

A shape that differs between ranks makes NCCL hang and gloo abort the process. So the first time a rank meets an op
signature it publishes it in the group's store and waits for the others': all raise, or none. Later calls cost a set
look-up. A rank that fails its own argument checks publishes that too, so that its peers do not wait for it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_FAILED = "!"


class Agreement:
    """The signatures the ranks of one group have agreed on so far."""

    def __init__(self, group: ProcessGroup):
        store = group.get_group_store() if hasattr(group, "get_group_store") else None
        if store is None:
            store = dist.PrefixStore(group.group_name, dist.distributed_c10d._get_default_store())
        self._store = dist.PrefixStore("seqpar", store)
        self._rank, self._ranks = group.rank(), group.size()
        self._known: set[str] = set()
        self._rounds = 0
        self._latest = "nothing"

    def require(self, signature: str, *, remember: bool = True) -> None:
        """Return when every rank is about to run ``signature``; asks once, or with ``remember=False`` every time.

        Raises:
            RuntimeError: another rank runs something else, failed its checks, or did not come within the time-out.
        """
        self._latest = signature
        if signature in self._known:
            return
        answers = self._exchange(signature)
        failed = {rank: text[1:] for rank, text in answers.items() if text.startswith(_FAILED)}
        if failed:
            rank, text = next(iter(failed.items()))
            raise RuntimeError(f"rank {rank} refused its arguments while this rank came to {signature}: {text}")
        if any(text != signature for text in answers.values()):
            listing = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(answers.items()))
            raise RuntimeError(f"the ranks disagree, nothing was sent: {listing}")
        if remember:
            self._known.add(signature)

    def fail(self, reason: str) -> None:
        """Tell peers that meet us in :meth:`require` why this rank will not come."""
        with contextlib.suppress(Exception):  # the original error matters more than the store's
            self._store.set(f"{self._rounds}/{self._rank}", _FAILED + reason)
            self._rounds += 1

    def _exchange(self, text: str) -> dict[int, str]:
        number, self._rounds = self._rounds, self._rounds + 1
        self._store.set(f"{number}/{self._rank}", text)
        answers = {self._rank: text}
        for rank in range(self._ranks):
            if rank != self._rank:
                try:
                    answers[rank] = self._store.get(f"{number}/{rank}").decode()
                except Exception as error:
                    raise RuntimeError(
                        f"{text}: rank {rank} did not reach this op within the time-out, "
                        f"or is gone ({_first_line(error)})"
                    ) from error
        return answers

    def diagnose(self, peer: int) -> str:
        """After a failed transfer: what ``peer`` says it was doing, if it still says anything."""
        try:
            self._store.set(f"failed/{self._rank}", self._latest)
            key = f"failed/{peer}"
            self._store.wait([key], timedelta(seconds=2))
            return f"rank {peer} was in {self._store.get(key).decode()}"
        except Exception:
            return f"rank {peer} gave no sign of life"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    except (ValueError, TypeError, RuntimeError) as error:
        if group is not None and not torch.compiler.is_compiling():
            agreement_of(group).fail(f"{type(error).__name__}: {error}")
        raise
