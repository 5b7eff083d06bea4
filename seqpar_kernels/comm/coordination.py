"""Ranks compare an op's signature before they communicate, and learn of one another's failures.

A shape that differs between ranks makes NCCL hang and gloo abort the process. So a rank that calls an op with a new
signature publishes the signature in the group's store and waits until all ranks have published the same one. Then all
ranks go on, or all raise. Later calls with this signature cost one dict look-up. A rank that fails publishes its
failure, so that its peers do not wait for it. :mod:`.protocol` has the rules: what ranks count, what they publish, and
what a rank concludes from it.
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

__all__ = ["PATIENCE_SECONDS", "Coordination", "Ticket", "checked_together", "coordination_of", "failure", "group_gone"]

# How long peers wait for a rank that refused a call which is no step: it may have caught the error and come later.
_GRACE_SECONDS = 2.0
#: A rank that has waited longer than this for a transfer reads where its peers are.
PATIENCE_SECONDS = 1.0


class Coordination:
    """The signatures that the ranks of one group have agreed on, and the current step of this rank."""

    def __init__(self, group: ProcessGroup):
        store = group.get_group_store() if hasattr(group, "get_group_store") else None
        if store is None:
            store = dist.PrefixStore(group.group_name, dist.distributed_c10d._get_default_store())
        store = dist.PrefixStore("seqpar", store)
        self._rank, self._ranks = group.rank(), group.size()
        # A store may outlive a group. A new prefix keeps a later group of the same name from reading its keys.
        self._store = dist.PrefixStore(str(store.add(f"groups/{self._rank}", 1)), store)
        self.timeout = _timeout_of(group)
        self.conversions = 0  # how often parallelize has been called on this group in this epoch
        self._step = 0  # the last step that this rank began or refused
        self._epoch, self._met, self._generation, self._since = 1, 0, 0, 0
        self._passed = (0, 0)  # the last epoch that was left after a meeting, and the number of its meetings
        self._kinds: dict[str, int] = {}  # signature -> number, for those agreed on in this epoch
        self._hinted = self._meeting = False
        self._done = ""  # why no call can succeed any more
        self._why = ""  # why this rank left its last epoch
        self._told_epoch = 1  # the epoch of this rank that peers can certainly read in the store
        self._changing = threading.RLock()  # the watchdog may leave an epoch while another thread waits
        self._calls = threading.Lock()  # held from the begin of a step to its end
        self._caller: tuple[int, str] | None = None  # the thread and the signature of the step that is under way
        self._nested = 0
        self._seen: set[str] = set()
        self.publish("who", alive.identity())

    def begin(self, signature: str) -> Ticket:
        """The next step, once every rank is about to run ``signature``. :meth:`end` or :meth:`give_up` must follow.

        Raises:
            RuntimeError: another rank runs something else, failed its checks, or did not come within the time-out;
                another thread of this process runs a step on this group.
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
                    if self._kinds.get(signature) == kind:  # else the watchdog has ended the epoch since
                        self._step += 1
                        return Ticket(signature, self._epoch, self._step, self._generation, kind)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Note that the current step has succeeded."""
        if self._nested:
            self._nested -= 1
            return
        self._caller = None
        if self._calls.locked():
            self._calls.release()

    def give_up(self, ticket: Ticket, error: BaseException) -> None:
        """Note that the step of ``ticket`` has failed: publish ``error`` for the peers, and leave the epoch."""
        try:
            reason = f"rank {self._rank} failed in {ticket.signature}: {type(error).__name__}: {error}"
            self.note_break(ticket, reason)
            _mark_told(error)
        finally:
            self.end()

    def require(self, signature: str) -> None:
        """Return when all ranks have published ``signature``; they compare it once an epoch. This is no step.

        Raises:
            RuntimeError: as :meth:`begin`.
        """
        if signature not in self._kinds or self._hinted or self._done:
            inside_step = self._caller is not None and self._caller[0] == threading.get_ident()
            self._arrive(signature, self._step + (not inside_step))

    def fail(self, reason: str, *, step: bool = True) -> None:
        """Publish that this rank refuses the call that its peers make.

        Args:
            reason: the error text that the peers raise with.
            step: whether the call is a step. The peers' call of the same step then raises. Else only peers that wait
                for this rank in a meeting raise.
        """
        with contextlib.suppress(Exception):  # an error of the store must not hide the original one
            if step:
                self._leave(self._step + 1, f"rank {self._rank} refused its arguments: {reason}")
            else:
                self._hinted = True
                self._say(HINT, self._step + 1, reason)

    def stop(self, error: BaseException) -> None:
        """Publish that code of this rank failed outside of any call with ``error``: the peers' next call raises."""
        if not getattr(error, _TOLD, False):
            with contextlib.suppress(Exception):
                reason = f"rank {self._rank} stopped before its next op: {type(error).__name__}: {error}"
                self._leave(self._step + 1, reason)
                _mark_told(error)

    def go_on(self, steps: int, reason: str) -> None:
        """Begin a new epoch after a failure. All ranks call this; ``steps`` is the largest step any rank has begun."""
        self._leave(steps + 1, reason)

    def note_break(self, ticket: Ticket, reason: str) -> None:
        """Leave the epoch of ``ticket``, whose step cannot succeed because of ``reason``."""
        with self._changing:
            if ticket.epoch == self._epoch:
                self._leave(ticket.number, reason)

    def suspect(self, ticket: Ticket) -> str | None:
        """Publish that the step of ``ticket`` waits; returns why the wait cannot succeed, or None."""
        with self._changing:
            if ticket.epoch == self._epoch and not self._meeting:  # on a GPU the host may have begun later steps
                self._say(STUCK, ticket.number, ticket.signature)
        return self.void(ticket)

    def void(self, ticket: Ticket) -> str | None:
        """Why data received for ``ticket`` must not be used; None where no fault is known."""
        if ticket.epoch == self._epoch:
            for rank in self._others():
                theirs = self._where(rank)
                verdict = protocol.stuck(ticket, self._met, theirs)
                if verdict.kind != "wait":
                    assert theirs is not None
                    reason = self._reason(verdict.kind, ticket.signature, rank, theirs, in_transfer=True)
                    self.note_break(ticket, reason)
                    break
        return self._why if ticket.epoch != self._epoch else None

    def connection_lost(self, reason: str) -> None:
        """Make every later call on this group raise: gloo closes all connections of a rank when one is lost."""
        with contextlib.suppress(Exception), self._changing:
            if not self._done:
                self._done = reason
                self._say(DONE, self._step, reason)

    @property
    def steps(self) -> int:
        """How many communicating calls this rank has begun or refused."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch of this rank; every failure begins another."""
        return self._epoch

    @property
    def unsettled(self) -> bool:
        """Whether this rank has left an epoch and does not know yet that all others have."""
        return not self._met and self._epoch > 1 and not self._done

    @property
    def told_epoch(self) -> int:
        """The epoch of this rank as its peers read it."""
        return self._told_epoch

    def publish(self, key: str, text: str) -> None:
        """Put ``text`` in the store, where the peers :meth:`read` it."""
        self._store.set(f"{key}/{self._rank}", text)

    def read(self, key: str, rank: int) -> str:
        """What ``rank`` has published under ``key``, "" where it has not. Keys are never removed."""
        key = f"{key}/{rank}"
        if key not in self._seen:
            if not self._store.check([key]):
                return ""
            self._seen.add(key)
        return self._store.get(key).decode()

    def register(self, rank: int) -> Register | None:
        """The register of ``rank``; None before its first entry."""
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
        """What ``peer`` last published, for the error of a failed transfer."""
        try:
            if self._gone(peer):
                return f"the process of rank {peer} has ended"
            said = self.register(peer)
            return f"rank {peer} last reported: {said.text}" if said else f"rank {peer} never reported anything"
        except Exception:
            return f"neither rank {peer} nor the store answers"

    def _arrive(self, signature: str, step: int) -> int:
        """Meet the others at ``signature``; returns the signature's number, the same on all ranks."""
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
                raise RuntimeError(f"{signature}: this group has had {generation} failures: make a new group")
        except BaseException as error:
            with contextlib.suppress(Exception):  # no effect where this rank has left the epoch already
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
            if len(self._kinds) >= MOST_KINDS:  # happens on every rank in the same meeting
                self._kinds.clear()
            self._kinds[signature] = number = len(self._kinds)
            return number

    def _meet(self, signature: str, step: int) -> tuple[int, int]:
        """Poll until all peers have come to this meeting; raise where a register shows that one never will.

        Returns:
            tuple: generation and epoch.
        """
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
            if self._epoch != mine.epoch:  # a call of another thread was refused
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
                        if not mine.met:  # in an epoch's first meeting registers hold the earlier generation
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
                    raise RuntimeError(f"{reason}; this rank called {signature}")
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
            f"it last reported: {last.text if last else 'nothing'}"
        )
        if not self._met:  # no step of this epoch has begun, so a late rank may follow to the next epoch
            self._since = self._since or step
            self._leave(step, text, keep_since=True)
        raise RuntimeError(text)

    def _leave(self, step: int, reason: str, *, keep_since: bool = False) -> None:
        """End the epoch at ``step``: the next step begins a new epoch. A second call for one ``step`` does nothing."""
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
            with contextlib.suppress(Exception):  # the store may be gone
                self.publish("why", reason)
                self._say(LEFT, self._epoch, "")
                self._store.get(f"status/{self._rank}")  # set() returns before the server has the value, get() after
                self._told_epoch = self._epoch

    def _reason(self, kind: str, signature: str, rank: int, theirs: Register, in_transfer: bool = False) -> str:
        """The text of a verdict; ``in_transfer``: this rank has sent messages of the step."""
        if kind == "done":
            self.connection_lost(theirs.text)
            return theirs.text
        if kind == "left":
            return self.read("why", rank) or f"rank {rank} has failed"
        if kind == "hint":
            return f"rank {rank} refused its arguments: {theirs.text}"
        both = sorted([(self._rank, signature), (rank, theirs.text)])
        sent = "" if in_transfer or theirs.letter == STUCK else ", nothing was sent"
        return f"the ranks disagree{sent}: " + "; ".join(f"rank {who}: {what}" for who, what in both)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._ranks) if rank != self._rank]

    def _where(self, rank: int) -> Register | None:
        """:meth:`register`; where the store is gone, a register that says so."""
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
        """Begin a step inside another step of this thread; raise where the other step is another thread's."""
        caller = self._caller
        if caller is not None and caller[0] == threading.get_ident():
            self._nested += 1
            return
        running = caller[1] if caller is not None else "another op"
        error = RuntimeError(
            f"group: two threads use one group at once: one runs {running}, another called {signature}. Ranks cannot "
            f"tell their messages apart; give each thread a group of its own (dist.new_group), or let one thread wait "
            f"for the other"
        )
        self._leave(self._step + 1, f"rank {self._rank}: {error}")
        _mark_told(error)
        raise error


def _timeout_of(group: ProcessGroup) -> timedelta:
    """The group's own time-out, which may differ from that of the default group."""
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
def coordination_of(group: ProcessGroup) -> Coordination:
    """The one Coordination of ``group`` in this process."""
    return Coordination(group)


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


_TOLD = "_seqpar_told"  # an attribute of errors that the peers know of


def _mark_told(error: BaseException) -> None:
    """Mark ``error`` as published, so that an outer block does not publish it again."""
    with contextlib.suppress(AttributeError):
        setattr(error, _TOLD, True)


@contextlib.contextmanager
def checked_together(group: ProcessGroup | None, *, step: bool = True) -> Iterator[None]:
    """A block of argument checks: an error raised inside is published to the peers that wait for this rank.

    ``step``: whether the checked call communicates; the peers' call of the same step then raises too.
    """
    try:
        yield
    except Exception as error:
        told = getattr(error, _TOLD, False)
        if group is not None and not told and not torch.compiler.is_compiling():
            coordination_of(group).fail(f"{type(error).__name__}: {error}", step=step)
            _mark_told(error)
        raise
