"""The steps of one rank in one op, as data: transfers, waits and computations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Buffer(NamedTuple):
    """A buffer that ranks send from, the same on every rank: ``slots`` regions of at most ``rows`` rows each."""

    name: str
    rows: int
    slots: int = 1


class Rows(NamedTuple):
    """Rows ``start..stop`` of the receiver's tensor: chunk ``index`` of the rows that belong to ``owner``."""

    owner: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    start: int
    stop: int


class Transfer(NamedTuple):
    """``rows`` are sent from rank ``source`` to rank ``target``.

    The sender has them in slot ``slot`` of its buffer ``buffer``, from row ``offset`` on. Sender and receiver use the
    same transfer for one message. ``part`` is the block of memory, where rows consist of several; schedules leave it 0.
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
        """The number of rows."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Post:
    """Start these transfers together."""

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


@dataclass(frozen=True)
class Wait:
    """Block until this transfer has arrived on this rank."""

    transfer: Transfer


@dataclass(frozen=True)
class Drain:
    """Block until the buffers of all sends posted so far may be changed."""


@dataclass(frozen=True)
class Compute:
    """Run ``stage`` over rows ``start..stop``. The code that runs the schedule defines the stages."""

    stage: str
    start: int
    stop: int


Step = Post | Wait | Drain | Compute
