"""What a schedule needs from whoever moves its bytes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .schedule import Transfer


class Message(NamedTuple):
    """A transfer and the contiguous buffer it is read from or written to."""

    transfer: Transfer
    buffer: Tensor


class Session(Protocol):
    """The communication of one op, from first post to last wait."""

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        """Start moving; buffers of sends must stay as they are until :meth:`finish`."""

    def wait(self, transfer: Transfer) -> None:
        """Return when ``transfer`` has arrived (on CUDA: when the current stream may use it)."""

    def finish(self) -> None:
        """Return when the buffers of all sends may be used again."""


class Transport(Protocol):
    """Moves chunks between the ranks of one group."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def session(self, signature: str) -> Session:
        """Begin an op. ``signature`` describes it (name, shapes, dtype) and must be the same on every rank.

        Raises:
            RuntimeError: on every rank, before any byte has moved, when signatures differ.
        """
