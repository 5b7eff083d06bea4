"""The transport over point-to-point messages of torch.distributed, on any backend that has them (gloo, NCCL).

gloo moves bytes in threads of its own, NCCL in kernels on a stream of its own, so both run beside the matmul. With NCCL
the sends and receives of one post are one coalesced group, in the same order on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import per_group
from .coordination import Ticket, coordination_of, failure
from .steps import Transfer
from .transport import Message, Room
from .watchdog import Doing, Watchdog, watchdog_of

_SMALL_BYTES = 1 << 16


def gathers_itself(group: ProcessGroup, device_type: str) -> bool:
    """Whether the backend's own all-gather beats messages: NCCL's is built for the links between the devices."""
    return device_type == "cuda" and _on_nccl(group)


@per_group
def _on_nccl(group: ProcessGroup) -> bool:
    types = [device.type for device in group._device_types]
    return "cuda" in types and group._get_backend(torch.device("cuda")).name() == "nccl"


class P2PTransport:
    """Chunks over ``torch.distributed.batch_isend_irecv`` within ``group``."""

    def __init__(self, group: ProcessGroup):
        self._group = group

    def session(self, signature: str, room: Room) -> P2PSession:
        return P2PSession(self._group, coordination_of(self._group).begin(signature))


class P2PSession:
    """The works of one op, by transfer.

    The tag of a message encodes step and signature. Where the backend matches tags (gloo), a receive never takes a
    message of another op: a mismatch is an error on both sides, never an abort of the process or a wrong result.
    """

    def __init__(self, group: ProcessGroup, ticket: Ticket):
        self._group = group
        self._ticket = ticket
        self._watchdog: Watchdog | None = None
        self._doubtful = False  # a wait of this op was published, so that a dummy may come
        self._arrivals: dict[Transfer, tuple[Message, dist.Work]] = {}
        self._departures: list[tuple[Message, dist.Work]] = []  # a buffer must outlive its send
        self._gathering: dist.Work | None = None

    def empty(self, transfer: Transfer, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        if not sends and not receives:
            return
        group, tag = self._group, self._ticket.tag
        first = (sends or receives)[0]
        # Receives first: gloo tells the sender that the receiver is ready, and this must not queue behind our own data.
        # Small messages are sent first: a ready notice that arrives while the peer posts its send would block the post.
        small = first.buffer.nbytes <= _SMALL_BYTES
        try:
            if first.buffer.is_cpu:  # batch_isend_irecv coalesces nothing on a CPU and takes twice as long
                self._watchdog = watchdog_of(group)
                leaving = [group.send([m.buffer], m.transfer.target, tag) for m in sends] if small else []
                works = [group.recv([m.buffer], m.transfer.source, tag) for m in receives]
                works += leaving or [group.send([m.buffer], m.transfer.target, tag) for m in sends]
            else:
                ops = [dist.P2POp(dist.irecv, m.buffer, None, group, tag, m.transfer.source) for m in receives]
                ops += [dist.P2POp(dist.isend, m.buffer, None, group, tag, m.transfer.target) for m in sends]
                works = dist.batch_isend_irecv(ops)
                if len(works) != len(ops):  # coalesced: one work stands for the whole post
                    works = works[:1] * len(ops)
        except RuntimeError as error:
            raise self._failure("posting", first.transfer, error) from error
        self._arrivals.update((m.transfer, (m, work)) for m, work in zip(receives, works, strict=False))
        self._departures += zip(sends, works[len(receives) :], strict=True)

    def all_gather(self, whole: Tensor, own: Tensor) -> bool:
        if not gathers_itself(self._group, own.device.type):
            return False
        try:
            self._gathering = dist.all_gather_into_tensor(whole, own, self._group, async_op=True)
        except RuntimeError as error:
            raise self._gather_failure(error) from error
        return True

    def all_gathered(self) -> None:
        assert self._gathering is not None
        try:
            self._gathering.wait()
        except RuntimeError as error:
            raise self._gather_failure(error) from error
        self._gathering = None

    def _gather_failure(self, error: RuntimeError) -> RuntimeError:
        where = f"{self._ticket.signature}: the all-gather of {self._group.size()} ranks failed on rank"
        return RuntimeError(f"{where} {self._group.rank()}; {type(error).__name__}: {error}")

    def takes_receives_early(self, device_type: str) -> bool:
        # Works on a CPU are independent. NCCL runs them on one stream, where an early receive blocks later sends.
        return device_type == "cpu"

    def wait(self, transfer: Transfer) -> None:
        self._wait(*self._arrivals[transfer], "receiving")
        del self._arrivals[transfer]

    def drain(self) -> None:
        for message, work in self._departures:
            self._wait(message, work, "sending")
        self._departures.clear()

    def abort(self, error: BaseException) -> None:
        if self._watchdog is not None:  # the backend may still use the buffers of unfinished works
            self._watchdog.abandoned += [*self._arrivals.values(), *self._departures]
        coordination_of(self._group).give_up(self._ticket, error)

    def _wait(self, message: Message, work: dist.Work, doing: Doing) -> None:
        """Block until the bytes have moved (CPU), or until the current stream waits for them (CUDA)."""
        transfer, watchdog = message.transfer, self._watchdog
        peer = transfer.source if doing == "receiving" else transfer.target
        try:
            if watchdog is None:
                work.wait()
                return
            watchdog.begin(self._ticket, doing, peer, message.buffer.nbytes)
            try:
                work.wait()
            finally:
                self._doubtful |= watchdog.end(coordination_of(self._group))
        except RuntimeError as error:
            raise self._failure(doing, transfer, error) from error
        if self._doubtful:
            void = coordination_of(self._group).void(self._ticket)
            if void is not None:
                raise failure(self._group.rank(), self._ticket, doing, transfer, void)

    def finish(self) -> None:
        self.drain()
        coordination_of(self._group).end()

    def _failure(self, doing: str, transfer: Transfer, error: RuntimeError) -> RuntimeError:
        coordination = coordination_of(self._group)
        peer = transfer.source if doing == "receiving" else transfer.target
        cause = f"{coordination.diagnose(peer)}. {type(error).__name__}: {error}"
        failed = failure(self._group.rank(), self._ticket, doing, transfer, cause)
        if self._watchdog is not None:
            coordination.connection_lost(str(failed))
        return failed
