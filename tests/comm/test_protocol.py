"""Coordination, watchdog and transport in every order of events that one delay makes, and in many orders of several.

Each rank goes through a program of calls, some of which fail on it alone, catches what they raise and goes on. Whatever
the order: a call that returns has received what its peers sent in the very same step, no call takes longer than a
watchdog needs, no message meets one of another size, and in the end the group works.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar_kernels.comm import coordination, p2p, watchdog
from seqpar_kernels.comm.coordination import checked_together, coordination_of
from seqpar_kernels.comm.steps import Buffer, Rows, Transfer
from seqpar_kernels.comm.transport import Message, Room, end
from seqpar_kernels.comm.watchdog import watchdog_of

from . import turns as made_up

ROOM = Room((Buffer("rows", 1),), (1,))
LAST = 9  # the step after which a run ends
SLOWEST = 5 + coordination.PATIENCE_SECONDS  # seconds of any one call, beside the delay itself
SIZES = {"A": 2, "B": 2, "C": 3}

# What a rank does: call A, B (messages of one size) or C (another size); "a", "b", "c" fail amid it, after the sends;
# "!" is refused for its arguments, "?" is a refused call that is no step; "." makes it late.
PROGRAMS = [
    ("A", "A"),
    ("B", "A"),
    ("C", "A"),
    ("BAB", "AAB"),
    ("AAA", "!!A"),
    ("AAA", "!BA"),
    ("AAA", "BCA"),
    ("AA", "aA"),
    ("AA", ".aA"),
    ("AB", ".bB"),
    ("A?A", "AAA"),
    ("AaA", "ABA"),
    ("AA", "AB"),
    ("AAA", "AAA", "!BA"),
    ("ABA", "aBA", "ABA"),
    ("AB", "BA", "AC"),
]


class Rank:
    def __init__(self, turns: made_up.Turns, group: made_up.Group, program: str):
        self.turns, self.group, self.program = turns, group, program
        self.calls: list[tuple[int, str, bool, float]] = []
        self.wrong: list[str] = []
        self.finished = False

    def body(self) -> None:
        for name in self.program:
            self.act(name)
        while self.step() < LAST:
            self.act("A")
        self.finished = True

    def step(self) -> int:
        return coordination_of(self.group)._step  # type: ignore[arg-type]

    def act(self, name: str) -> None:
        start = self.turns.now
        if name == ".":
            self.turns.sleep(0.7)
            return
        try:
            if name in "!?":
                with checked_together(self.group, step=name == "!"):  # type: ignore[arg-type]
                    raise ValueError("refused")
            self.call(name)
            ok = True
        except (RuntimeError, ValueError, ArithmeticError):
            ok = False
        if name != "?":
            self.calls.append((self.step(), name, ok, self.turns.now - start))

    def call(self, name: str) -> None:
        group, me, signature = self.group, self.group.rank(), name.upper()
        session = p2p.P2PTransport(group).session(signature, ROOM)  # type: ignore[arg-type]
        error = None
        try:
            others = [rank for rank in range(group.size()) if rank != me]
            mine = torch.full((SIZES[signature],), float(100 * session._ticket.number + me))
            sends = [Message(Transfer("rows", Rows(me, 0, 0, 1), me, o), mine) for o in others]
            receives = [Message(Transfer("rows", Rows(o, 0, 0, 1), o, me), torch.full_like(mine, -1.0)) for o in others]
            session.post(sends, receives)
            if name.islower():
                raise ArithmeticError("amid")
            for message in receives:
                session.wait(message.transfer)
        except BaseException as raised:
            error = raised
            raise
        finally:
            if not isinstance(error, made_up.Stop):
                end(session, error)
        for message, other in zip(receives, others, strict=True):
            want = float(100 * session._ticket.number + other)
            if not (message.buffer == want).all():
                self.wrong.append(f"step {session._ticket.number} {name}: {message.buffer.tolist()}, expected {want}")


def run(program: tuple[str, ...], delays: Mapping[int, float], late: Callable[[], bool]) -> tuple[int, list[str]]:
    """How many turns there were, and what was wrong."""
    turns = made_up.Turns(delays)
    patched = pytest.MonkeyPatch()
    for module in (coordination, watchdog):
        patched.setattr(module, "time", turns.time())
        patched.setattr(module, "threading", turns.threading())
    patched.setattr(dist, "PrefixStore", made_up.Prefix)
    patched.setattr(watchdog, "calm_gloo", lambda: 0)
    patched.setattr(watchdog, "pause", turns.pause)
    patched.setattr(watchdog, "start_watching", turns.start_watching)
    try:
        server, wire = made_up.Server(turns, late), made_up.Wire(turns)
        groups: list[Any] = [made_up.Group(r, len(program), made_up.Client(server), wire) for r in range(len(program))]
        ranks = [Rank(turns, group, text) for group, text in zip(groups, program, strict=True)]
        for rank, group in zip(ranks, groups, strict=True):
            coordination_of(group)
            turns.spawn(f"rank {group.rank()}", rank.body)
            watchdog_of(group)  # its thread comes after
        turns.run(lambda: all(rank.finished for rank in ranks) or turns.now > 600)
    finally:
        patched.undo()
    wrong = [f"rank {r}: {text}" for r, rank in enumerate(ranks) for text in rank.wrong]
    if wire.aborted:
        wrong.append(wire.aborted)
    if not all(rank.finished for rank in ranks):
        wrong.append("the ranks did not come to an end")
    held_up = sum(delays.values()) + 0.7 * sum(text.count(".") for text in program)
    for r, rank in enumerate(ranks):
        slow = [call for call in rank.calls if call[3] > SLOWEST + held_up]
        wrong += [f"rank {r}: step {step} {name} took {took:.1f} s" for step, name, _, took in slow]
        if not rank.calls or not rank.calls[-1][2]:
            wrong.append(f"rank {r}: the last call failed")
    refused = [{step for step, _, ok, _ in rank.calls if not ok} for rank in ranks]
    for r, rank in enumerate(ranks):  # who raises before sending takes all others of the step along
        before = {step for step, name, ok, _ in rank.calls if not ok and name == "!"}
        wrong += [
            f"rank {q} went on in step {step}, refused on {r}"
            for q in range(len(ranks))
            for step in before - refused[q]
        ]
    return turns.turns, wrong


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_every_order_that_one_delay_makes(program: tuple[str, ...]) -> None:
    total, wrong = run(program, {}, lambda: False)
    assert not wrong, wrong
    sample = random.Random(repr(program))
    for turn in sorted(sample.sample(range(1, total + 1), min(total, 25))):
        for seconds in (0.3, 1.2, 2.6):
            _, wrong = run(program, {turn: seconds}, lambda: False)
            assert not wrong, (turn, seconds, wrong)


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_orders_that_several_delays_make(program: tuple[str, ...]) -> None:
    for seed in range(25):
        chance = random.Random(seed)
        delays = {chance.randrange(1, 400): chance.choice((0.05, 0.3, 0.6, 1.1, 2.0)) for _ in range(6)}
        _, wrong = run(program, delays, lambda chance=chance: chance.random() < 0.5)  # type: ignore[misc]
        assert not wrong, (seed, wrong)
