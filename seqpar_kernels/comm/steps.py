"""What a rank of a group does in one op, as data: transfers, waits for them, and computation between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Stage = Literal["matmul", "dgrad", "wgrad", "reduce"]


class Rows(NamedTuple):
    """Rows ``start..stop`` of the unsharded sequence: chunk ``index`` of the shard of ``owner``."""

    owner: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    start: int
    stop: int


class Transfer(NamedTuple):
    """``rows`` on their way from one rank to another.

    "gather": the owner's input rows, to somebody who computes with them.
    "scatter": somebody's partial result for those rows, to their owner, who sums.

    Schedules know nothing of ``part``: where rows are several blocks of memory, which one.
    """

    kind: Literal["gather", "scatter"]
    rows: Rows
    source: int
    target: int
    part: int = 0


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
    """Run ``stage`` over rows ``start..stop`` of the unsharded sequence."""

    stage: Stage
    start: int
    stop: int


Step = Post | Wait | Drain | Compute
