"""The first transport: torch.distributed point-to-point, on any backend it has (gloo and NCCL at least).

gloo moves bytes with threads of its own, NCCL with kernels on a stream of its own, so either runs beside the matmul.
With NCCL the send and the receive of one post are one coalesced group, in the same order on all ranks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import per_group
from .coordination import Ticket, coordination_of, failure, group_gone
from .steps import Transfer
from .transport import Message, Room
from .watchdog import Blocked, Doing, Watchdog, watchdog_of

_SMALL_BYTES = 1 << 16


def gathers_itself(group: ProcessGroup, device_type: str) -> bool:
    """Whether the backend's own all-gather is better than messages: NCCL's uses what joins the devices, gloo's not."""
    return device_type == "cuda" and _on_nccl(group)


@per_group
def _on_nccl(group: ProcessGroup) -> bool:
    types = [device.type for device in group._device_types]
    return "cuda" in types and group._get_backend(torch.device("cuda")).name() == "nccl"


class P2PTransport:
    """Chunks over point-to-point messages of torch.distributed within ``group``."""

    def __init__(self, group: ProcessGroup):
        self._group = weakref.ref(group)  # a transport is kept as long as its group
        self.coordination = coordination_of(group)

    def session(self, signature: str, room: Room) -> P2PSession:
        group = self._group()
        if group is None:
            raise group_gone(signature)
        return P2PSession(self, group, self.coordination.begin(signature))

    @functools.cached_property
    def watchdog(self) -> Watchdog:
        """Looks after waits on a CPU."""
        group = self._group()
        assert group is not None  # a session holds it
        return watchdog_of(group)


class P2PSession:
    """One op's works, by transfer.

    The tag tells the step and what was agreed on for it: where tags are matched (gloo), messages of ops that do not
    belong together never meet, so that a mismatch ends in an error on both sides, not in an abort of the process or in
    a wrong result.
    """

    def __init__(self, transport: P2PTransport, group: ProcessGroup, ticket: Ticket):
        self._transport, self._group, self._ticket = transport, group, ticket
        self._coordination = transport.coordination
        self._watchdog: Watchdog | None = None
        self._doubtful = False  # the peers were told of a wait: a dummy may come
        self._arrivals: dict[Transfer, tuple[Message, dist.Work]] = {}
        self._departures: list[tuple[Message, dist.Work]] = []  # a buffer must outlive its send
        self._gathering: dist.Work | None = None

    def empty(self, transfer: Transfer, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        if not sends and not receives:
            return
        first = (sends or receives)[0]
        if not first.buffer.is_cpu:
            self._post_together(sends, receives)
            return
        # Nothing is coalesced on a CPU, and half of the time would go into finding that out.
        self._watchdog = self._transport.watchdog
        # Receives first: gloo tells the sender that it is ready, and that message must not queue behind our own data.
        # Where that is little, sends first: a peer that is told to send while its own thread is about to locks it out.
        small = first.buffer.nbytes <= _SMALL_BYTES
        if small:
            self._send(sends)
        group, tag = self._group, self._ticket.tag
        for m in receives:
            try:
                self._arrivals[m.transfer] = m, group.recv([m.buffer], m.transfer.source, tag)
            except RuntimeError as error:
                raise self._failure("receiving", m.transfer, error) from error
        if not small:
            self._send(sends)

    def _send(self, sends: list[Message]) -> None:
        group, tag = self._group, self._ticket.tag
        for m in sends:
            try:
                self._departures.append((m, group.send([m.buffer], m.transfer.target, tag)))
            except RuntimeError as error:
                raise self._failure("sending", m.transfer, error) from error

    def _post_together(self, sends: list[Message], receives: list[Message]) -> None:
        """On CUDA, where a backend may make one work of all."""
        group, tag = self._group, self._ticket.tag
        try:
            ops = [dist.P2POp(dist.irecv, m.buffer, None, group, tag, m.transfer.source) for m in receives]
            ops += [dist.P2POp(dist.isend, m.buffer, None, group, tag, m.transfer.target) for m in sends]
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            doing: Doing = "sending" if sends else "receiving"
            raise self._failure(doing, (sends or receives)[0].transfer, error) from error
        if len(works) != len(ops):  # coalesced: one work stands for the whole post
            works = works[:1] * len(ops)
        self._arrivals.update((m.transfer, (m, work)) for m, work in zip(receives, works, strict=False))
        self._departures += zip(sends, works[len(receives) :], strict=True)

    def gathers_itself(self, device_type: str) -> bool:
        return gathers_itself(self._group, device_type)

    def all_gather(self, whole: Tensor, own: Tensor) -> None:
        try:
            self._gathering = dist.all_gather_into_tensor(whole, own, self._group, async_op=True)
        except RuntimeError as error:
            raise self._gather_failure(error) from error

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
        # On a CPU works are independent of one another; NCCL's stream would wait in such a receive and send nothing.
        return device_type == "cpu"

    def wait(self, transfer: Transfer) -> None:
        self._wait(*self._arrivals[transfer], "receiving")
        del self._arrivals[transfer]

    def drain(self) -> None:
        for message, work in self._departures:
            self._wait(message, work, "sending")
        self._departures.clear()

    def abort(self, error: BaseException) -> None:
        if self._watchdog is not None:  # the backend may still read and write what lies in unfinished works
            self._watchdog.abandoned += [*self._arrivals.values(), *self._departures]
        self._coordination.give_up(self._ticket, error)

    def _wait(self, message: Message, work: dist.Work, doing: Doing) -> None:
        """On CPU until the bytes have moved; on CUDA until the current stream will wait for them."""
        transfer, watchdog = message.transfer, self._watchdog
        try:
            if watchdog is None:
                work.wait()
                return
            peer = transfer.source if doing == "receiving" else transfer.target
            watchdog.blocked = Blocked(self._ticket, doing, peer, message.buffer.nbytes)
            try:
                work.wait()
            finally:
                self._doubtful |= watchdog.end(self._coordination)
        except RuntimeError as error:
            raise self._failure(doing, transfer, error) from error
        if self._doubtful:
            void = self._coordination.void(self._ticket)
            if void is not None:
                raise failure(self._group.rank(), self._ticket, doing, transfer, void)

    def finish(self) -> None:
        self.drain()
        self._coordination.end()

    def _failure(self, doing: Doing, transfer: Transfer, error: RuntimeError) -> RuntimeError:
        coordination = self._coordination
        peer = transfer.source if doing == "receiving" else transfer.target
        cause = f"{coordination.diagnose(peer)}. {type(error).__name__}: {error}"
        failed = failure(self._group.rank(), self._ticket, doing, transfer, cause)
        if self._watchdog is not None:
            coordination.connection_lost(str(failed))
        return failed
