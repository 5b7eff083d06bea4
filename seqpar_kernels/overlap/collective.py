"""The first transport: torch.distributed point-to-point, on any backend it has (gloo and NCCL at least).

gloo moves bytes with threads of its own, NCCL with kernels on a stream of its own, so either runs beside the matmul.
With NCCL the send and the receive of one post are one coalesced group, in the same order on all ranks.
"""

from __future__ import annotations

import zlib

import torch.distributed as dist
from torch.distributed import ProcessGroup

from .agreement import agreement_of
from .schedule import Transfer
from .transport import Message


class CollectiveTransport:
    """Chunks over ``torch.distributed.batch_isend_irecv`` within ``group``."""

    def __init__(self, group: ProcessGroup):
        self._group = group

    @property
    def rank(self) -> int:
        return self._group.rank()

    @property
    def ranks(self) -> int:
        return self._group.size()

    def session(self, signature: str) -> CollectiveSession:
        agreement_of(self._group).require(signature)
        return CollectiveSession(self._group, signature)


class CollectiveSession:
    """One op's works, by transfer.

    The tag is a digest of the op's signature: where tags are matched (gloo), messages of ops that do not fit together
    never meet, so that a mismatch ends in a time-out with a message, not in an abort of the process.
    """

    def __init__(self, group: ProcessGroup, signature: str):
        self._group = group
        self._signature = signature
        self._tag = zlib.crc32(signature.encode()) & 0x7FFFFFFF
        self._arrivals: dict[Transfer, dist.Work] = {}
        self._departures: list[tuple[Message, dist.Work]] = []  # a buffer must outlive its send

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        if not sends and not receives:
            return
        # Receives first: gloo tells the sender that it is ready, and that message must not queue behind our own data.
        ops = [dist.P2POp(dist.irecv, m.buffer, None, self._group, self._tag, m.transfer.source) for m in receives]
        ops += [dist.P2POp(dist.isend, m.buffer, None, self._group, self._tag, m.transfer.target) for m in sends]
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            transfer = (sends or receives)[0].transfer
            raise self._failure("posting", transfer, error) from error
        if len(works) != len(ops):  # coalesced: one work stands for the whole post
            works = works[:1] * len(ops)
        self._arrivals.update(zip((m.transfer for m in receives), works, strict=False))
        self._departures += zip(sends, works[len(receives) :], strict=True)

    def wait(self, transfer: Transfer) -> None:
        try:
            self._arrivals.pop(transfer).wait()
        except RuntimeError as error:
            raise self._failure("receiving", transfer, error) from error

    def finish(self) -> None:
        for message, work in self._departures:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failure("sending", message.transfer, error) from error
        self._departures.clear()

    def _failure(self, doing: str, transfer: Transfer, error: RuntimeError) -> RuntimeError:
        peer = transfer.source if doing == "receiving" else transfer.target
        rows = transfer.rows
        return RuntimeError(
            f"{self._signature}: {doing} chunk {rows.index} (rows {rows.start}..{rows.stop} of rank {rows.owner}, "
            f"{transfer.kind}) failed between rank {self._group.rank()} and rank {peer}; "
            f"{agreement_of(self._group).diagnose(peer)}. {type(error).__name__}: {error}"
        )
