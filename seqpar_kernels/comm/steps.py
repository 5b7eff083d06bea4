"""What a rank of a group does in one op, as data: transfers, waits for them, and computation between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Buffer(NamedTuple):
    """One of the buffers that a rank sends from, alike on every rank: ``slots`` regions of at most ``rows`` rows."""

    name: str
    rows: int
    slots: int = 1


class Rows(NamedTuple):
    """Rows ``start..stop`` of what the receiver has them in: chunk ``index`` of what belongs to ``owner``."""

    owner: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    start: int
    stop: int


class Transfer(NamedTuple):
    """``rows`` on their way from ``source`` to ``target``.

    The sender has them in slot ``slot`` of its buffer ``buffer``, from row ``offset`` on; both ends name a transfer
    alike. Schedules know nothing of ``part``: where rows are several blocks of memory, which one.
    """

    buffer: str
    rows: Rows
    source: int
    target: int
    slot: int = 0
    offset: int = 0
    part: int = 0

    @property
    def size(self) -> int:
        """How many rows travel."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Post:
    """Start these transfers together."""

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


@dataclass(frozen=True)
class Wait:
    """Block until this transfer has arrived here."""

    transfer: Transfer


@dataclass(frozen=True)
class Drain:
    """Block until the buffers of all sends posted so far may be used again."""


@dataclass(frozen=True)
class Compute:
    """Run ``stage`` over rows ``start..stop``; what that means is the business of who runs the schedule."""

    stage: str
    start: int
    stop: int


Step = Post | Wait | Drain | Compute
