"""How the ranks of a group keep in step: what a rank publishes, and what its peers conclude.

**Steps.** Every rank numbers its communicating calls, for the life of the group: steps 1, 2, 3, ... Each call counts,
whether it succeeds, raises, or is refused for its arguments. Step s of one rank exchanges data with step s of the other
ranks only. A call that needs no communication (a norm) is no step.

**Epochs.** An epoch is a run of steps without a fault. Its name is the number of its first step. A rank that raises in
step s leaves its epoch; it is then in epoch s + 1, before its step s + 1. So all ranks that raise in one step come to
the same epoch without communication. A rank never goes back to an earlier epoch.

**Meetings.** A rank meets the others each time it comes to a signature (name, shapes, dtype ...) that is new in the
epoch. It publishes the signature, and waits until all ranks have published the same one at the same meeting; meetings
are counted within the epoch. Ranks that met give the signature the same short number. So the first call of an epoch
always meets, and no rank is in an epoch that another has not come to. A call with a known signature publishes nothing.

**Registers.** A rank publishes its state in one register of the store, which it alone writes. A register holds one
entry: ``letter epoch step met generation since left passed text``. The epoch only grows, and ``met`` only grows within
an epoch, so that a newer entry implies the older ones that a peer has missed. ``left`` is the last epoch that the rank
left after a meeting, ``passed`` the number of its meetings there. The letters:

- ``W``: waits in meeting ``met + 1`` of the epoch, before (or in) ``step``, with the signature ``text``.
- ``S``: is stuck in a transfer of ``step``, of the signature ``text``. The message that would end the wait is
  published under ``wait`` as long as the wait lasts, since the rank may leave the epoch before its wait ends.
- ``F``: has left an epoch (the reason is under ``why``) and has not come to the first meeting of the next one.
- ``H``: refused the arguments of a call that is no step; ``text`` is the error.
- ``R``: runs; written only to replace an ``H``.
- ``X``: can never use this group again (a connection was lost); ``text`` says why.

**Conclusions.** A rank of epoch e reads in a peer's register

- a later epoch: the peer has left e, or never was in it, so this call cannot be answered: raise. Two exceptions: a rank
  that has not begun its epoch follows a peer that only gave up waiting there (``since``); and where the peer left e
  after this very meeting (``left``, ``passed``), all ranks had published the same signature: met.
- an earlier epoch: the peer has not learned of the fault, or has still to raise in steps that others raised in: wait.
- ``W`` of the same meeting: met where signatures and steps are the same, else the ranks disagree: raise.
- more meetings than its own: the peer has passed this meeting, so all ranks had published the same signature: met.
- ``S`` in this or a later step, with fewer meetings: the peer never comes to this meeting: the ranks disagree.
- For a rank that is stuck itself: ``S`` in the same step with another signature, or ``W`` in a meeting that this rank
  has not been to, in no later step: the ranks disagree. Anything else may only be slow.

A rank that raises leaves its epoch, so that a fault reaches every rank, each in the first step that it cannot complete.
A rank may complete step s before it learns of a fault in s. It then raises in step s + 1. The faulty rank reads that
s + 1 was left and raises there too, so that all ranks continue with s + 2.

**Tags.** A message carries the generation (how many epochs there were; agreed on in an epoch's first meeting), the step
and the number of the signature, each modulo a power of two. In one epoch ranks that share messages are at most one step
apart, since a send in gloo ends when it is received. So no receive takes a message of another step, epoch or signature.

**Dummies.** A wait in gloo cannot be cancelled. A rank that has left an epoch ends the waits that peers in that epoch
have for it, by a message of the same tag and size (:mod:`.watchdog`). A dummy is never taken for data:

1. A dummy for a wait is sent only after the wait was published (under ``wait``, with a number of its own).
2. It is sent only by a rank whose later epoch is in the store already (the rank reads back what it wrote).
3. A rank that has published a wait of a step reads all registers after that wait, and after every later wait of the
   step, which has the same tag, before it uses what it received. It raises where any epoch is later.

A lock keeps a wait from ending while it is being published, so a rank knows which of its waits it has published. A
later epoch is in the store before any dummy can arrive, and rule 3 finds it. A step without a published wait, which
nearly every step is, reads nothing and publishes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

_GENERATIONS, _STEPS, _KINDS = 14, 6, 10  # bits of a tag; a higher bit is always set, since users use small tags

#: The most signatures that have a number at one time, and the most epochs that tags can tell apart.
MOST_KINDS, MOST_GENERATIONS = 1 << _KINDS, 1 << _GENERATIONS

WAITING, STUCK, LEFT, HINT, RUNNING, DONE = "W", "S", "F", "H", "R", "X"


class Ticket(NamedTuple):
    """One step of one group on one rank."""

    signature: str
    epoch: int
    number: int  # the number of the step
    generation: int = 0
    kind: int = 0  # the number of its signature

    @property
    def place(self) -> str:
        return f"{self.epoch}.{self.number}"

    @property
    def tag(self) -> int:
        """31 bits that differ from the tags of all other messages that may be in flight."""
        step = self.number & (1 << _STEPS) - 1
        return ((1 << _GENERATIONS | self.generation) << _STEPS | step) << _KINDS | self.kind


class Register(NamedTuple):
    """The published state of one rank."""

    letter: str
    epoch: int
    step: int  # the step in which, or before which, the rank is
    met: int  # meetings that the rank has passed in the epoch
    generation: int
    since: int  # the rank gave up waiting for peers in the steps from this one up to the epoch; 0: in none
    left: int  # the last epoch that the rank left after a meeting; 0: none
    passed: int  # meetings that the rank had passed there
    text: str

    def to_text(self) -> str:
        return " ".join(map(str, self))

    @staticmethod
    def of(text: str) -> Register | None:
        if not text:
            return None
        letter, *numbers, rest = text.split(" ", 8)
        epoch, step, met, generation, since, left, passed = map(int, numbers)
        return Register(letter, epoch, step, met, generation, since, left, passed, rest)

    def meetings(self, epoch: int) -> int:
        """How many meetings of ``epoch`` the rank has certainly passed."""
        return self.met if epoch == self.epoch else self.passed if epoch == self.left else 0


class Verdict(NamedTuple):
    """What a rank that waits concludes from one register."""

    kind: str  # "wait", "met", "follow", "left", "disagree", "hint" or "done"


_WAIT, _MET, _FOLLOW, _LEFT, _DISAGREE, _HINT, _DONE = map(
    Verdict, ("wait", "met", "follow", "left", "disagree", "hint", "done")
)


def meeting(mine: Register, theirs: Register | None) -> Verdict:
    """The verdict of a rank that waits in a meeting; ``mine`` is its own register, a ``W``."""
    if theirs is None:
        return _WAIT
    if theirs.letter == DONE:
        return _DONE
    if theirs.meetings(mine.epoch) > mine.met:
        return _MET
    if theirs.epoch > mine.epoch:
        waited = 0 < theirs.since <= mine.step and not mine.met and mine.epoch == mine.step
        return _FOLLOW if waited else _LEFT
    if theirs.epoch < mine.epoch:
        return _WAIT
    if theirs.letter == HINT:
        return _HINT
    if theirs.letter == WAITING and theirs.met == mine.met:
        return _MET if (theirs.text, theirs.step) == (mine.text, mine.step) else _DISAGREE
    if theirs.letter == STUCK and theirs.step >= mine.step:
        return _DISAGREE
    return _WAIT


def stuck(ticket: Ticket, met: int, theirs: Register | None) -> Verdict:
    """The verdict of a rank that has waited long in the step of ``ticket`` and has passed ``met`` meetings."""
    if theirs is None:
        return _WAIT
    if theirs.letter == DONE:
        return _DONE
    if theirs.epoch > ticket.epoch:
        return _LEFT
    if theirs.epoch < ticket.epoch:
        return _WAIT
    if theirs.letter == STUCK and theirs.step == ticket.number and theirs.text != ticket.signature:
        return _DISAGREE
    if theirs.letter == WAITING and theirs.met >= met and theirs.step <= ticket.number:
        return _DISAGREE
    return _WAIT
