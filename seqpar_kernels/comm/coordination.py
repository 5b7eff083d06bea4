"""Ranks agree on what they are about to do before they do it, and hear of one another when it goes wrong.

A shape that differs between ranks makes NCCL hang and gloo abort the process. So the first time a rank meets an op
signature it says so in the group's store and waits until the others have met it too: all go on, or all raise. Later
calls cost a look-up. A rank that fails says that too, so that its peers do not wait for it. The rules are those of
:mod:`.protocol`: what is counted, what is said, and what may be concluded from it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..caches import per_group
from . import alive, protocol
from .protocol import DONE, HINT, LEFT, MOST_GENERATIONS, MOST_KINDS, RUNNING, STUCK, WAITING, Register, Ticket
from .steps import Transfer

__all__ = ["PATIENCE_SECONDS", "Agreement", "Ticket", "agreement_of", "checked_together", "failure", "group_gone"]

# A rank that refused a call which is no step may have caught its error and be on its way: so long its peers wait.
_GRACE_SECONDS = 2.0
#: Who has waited longer than this for a transfer asks the others where they are.
PATIENCE_SECONDS = 1.0


class Agreement:
    """What the ranks of one group have agreed on so far, and the step where this rank stands."""

    def __init__(self, group: ProcessGroup):
        store = group.get_group_store() if hasattr(group, "get_group_store") else None
        if store is None:
            store = dist.PrefixStore(group.group_name, dist.distributed_c10d._get_default_store())
        store = dist.PrefixStore("seqpar", store)
        self._rank, self._ranks = group.rank(), group.size()
        # A store may outlive a group, and another of the same name find what its ranks have said.
        self._store = dist.PrefixStore(str(store.add(f"groups/{self._rank}", 1)), store)
        self.timeout = _timeout_of(group)
        self.conversions = 0  # how often parallelize has been called on this group in this epoch
        self._step = 0  # the last one that was begun or refused
        self._epoch, self._met, self._generation, self._since = 1, 0, 0, 0
        self._passed = (0, 0)  # the last epoch that was left after a meeting, and the number of its meetings
        self._kinds: dict[str, int] = {}  # signatures met in this epoch
        self._hinted = self._meeting = False
        self._done = ""  # why no call can succeed any more
        self._why = ""  # this rank left its last epoch
        self._told_epoch = 1  # the epoch of this rank that certainly stands in the store
        self._changing = threading.RLock()  # a watch may leave an epoch on behalf of a thread that waits
        self._calls = threading.Lock()  # held from the begin of a step to its end
        self._caller: tuple[int, str] | None = None  # the thread and the signature of the step that is under way
        self._nested = 0
        self._seen: set[str] = set()
        self.publish("who", alive.identity())

    def begin(self, signature: str) -> Ticket:
        """The next step, once every rank is about to run ``signature``. :meth:`end` or :meth:`give_up` must follow.

        Raises:
            RuntimeError: another rank runs something else, failed its checks, or did not come within the time-out;
                another thread of this process is amid a step.
        """
        if self._calls.acquire(False):
            self._caller = (threading.get_ident(), signature)
        else:
            self._enter_beside(signature)
        try:
            while True:
                kind = self._kinds.get(signature)
                if kind is None or self._hinted or self._done:
                    kind = self._arrive(signature, self._step + 1)
                with self._changing:
                    if self._kinds.get(signature) == kind:  # a watch has not ended the epoch meanwhile
                        self._step += 1
                        return Ticket(signature, self._epoch, self._step, self._generation, kind)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """The step that was begun last is over."""
        if self._nested:
            self._nested -= 1
            return
        self._caller = None
        if self._calls.locked():
            self._calls.release()

    def give_up(self, ticket: Ticket, error: BaseException) -> None:
        """The step of ``ticket`` has failed: peers that wait for this rank hear why, and the epoch is over."""
        try:
            reason = f"rank {self._rank} failed in {ticket.signature}: {type(error).__name__}: {error}"
            self.note_break(ticket, reason)
            _mark_told(error)
        finally:
            self.end()

    def require(self, signature: str) -> None:
        """Return when every rank is about to do what ``signature`` says; asks once an epoch. No step by itself.

        Raises:
            RuntimeError: as :meth:`begin`.
        """
        if signature not in self._kinds or self._hinted or self._done:
            amid = self._caller is not None and self._caller[0] == threading.get_ident()
            self._arrive(signature, self._step + (not amid))

    def fail(self, reason: str, *, step: bool = True) -> None:
        """This rank will not make the call that its peers make or are about to make.

        Args:
            reason: for the peers.
            step: whether the call would have been a step. The peers' raises then, whatever they know. Else only those
                hear of it that wait for this rank in a meeting.
        """
        with contextlib.suppress(Exception):  # the original error matters more than the store's
            if step:
                self._leave(self._step + 1, f"rank {self._rank} refused its arguments: {reason}")
            else:
                self._hinted = True
                self._say(HINT, self._step + 1, reason)

    def stop(self, error: BaseException) -> None:
        """The code around the calls of this rank has failed with ``error``: the next call of its peers raises too."""
        if not getattr(error, "_seqpar_told", False):
            with contextlib.suppress(Exception):
                reason = f"rank {self._rank} stopped before its next op: {type(error).__name__}: {error}"
                self._leave(self._step + 1, reason)
                _mark_told(error)

    def go_on(self, steps: int, reason: str) -> None:
        """All ranks call this after a failure; ``steps``: the most that one of them has begun. They meet again."""
        self._leave(steps + 1, reason)

    def note_break(self, ticket: Ticket, reason: str) -> None:
        """The step of ``ticket`` cannot succeed because of ``reason``."""
        with self._changing:
            if ticket.epoch == self._epoch:
                self._leave(ticket.number, reason)

    def suspect(self, ticket: Ticket) -> str | None:
        """Tell the others that ``ticket`` waits. Why the wait is in vain, if it is."""
        with self._changing:
            if ticket.epoch == self._epoch and not self._meeting:  # on a GPU the host may be further on
                self._say(STUCK, ticket.number, ticket.signature)
        return self.void(ticket)

    def void(self, ticket: Ticket) -> str | None:
        """Why nothing that comes for ``ticket`` may be believed; None where all is well or may only be slow."""
        if ticket.epoch == self._epoch:
            for rank in self._others():
                theirs = self._where(rank)
                verdict = protocol.stuck(ticket, self._met, theirs)
                if verdict.kind != "wait":
                    assert theirs is not None
                    reason = self._reason(verdict.kind, ticket.signature, rank, theirs, amid=True)
                    self.note_break(ticket, reason)
                    break
        return self._why if ticket.epoch != self._epoch else None

    def connection_lost(self, reason: str) -> None:
        """No call on this group can succeed any more: gloo closes all connections of a rank when one is lost."""
        with contextlib.suppress(Exception), self._changing:
            if not self._done:
                self._done = reason
                self._say(DONE, self._step, reason)

    @property
    def steps(self) -> int:
        """How many calls that communicate this rank has begun, or was refused."""
        return self._step

    @property
    def epoch(self) -> int:
        """That of this rank: another after every failure."""
        return self._epoch

    @property
    def unsettled(self) -> bool:
        """Whether this rank has left an epoch and does not know yet that all others have."""
        return not self._met and self._epoch > 1 and not self._done

    @property
    def told_epoch(self) -> int:
        """That of this rank in the eyes of the others."""
        return self._told_epoch

    def publish(self, key: str, text: str) -> None:
        """For the eyes of the peers: :meth:`read` it there."""
        self._store.set(f"{key}/{self._rank}", text)

    def read(self, key: str, rank: int) -> str:
        """What ``rank`` has published under ``key``; "" for nothing. Keys are never taken away."""
        key = f"{key}/{rank}"
        if key not in self._seen:
            if not self._store.check([key]):
                return ""
            self._seen.add(key)
        return self._store.get(key).decode()

    def register(self, rank: int) -> Register | None:
        """Where ``rank`` says it stands."""
        return Register.of(self.read("status", rank))

    def share(self, name: str, text: str | None) -> str:
        """Rank 0's ``text`` on every rank; the others pass None and wait for it.

        Raises:
            RuntimeError: rank 0 did not come within the time-out.
        """
        if text is not None:
            self._store.set(name, text)
            return text
        start, pause = time.monotonic(), 0.0002
        while not self._store.check([name]):
            waited = time.monotonic() - start
            if waited > self.timeout.total_seconds() or (waited > PATIENCE_SECONDS and self._gone(0)):
                raise RuntimeError(
                    f"rank 0 did not reach its first op on this group within the time-out of {self.timeout}, or is "
                    f"gone; the others plan with its {name}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        shared: str = self._store.get(name).decode()
        return shared

    def diagnose(self, peer: int) -> str:
        """After a failed transfer: what ``peer`` was doing, as far as can be heard."""
        try:
            if self._gone(peer):
                return f"the process of rank {peer} has ended"
            said = self.register(peer)
            return f"the last that rank {peer} said: {said.text}" if said else f"rank {peer} never said anything"
        except Exception:
            return f"rank {peer} gave no sign of life, nor did the store"

    def _arrive(self, signature: str, step: int) -> int:
        """Meet the others at ``signature``. Its number, alike on all ranks."""
        if self._done:
            raise RuntimeError(f"{signature}: this group cannot be used any more, make a new one: {self._done}")
        if self._hinted:
            self._hinted = False
            self._say(RUNNING, step, "")
        if signature in self._kinds:
            return self._kinds[signature]
        self._meeting = True
        try:
            generation, epoch = self._meet(signature, step)
            if not self._met and generation >= MOST_GENERATIONS:
                raise RuntimeError(f"{signature}: this group has failed and gone on {generation} times: make a new one")
        except BaseException as error:
            with contextlib.suppress(Exception):  # where it has not been left for a reason of its own
                self._leave(self._step + (step > self._step), f"rank {self._rank}: {error}")
                _mark_told(error)
            raise
        finally:
            self._meeting = False
        with self._changing:
            if self._epoch != epoch:
                raise RuntimeError(f"{signature}: {self._why}")
            self._generation = generation
            self._met, self._since = self._met + 1, 0
            if len(self._kinds) >= MOST_KINDS:  # on every rank in the same meeting
                self._kinds.clear()
            self._kinds[signature] = number = len(self._kinds)
            return number

    def _meet(self, signature: str, step: int) -> tuple[int, int]:
        """Poll until all peers have come, or what they say shows that they never will. The generation and epoch."""
        generation = self._generation
        try:
            mine = self._say(WAITING, step, signature)
        except Exception as error:
            self._done = f"the store in which its ranks meet is gone: {type(error).__name__}: {error}"
            raise RuntimeError(f"{signature}: {self._done}") from error
        missing, hinted_since = self._others(), dict[int, float]()
        start = looked = time.monotonic()
        pause = 0.0002
        while missing:
            if self._epoch != mine.epoch:  # another thread's call was refused
                raise RuntimeError(f"{signature}: {self._why}")
            now = time.monotonic()
            for rank in missing[:]:
                theirs = self._where(rank)
                verdict = protocol.meeting(mine, theirs)
                if verdict.kind == "hint":
                    if now - hinted_since.setdefault(rank, now) <= _GRACE_SECONDS:
                        continue
                elif verdict.kind in ("wait", "met"):
                    hinted_since.pop(rank, None)
                    if verdict.kind == "met" and theirs is not None:
                        missing.remove(rank)
                        if not mine.met:  # who waits here is still of an earlier one
                            begun = theirs.generation + (not theirs.meetings(mine.epoch))
                            generation = max(generation, begun, mine.generation + 1)
                    continue
                assert theirs is not None
                if verdict.kind == "follow":
                    with self._changing:
                        self._step, self._epoch = theirs.epoch - 1, theirs.epoch
                    return self._meet(signature, theirs.epoch)
                reason = self._reason(verdict.kind, signature, rank, theirs)
                self._leave(step, reason)
                if reason.startswith(("the ranks disagree", f"rank {rank} refused")):
                    raise RuntimeError(f"{reason}; this rank came to {signature}")
                raise RuntimeError(f"{signature}: the ranks will not meet, {reason}")
            if not missing:
                break
            if now - looked > PATIENCE_SECONDS / 2:
                looked = now
                for rank in missing:
                    if self._gone(rank):
                        self.connection_lost(f"the process of rank {rank} has ended")
                        raise RuntimeError(f"{signature}: rank {rank} is gone, {self._done}")
            if now - start > self.timeout.total_seconds():
                self._give_up_waiting(signature, step, missing[0])
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return generation, mine.epoch

    def _give_up_waiting(self, signature: str, step: int, rank: int) -> NoReturn:
        last = self.register(rank)
        text = (
            f"{signature}: rank {rank} did not reach this op within the time-out of {self.timeout}, or is gone; "
            f"the last that was heard of it: {last.text if last else 'nothing'}"
        )
        if not self._met:  # nothing has begun: a rank that comes late may follow to the next epoch
            self._since = self._since or step
            self._leave(step, text, keep_since=True)
        raise RuntimeError(text)

    def _leave(self, step: int, reason: str, *, keep_since: bool = False) -> None:
        """Raise in ``step``: stand before the next, in the epoch that begins with it. Once for each ``step``."""
        with self._changing:
            if step < self._epoch:
                return  # left already
            self._step = max(self._step, step)
            if self._met:
                self._passed = (self._epoch, self._met)
            self._epoch, self._met = self._step + 1, 0
            self._kinds.clear()
            self.conversions = 0
            self._hinted = False
            self._since = self._since if keep_since else 0
            self._why = reason
            if self._done:
                return
            with contextlib.suppress(Exception):  # a store that is gone has nothing to tell
                self.publish("why", reason)
                self._say(LEFT, self._epoch, "")
                self._store.get(f"status/{self._rank}")  # a set returns before it is done, a get does not
                self._told_epoch = self._epoch

    def _reason(self, kind: str, signature: str, rank: int, theirs: Register, amid: bool = False) -> str:
        """In words; ``amid``: this rank is in a transfer."""
        if kind == "done":
            self.connection_lost(theirs.text)
            return theirs.text
        if kind == "left":
            return self.read("why", rank) or f"rank {rank} has failed"
        if kind == "hint":
            return f"rank {rank} refused its arguments: {theirs.text}"
        both = sorted([(self._rank, signature), (rank, theirs.text)])
        sent = "" if amid or theirs.letter == STUCK else ", nothing was sent"
        return f"the ranks disagree{sent}: " + "; ".join(f"rank {who}: {what}" for who, what in both)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._ranks) if rank != self._rank]

    def _where(self, rank: int) -> Register | None:
        """:meth:`register`; without the store there is no way to go on."""
        try:
            return self.register(rank)
        except Exception as error:
            self._done = self._done or f"the store in which its ranks meet is gone: {type(error).__name__}: {error}"
            return Register(DONE, 0, 0, 0, 0, 0, 0, 0, self._done)

    def _gone(self, rank: int) -> bool:
        return alive.ended(self.read("who", rank))

    def _say(self, letter: str, step: int, text: str) -> Register:
        with self._changing:
            numbers = (self._epoch, step, self._met, self._generation, self._since, *self._passed)
            said = Register(letter, *numbers, text)
            self.publish("status", said.to_text())
            return said

    def _enter_beside(self, signature: str) -> None:
        """A step is under way: it may be one of this thread's, around this one."""
        caller = self._caller
        if caller is not None and caller[0] == threading.get_ident():
            self._nested += 1
            return
        amid = caller[1] if caller is not None else "another op"
        error = RuntimeError(
            f"group: two threads use one group at once: {amid} is under way in one while another came to {signature}. "
            f"Ranks could not tell their messages apart; give each thread a group of its own (dist.new_group), or let "
            f"one thread wait for the other"
        )
        self._leave(self._step + 1, f"rank {self._rank}: {error}")
        _mark_told(error)
        raise error


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


@per_group
def agreement_of(group: ProcessGroup) -> Agreement:
    """The one Agreement of ``group`` in this process."""
    return Agreement(group)


def group_gone(signature: str) -> RuntimeError:
    """The error of a call whose group nobody holds any more."""
    return RuntimeError(f"{signature}: its process group is gone; hold the group for as long as it is used")


def failure(rank: int, ticket: Ticket, doing: str, transfer: Transfer, cause: str) -> RuntimeError:
    """The error of a transfer that failed on ``rank``: op, chunk, both ranks and the cause."""
    rows, peer = transfer.rows, transfer.source if doing == "receiving" else transfer.target
    return RuntimeError(
        f"{ticket.signature}: {doing} chunk {rows.index} (rows {rows.start}..{rows.stop} of rank {rows.owner}, "
        f"{transfer.buffer}) failed between rank {rank} and rank {peer}; {cause}"
    )


def _mark_told(error: BaseException) -> None:
    """The peers know of it: it is not to be counted again on its way up."""
    with contextlib.suppress(AttributeError):
        error._seqpar_told = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def checked_together(group: ProcessGroup | None, *, step: bool = True) -> Iterator[None]:
    """Around argument checks: an error raised inside reaches the peers that wait for this rank.

    ``step``: whether the call that is checked communicates; the peers' call of the same step then raises too.
    """
    try:
        yield
    except Exception as error:
        told = getattr(error, "_seqpar_told", False)
        if group is not None and not told and not torch.compiler.is_compiling():
            agreement_of(group).fail(f"{type(error).__name__}: {error}", step=step)
            _mark_told(error)
        raise
