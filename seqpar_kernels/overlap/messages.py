"""Messages between any two ranks of a group, of tensors wherever they lie: what attention and experts send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..comm import select
from ..comm.coordination import coordination_of
from ..comm.steps import Buffer, Rows, Transfer
from ..comm.transport import Message, Room, Session, end

_ALIGNMENT = 16  # of each tensor in a message


class Messages:
    """The communication of one step of an op, as a context manager: an error inside the block reaches the peers.

    A rank must send its messages to a peer in the order in which the peer receives them; ``index`` tells them apart.
    """

    def __init__(self, group: ProcessGroup, signature: str, kind: str = "gather"):
        room = Room((Buffer(kind, 0),), (1,))  # messages need no place in a workspace
        self._session: Session = select.messages(group).session(signature, room)
        self._rank, self._kind = group.rank(), kind

    def post(self, sends: Sequence[tuple[int, int, Tensor]], receives: Sequence[tuple[int, int, Tensor]]) -> None:
        """Start messages (peer, index, contiguous buffer); empty ones are not sent. No buffer is copied."""
        out = [Message(self._transfer(index, self._rank, peer), b) for peer, index, b in sends if b.numel()]
        into = [Message(self._transfer(index, peer, self._rank), b) for peer, index, b in receives if b.numel()]
        if out or into:
            self._session.post(out, into)

    def wait(self, peer: int, index: int, buffer: Tensor) -> None:
        """Return when ``buffer`` has been received."""
        if buffer.numel():
            self._session.wait(self._transfer(index, peer, self._rank))

    def takes_receives_early(self, device_type: str) -> bool:
        """See :meth:`..comm.transport.Session.takes_receives_early`."""
        return self._session.takes_receives_early(device_type)

    def drain(self) -> None:
        """Return when the buffers of all sends may be changed."""
        self._session.drain()

    def _transfer(self, index: int, source: int, target: int) -> Transfer:
        return Transfer(self._kind, Rows(source, index, 0, 0), source, target)

    def __enter__(self) -> Messages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self._session, error)


def agree(group: ProcessGroup, text: str) -> None:
    """Return when all ranks have published ``text``; they compare it once an epoch.

    Raises:
        RuntimeError: on every rank, where the texts differ.
    """
    coordination_of(group).require(text)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def message_buffer(
    shapes: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """One buffer of bytes, and a view of each shape and dtype in it."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    buffer = torch.empty(sum(map(_padded, sizes)), dtype=torch.uint8, device=device)
    views, at = [], 0
    for (shape, dtype), size in zip(shapes, sizes, strict=True):
        views.append(buffer[at : at + size].view(dtype).view(tuple(shape)))
        at += _padded(size)
    return buffer, views
