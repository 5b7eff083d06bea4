"""The interface of a transport: how the messages of a schedule are moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from .steps import Buffer, Transfer


class Message(NamedTuple):
    """A transfer, and the contiguous buffer that it is read from or written to."""

    transfer: Transfer
    buffer: Tensor


class Room(NamedTuple):
    """The byte layout of what one rank sends in one op, the same on every rank.

    Buffers lie one after the other, and so do the slots of a buffer. The place of a message follows from its transfer
    alone, so that sender and receiver compute the same offset.
    """

    buffers: tuple[Buffer, ...]
    row_bytes: tuple[int, ...]  # one for each buffer
    outer: int = 1  # the number of parts of a message that is sent in parts

    def nbytes(self) -> int:
        """Bytes of all that a rank sends; a chunk for several peers counts once."""
        return sum(b.slots * _slot_bytes(b, row_bytes) for b, row_bytes in zip(*self[:2], strict=True))

    def offset(self, transfer: Transfer) -> int:
        """The byte offset of the message of ``transfer`` in what its sender sends.

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
    """Whether a message of ``outer`` blocks of memory is sent block by block, without a copy.

    Small blocks are packed into one message: a copy costs less than a message. Sender and receiver call this with the
    same arguments.
    """
    return outer > 1 and block_bytes >= _BLOCK_BYTES


class Session(Protocol):
    """The communication of one op, from first post to last wait."""

    def empty(self, transfer: Transfer, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor from which ``transfer`` can be sent without a copy."""

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        """Start these messages. Buffers of sends must not change until :meth:`drain` or :meth:`finish`."""

    def gathers_itself(self, device_type: str) -> bool:
        """Whether the backend has an all-gather of its own that is better than messages. Alike on all ranks."""

    def all_gather(self, whole: Tensor, own: Tensor) -> None:
        """Start that all-gather of ``own`` [n], of one size on all ranks, into ``whole`` [ranks * n]."""

    def all_gathered(self) -> None:
        """Return when the all-gather that was started is done (on CUDA: when the current stream may use the result)."""

    def takes_receives_early(self, device_type: str) -> bool:
        """Whether a receive that is posted long before its send delays no other message.

        A send whose receive is posted already starts at once.
        """

    def wait(self, transfer: Transfer) -> None:
        """Return when ``transfer`` has arrived (on CUDA: when the current stream may use it)."""

    def drain(self) -> None:
        """Return when the buffers of all sends so far may be changed; more posts may follow."""

    def finish(self) -> None:
        """:meth:`drain`, and end the op."""

    def abort(self, error: BaseException) -> None:
        """End the op, which failed on this rank with ``error``: tell the peers, and let no message reach a later op."""


def end(session: Session, error: BaseException | None) -> None:
    """Finish the op where ``error`` is None, else abort it; abort and raise where finishing fails."""
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
    """Moves messages between the ranks of one group."""

    def session(self, signature: str, room: Room) -> Session:
        """Begin an op. ``signature`` describes it (name, shapes, dtype) and must be the same on every rank.

        Raises:
            RuntimeError: on every rank, before any byte has moved, when signatures differ.
        """
