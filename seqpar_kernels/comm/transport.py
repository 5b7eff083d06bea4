"""What a schedule needs from whoever moves its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from .steps import Buffer, Transfer


class Message(NamedTuple):
    """A transfer and the contiguous buffer it is read from or written to."""

    transfer: Transfer
    buffer: Tensor


class Room(NamedTuple):
    """The byte layout of one op: where its messages lie among what a rank sends. Alike on every rank.

    Buffers lie one after the other, slots of a buffer too. A message lies where its transfer says, however ranks cut.
    """

    buffers: tuple[Buffer, ...]
    row_bytes: tuple[int, ...]  # one for each buffer
    outer: int = 1  # parts of a message that goes in parts

    def nbytes(self) -> int:
        """What a rank sends, a chunk that goes to several peers once."""
        return sum(b.slots * _slot_bytes(b, row_bytes) for b, row_bytes in zip(*self[:2], strict=True))

    def offset(self, transfer: Transfer) -> int:
        """Where in the sender's :meth:`nbytes` the message of ``transfer`` lies.

        Raises:
            KeyError: no such buffer.
        """
        start = 0
        for buffer, row_bytes in zip(self.buffers, self.row_bytes, strict=True):
            slot_bytes = _slot_bytes(buffer, row_bytes)
            if buffer.name == transfer.buffer:
                part = transfer.part * transfer.size * row_bytes // max(1, self.outer)
                return start + transfer.slot * slot_bytes + transfer.offset * row_bytes + part
            start += buffer.slots * slot_bytes
        raise KeyError(f"{transfer}: expected one of the buffers {[buffer.name for buffer in self.buffers]}")


def _slot_bytes(buffer: Buffer, row_bytes: int) -> int:
    return -(-buffer.rows * row_bytes // _ALIGNMENT) * _ALIGNMENT


_ALIGNMENT = 256
_BLOCK_BYTES = 1 << 16


def in_blocks(outer: int, block_bytes: int) -> bool:
    """Whether a message of ``outer`` blocks of memory goes block by block, from and to where they lie.

    Small ones are packed into one: a copy costs less than messages do. Both ends ask, and must get the same answer.
    """
    return outer > 1 and block_bytes >= _BLOCK_BYTES


class Session(Protocol):
    """The communication of one op, from first post to last wait."""

    def empty(self, transfer: Transfer, shape: Sequence[int], like: Tensor) -> Tensor:
        """Where the message of ``transfer`` is best computed, so that it need not be copied before it is sent."""

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        """Start moving; buffers of sends must stay as they are until :meth:`drain` or :meth:`finish`."""

    def gathers_itself(self, device_type: str) -> bool:
        """Whether the backend has an all-gather of its own that is better than messages. Alike on every rank."""

    def all_gather(self, whole: Tensor, own: Tensor) -> None:
        """Start that all-gather of ``own`` [n], alike in size, into ``whole`` [ranks * n]."""

    def all_gathered(self) -> None:
        """Return when what :meth:`all_gather` has started has come (on CUDA: when the current stream may use it)."""

    def takes_receives_early(self, device_type: str) -> bool:
        """Whether receives may be posted long before the peers' sends, without keeping anything else from moving.

        A send that finds its receive there need not ask for it first.
        """

    def wait(self, transfer: Transfer) -> None:
        """Return when ``transfer`` has arrived (on CUDA: when the current stream may use it)."""

    def drain(self) -> None:
        """Return when the buffers of all sends so far may be used again; more posts may follow."""

    def finish(self) -> None:
        """The last :meth:`drain`."""

    def abort(self, error: BaseException) -> None:
        """The op failed on this rank with ``error``: tell the peers; nothing of this op may reach a later one."""


def end(session: Session, error: BaseException | None) -> None:
    """Finish the op; or abort it, where ``error`` broke it off or finishing fails, which then raises."""
    try:
        if error is None:
            session.finish()
    except BaseException as failed:
        error = failed
        raise
    finally:
        if error is not None:
            session.abort(error)


class Transport(Protocol):
    """Moves chunks between the ranks of one group."""

    def session(self, signature: str, room: Room) -> Session:
        """Begin an op. ``signature`` describes it (name, shapes, dtype) and must be the same on every rank.

        Raises:
            RuntimeError: on every rank, before any byte has moved, when signatures differ.
        """
