"""How the ranks of a group keep in step: what a rank says of itself, and what another may conclude from it.

**Steps.** Every rank numbers its calls that communicate, for the life of the group: steps 1, 2, 3, ... A call that
raises counts like one that succeeds; one that is refused for its arguments does too. Step s of one rank only ever
exchanges data with step s of the others. A call that needs no communication (a norm) is no step.

**Epochs.** An epoch is a run of steps without a fault; its name is the number of its first step. A rank that raises in
step s leaves its epoch and stands in epoch s + 1, before its step s + 1. So all that raise in the same step come to the
same epoch by themselves. A rank never goes back to an epoch.

**Meetings.** In an epoch a rank meets the others each time it comes to a signature (name, shapes, dtype ...) that is
new in the epoch: it says so and waits until all have said the same at the same meeting, counted within the epoch.
Ranks that met gave the signature the same short number. So the first call of an epoch always meets, and no rank is in
an epoch that another has not come to. Calls with a known signature look it up and say nothing.

**Registers.** A rank says where it stands in one register of the store, which it alone writes and which has room for
one saying: ``letter epoch step met generation since left passed text``. Epoch, and within it ``met``, only ever grow,
so that an older saying that was missed follows from the newer one; ``left`` is the last epoch that it left after a
meeting, and ``passed`` the number of its meetings there. The letters:

- ``W`` waits in meeting ``met + 1`` of the epoch, before (or in) ``step``, with the signature ``text``;
- ``S`` is stuck: has waited long in a transfer of ``step`` of the signature ``text``; what would end the wait lies
  under ``wait`` for as long as it lasts, for the rank may leave the epoch before its wait ends;
- ``F`` has left an epoch (the reason lies under ``why``) and has not come to the next one's meeting;
- ``H`` refused the arguments of a call that is no step, ``text`` is the error;
- ``R`` runs; said only to take back an ``H``;
- ``X`` is done with this group for ever (a connection was lost), ``text`` says why.

**Conclusions.** A rank of epoch e that reads of another rank

- a later epoch: that rank left e (or came to stand beyond it), so this call cannot be answered: raise. Two exceptions:
  a rank that has not begun its epoch and reads of one that only gave up waiting there (``since``) follows it; and where
  that rank left e after this very meeting (``left``, ``passed``), all had said the same: met;
- an earlier epoch: it has not heard yet, or has still to raise in steps that others raised in: wait for it;
- ``W`` of the same meeting: met where the signatures and steps are the same, else they disagree: raise;
- more meetings than its own: that rank passed this one, which takes all ranks' saying the same: met;
- ``S`` in this or a later step, with fewer meetings: it never comes to this meeting: they disagree;
- for a rank that is stuck itself: ``S`` in the same step with another signature, or ``W`` in a meeting this rank has
  not been to, in no later step: they disagree. Everything else may only be slow.

Whoever raises leaves its epoch, so that a fault reaches every rank, each in the step in which it cannot go on. A rank
that had all it needed in step s hears of a fault in s in its step s + 1, in which the faulty rank, reading that s + 1
was left too, raises as well: all go on together with s + 2.

**Tags.** A message carries generation (how many epochs were begun; agreed on in an epoch's first meeting), step and
the number of the signature, each modulo a power of two. Ranks in one epoch are at most a step apart where they share
messages, for gloo's sends end when they are received. So messages of different steps, epochs or signatures never meet.

**Dummies.** A wait in gloo cannot be called off. A rank that has left an epoch ends the waits that others of that epoch
have for it by a message of the same tag and size (:mod:`.watchdog`). A dummy is never taken for data:

1. a dummy for a wait is sent only after the wait was told of (under ``wait``, with a number of its own);
2. it is sent only by a rank whose later epoch stands in the store already (it reads back what it wrote);
3. a rank that has told of a wait in a step looks up all registers after that wait, and after every later one of the
   step (they have the same tag), before it believes what it received; it raises where any epoch is later.

Telling and the end of the wait exclude one another by a lock, so a rank knows which of its waits it told of. Hence a
dummy that any wait may have met was preceded by a later epoch in the store, and the look-up finds that.
Steps that were not told of, nearly all, look up nothing and say nothing.
"""

from __future__ import annotations

from typing import NamedTuple

_GENERATIONS, _STEPS, _KINDS = 14, 6, 10  # bits of a tag, below a bit that is always set: small tags are users' own

#: So many signatures have a number at once, and so many epochs can be told apart.
MOST_KINDS, MOST_GENERATIONS = 1 << _KINDS, 1 << _GENERATIONS

WAITING, STUCK, LEFT, HINT, RUNNING, DONE = "W", "S", "F", "H", "R", "X"


class Ticket(NamedTuple):
    """One step of one group on one rank."""

    signature: str
    epoch: int
    number: int  # of the step
    generation: int = 0
    kind: int = 0  # the number of its signature

    @property
    def place(self) -> str:
        return f"{self.epoch}.{self.number}"

    @property
    def tag(self) -> int:
        """31 bits that tell this step's messages from all others that may be about."""
        step = self.number & (1 << _STEPS) - 1
        return ((1 << _GENERATIONS | self.generation) << _STEPS | step) << _KINDS | self.kind


class Register(NamedTuple):
    """What a rank says of itself."""

    letter: str
    epoch: int
    step: int  # in which, or before which, it stands
    met: int  # meetings it has passed in the epoch
    generation: int
    since: int  # steps from this one on, up to the epoch, were given up for nobody came; 0: none
    left: int  # the last epoch that it left after a meeting; 0: none
    passed: int  # meetings it had passed there
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
        """How many meetings of ``epoch`` it has certainly passed."""
        return self.met if epoch == self.epoch else self.passed if epoch == self.left else 0


class Verdict(NamedTuple):
    """What one register means for a rank that waits."""

    kind: str  # "wait", "met", "follow", "left", "disagree", "hint" or "done"


_WAIT, _MET, _FOLLOW, _LEFT, _DISAGREE, _HINT, _DONE = map(
    Verdict, ("wait", "met", "follow", "left", "disagree", "hint", "done")
)


def meeting(mine: Register, theirs: Register | None) -> Verdict:
    """For a rank that waits in a meeting: ``mine`` is its own ``W``."""
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
    """For a rank that has waited long in the step of ``ticket``, having passed ``met`` meetings."""
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
