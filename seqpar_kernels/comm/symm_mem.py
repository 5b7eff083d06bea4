"""Transport over symmetric memory: copy engines between GPUs that reach one another's memory (NVLink, PCIe P2P).

Each rank of the group owns a workspace that its peers can read. A sender puts a chunk there (partial results are
computed right into it: :meth:`SymmMemSession.empty`), then signals; the receiver pulls the chunk to where it belongs
and signals, once an op, that it has pulled the last. Pulling takes one local copy of an input shard, and none of
partial results; no kernel runs on an SM but the signals' own, of one warp.

Everything is ordered by streams, and the host never waits. Three streams of high priority work for a group: one sends
signals behind the computing stream, one waits for signals and pulls, one waits for word that the peers have pulled.
Each op takes the half of the workspace that the op before it has not, and comes after the last pull from that half: ops
that run at once on different streams never share bytes. Signals between two ranks are taken in the order in which they
were sent, like messages of any transport, so a counter on either side finds the channel of each.

A wait on the device cannot be called back. It traps when the group's time-out is over, which ends the process with a
CUDA error; before that a thread that looks after waits says on the log which rank waits for which peer, op and chunk,
and breaks the epoch for all others (:mod:`.coordination`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from ..caches import per_group
from .coordination import PATIENCE_SECONDS, Agreement, Ticket, agreement_of, failure
from .steps import Transfer
from .transport import Message, Room

_log = logging.getLogger(__name__)

Stream = Any
Event = Any


class Memory(Protocol):
    """The workspaces of all ranks: torch's ``_SymmetricMemory``, as far as it is used here."""

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor: ...


class Device(Protocol):
    """Streams, events and signals. What is put on a stream happens after all that was put there before."""

    channels: int  # signals that may be on their way at once, for each pair of ranks

    def allocate(self, nbytes: int) -> Memory:
        """Workspaces of ``nbytes`` on all ranks, their signals down; all must come."""

    def new_stream(self) -> Stream: ...

    def current(self) -> Stream:
        """Where the caller computes."""

    def capturing(self) -> bool:
        """Whether a graph is being captured."""

    def synchronize(self) -> None: ...

    def record(self, stream: Stream) -> Event: ...

    def wait(self, stream: Stream, event: Event) -> None: ...

    def done(self, event: Event) -> bool: ...

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None: ...

    def signal(self, stream: Stream, memory: Memory, peer: int, channel: int) -> None:
        """Raise the signal at ``peer`` once an earlier one on this channel has been taken."""

    def await_signal(self, stream: Stream, memory: Memory, peer: int, channel: int) -> None:
        """Take a signal of ``peer``."""


class _CudaMemory(NamedTuple):
    """A handle of torch, and the tensor that it is the handle of: who lets go of that may meet others in its memory."""

    handle: Any
    workspace: Tensor

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        buffer: Tensor = self.handle.get_buffer(rank, sizes, dtype, storage_offset)
        return buffer


class CudaDevice:
    """The real thing."""

    def __init__(self, group: ProcessGroup):
        self._group_name, self._ranks = group.group_name, group.size()
        self._timeout_ms = int(agreement_of(group).timeout.total_seconds() * 1000)
        self._symmetric = _symmetric_memory()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self.channels = self._symmetric.get_signal_pad_size() // 4 // self._ranks

    def allocate(self, nbytes: int) -> Memory:
        # Not symm_mem.empty: since torch 2.11 that takes from a pool, which gives memory that has been freed again with
        # its signals as they were left, up where an epoch broke.
        empty = self._symmetric._SymmetricMemory.empty_strided_p2p
        workspace = empty((nbytes,), (1,), torch.uint8, self._device)
        return _CudaMemory(self._symmetric.rendezvous(workspace, self._group_name), workspace)

    def new_stream(self) -> Stream:
        return torch.cuda.Stream(self._device, priority=-1)

    def current(self) -> Stream:
        return torch.cuda.current_stream(self._device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def record(self, stream: Stream) -> Event:
        return stream.record_event()

    def wait(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def done(self, event: Event) -> bool:
        return bool(event.query())

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def signal(self, stream: Stream, memory: Any, peer: int, channel: int) -> None:
        with torch.cuda.stream(stream):
            memory.handle.put_signal(peer, channel, self._timeout_ms)

    def await_signal(self, stream: Stream, memory: Any, peer: int, channel: int) -> None:
        with torch.cuda.stream(stream):
            memory.handle.wait_signal(peer, channel, self._timeout_ms)


class SymmMemTransport:
    """Chunks between the ranks of ``group`` through a workspace that all of them can read."""

    def __init__(self, group: ProcessGroup, device: Device):
        self.agreement, self.rank, self.ranks, self.device = agreement_of(group), group.rank(), group.size(), device
        self.sending, self.pulling, self.settling = (device.new_stream() for _ in range(3))
        self.memory: Memory  # once an op has sent something
        self.watch = _Overdue(self.agreement, self.rank, device)
        self._in_graphs: list[Memory] = []  # captured ops go on using theirs when it has grown
        self._half_bytes = 0
        self._free: list[Event | None] = [None, None]  # when the peers have pulled the last of either half
        self._next = 0
        self._epoch: int | None = None  # of the last op
        self._counts: Counter[tuple[str, int]] = Counter()

    def session(self, signature: str, room: Room) -> SymmMemSession:
        ticket = self.agreement.begin(signature)
        nbytes = room.nbytes()
        try:
            if self._epoch not in (None, ticket.epoch):  # signals of the last one are lost
                self._allocate(self._half_bytes, f"workspace of epoch {ticket.epoch}")
            self._epoch = ticket.epoch
            if nbytes > self._half_bytes:
                self.reserve(nbytes, signature)
        except BaseException as error:
            self.agreement.give_up(ticket, error)
            raise
        half, self._next = self._next, 1 - self._next
        free, self._free[half] = self._free[half], None
        if self.device.capturing():  # which began on a device at rest; what it does not know it does not capture
            if nbytes and not any(memory is self.memory for memory in self._in_graphs):
                self._in_graphs.append(self.memory)
            for stream in (self.sending, self.pulling, self.settling):
                self.device.wait(stream, self.device.record(self.device.current()))
        elif free is not None:
            self.device.wait(self.device.current(), free)
        return SymmMemSession(self, ticket, room, half, half * self._half_bytes)

    def reserve(self, nbytes: int, purpose: str) -> None:
        """Room for ops that send ``nbytes`` each; all ranks must come.

        Raises:
            RuntimeError: the workspace would have to grow while a graph is being captured.
        """
        if nbytes <= self._half_bytes:
            return
        if self.device.capturing():
            raise RuntimeError(
                f"{purpose} needs a workspace of {nbytes} bytes, and there are {self._half_bytes}: it cannot grow "
                f"during graph capture; call reserve_workspace(group, {nbytes}) before it, on every rank"
            )
        self._allocate(1 << (nbytes - 1).bit_length(), "workspace")

    def release(self, half: int, when: Event) -> None:
        self._free[half] = when

    def channel(self, kind: str, peer: int) -> int:
        """That of the next signal of ``kind`` in one direction between ``peer`` and us."""
        count = self._counts[kind, peer]
        self._counts[kind, peer] += 1
        # The upper half of the channels says that chunks are there, the lower that they have been pulled.
        lanes = self.device.channels // 2
        return count % lanes + (lanes if kind in ("send", "receive") else 0)

    def _allocate(self, half_bytes: int, name: str) -> None:
        self.device.synchronize()
        self.agreement.require(f"{name}, {half_bytes} bytes an op")  # nobody reads the old one any more
        self._half_bytes, self._free, self._next = half_bytes, [None, None], 0
        self._counts.clear()
        if half_bytes:
            self.memory = self.device.allocate(2 * half_bytes)


class SymmMemSession:
    """One op's half of the workspace, its signals and pulls."""

    def __init__(self, transport: SymmMemTransport, ticket: Ticket, room: Room, half: int, base: int):
        self._transport, self._device = transport, transport.device
        self._ticket, self._room = ticket, room
        self._half, self._base = half, base
        self._staged: set[int] = set()
        self._arrivals: dict[Transfer, Event] = {}
        self._targets: dict[int, Transfer] = {}  # the last transfer to each peer, and from each
        self._sources: dict[int, Transfer] = {}

    def empty(self, transfer: Transfer, shape: Sequence[int], like: Tensor) -> Tensor:
        return self._slot(self._transport.rank, transfer, shape, like.dtype)

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        transport, device = self._transport, self._device
        memory = transport.memory
        for transfer, buffer in sends:
            slot = self._slot(transport.rank, transfer, buffer.shape, buffer.dtype)
            offset = self._room.offset(transfer)
            if slot.data_ptr() != buffer.data_ptr() and offset not in self._staged:
                self._staged.add(offset)  # one copy for all that pull it
                slot.copy_(buffer)
            device.wait(transport.sending, device.record(device.current()))
            channel = transport.channel("send", transfer.target)
            device.signal(transport.sending, memory, transfer.target, channel)
            self._targets[transfer.target] = transfer
        if receives:  # their buffers may hold what the computing stream still reads
            device.wait(transport.pulling, device.record(device.current()))
        for transfer, buffer in receives:
            channel = transport.channel("receive", transfer.source)
            device.await_signal(transport.pulling, memory, transfer.source, channel)
            slot = self._slot(transfer.source, transfer, buffer.shape, buffer.dtype)
            device.copy(transport.pulling, buffer, slot)
            arrival = self._arrivals[transfer] = device.record(transport.pulling)
            transport.watch.add(arrival, self._ticket, "receiving", transfer)
            self._sources[transfer.source] = transfer

    def gathers_itself(self, device_type: str) -> bool:
        return False

    def all_gather(self, whole: Tensor, own: Tensor) -> None:
        raise NotImplementedError("symmetric memory has no all-gather of its own")

    def all_gathered(self) -> None:
        """Nothing was started."""

    def takes_receives_early(self, device_type: str) -> bool:
        return False  # pulls run one after the other

    def wait(self, transfer: Transfer) -> None:
        try:
            self._device.wait(self._device.current(), self._arrivals.pop(transfer))
        except RuntimeError as error:
            raise self._failure("receiving", transfer, error) from error

    def drain(self) -> None:
        """What was sent lies in the workspace: the callers' buffers are free, and :meth:`empty` gives new ones."""

    def finish(self) -> None:
        transport, device = self._transport, self._device
        for source in self._sources:
            device.signal(transport.pulling, transport.memory, source, transport.channel("pulled", source))
        for target, transfer in self._targets.items():
            channel = transport.channel("taken", target)
            device.await_signal(transport.settling, transport.memory, target, channel)
            transport.watch.add(device.record(transport.settling), self._ticket, "sending", transfer)
        free = device.record(transport.settling)
        transport.release(self._half, free)
        if device.capturing():  # the captured streams join the one that captures
            for stream in (transport.sending, transport.pulling, transport.settling):
                device.wait(device.current(), device.record(stream))
        transport.agreement.end()

    def abort(self, error: BaseException) -> None:
        self._transport.agreement.give_up(self._ticket, error)

    def _slot(self, rank: int, transfer: Transfer, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Where the workspace of ``rank`` holds the message of ``transfer``."""
        offset = self._base + self._room.offset(transfer)
        return self._transport.memory.get_buffer(rank, list(shape), dtype, offset // dtype.itemsize)

    def _failure(self, doing: str, transfer: Transfer, error: RuntimeError) -> RuntimeError:
        cause = self._transport.agreement.suspect(self._ticket) or f"{type(error).__name__}: {error}"
        return failure(self._transport.rank, self._ticket, doing, transfer, cause)


class _Wait(NamedTuple):
    event: Event
    since: float
    ticket: Ticket
    doing: str
    transfer: Transfer


class _Overdue:
    """Looks after waits on the device; what lasts is looked into and told, as the device itself cannot tell."""

    def __init__(self, agreement: Agreement, rank: int, device: Device):
        self._rank, self._device = rank, device
        self._waits: deque[_Wait] = deque()
        thread = threading.Thread(target=self._look, args=(weakref.ref(agreement),), daemon=True, name="seqpar-overdue")
        thread.start()

    def add(self, event: Event, ticket: Ticket, doing: str, transfer: Transfer) -> None:
        if not self._device.capturing():
            self._waits.append(_Wait(event, time.monotonic(), ticket, doing, transfer))

    def rest(self) -> None:
        """All that was to be waited for has come."""
        self._waits.clear()

    def _look(self, owner: weakref.ref[Agreement]) -> None:
        told: set[Ticket] = set()
        while True:
            time.sleep(PATIENCE_SECONDS / 2)
            agreement = owner()
            if agreement is None:
                return
            with contextlib.suppress(
                Exception
            ):  # a device or store that is gone tells nothing; rest() may come between
                late = self._waits[0] if self._waits else None
                while late is not None and self._device.done(late.event):
                    self._waits.popleft()
                    late = self._waits[0] if self._waits else None
                if late is not None and late.ticket not in told:
                    error = self._judge(agreement, late)
                    if error is not None:
                        told.add(late.ticket)
                        _log.error("%s", error)
            del agreement

    def _judge(self, agreement: Agreement, late: _Wait) -> RuntimeError | None:
        waited = time.monotonic() - late.since
        if waited < PATIENCE_SECONDS:
            return None
        cause = agreement.suspect(late.ticket)
        if cause is None and waited > 0.75 * agreement.timeout.total_seconds():
            cause = f"no signal for {waited:.1f} s"
        if cause is None:
            return None
        error = failure(self._rank, late.ticket, late.doing, late.transfer, cause)
        agreement.note_break(late.ticket, str(error))
        return error


_obstacles: weakref.WeakKeyDictionary[ProcessGroup, str] = weakref.WeakKeyDictionary()


@per_group
def transport_over(group: ProcessGroup) -> SymmMemTransport:
    """The one SymmMemTransport of ``group`` in this process.

    Raises:
        RuntimeError: there can be none (:func:`why_not`).
    """
    return SymmMemTransport(group, open_device(group))


def open_device(group: ProcessGroup) -> Device:
    reason = why_not(group)
    if reason:
        raise RuntimeError(f"symmetric memory cannot be used here: {reason}")
    return CudaDevice(group)


def reserve_workspace(group: ProcessGroup, nbytes: int) -> None:
    """Room for peer ops that send ``nbytes`` each, to be called on every rank right before a graph is captured.

    During a capture no workspace can grow. It also brings the device to rest and ends the watch over earlier waits:
    CUDA forbids a thread to ask after events while another captures.

    Raises:
        RuntimeError: no symmetric memory on this group, with the reason.
    """
    transport = transport_over(group)
    transport.reserve(nbytes, "reserve_workspace")
    transport.device.synchronize()
    transport.watch.rest()


def why_not(group: ProcessGroup) -> str:
    """Why ``group`` cannot use symmetric memory; "" where it can. The first call is one all ranks must make."""
    if torch.compiler.is_compiling():
        return _why_not_named(group.group_name)
    found = _obstacles.get(group)
    if found is None:
        found = _obstacles[group] = _obstacle_among(group)
    return found


@torch.compiler.assume_constant_result
def _why_not_named(name: str) -> str:
    return why_not(_resolve_process_group(name))  # type: ignore[arg-type]


def _obstacle_among(group: ProcessGroup) -> str:
    """Every rank's own obstacle and place are heard, so that all come to one answer."""
    agreement = agreement_of(group)
    local = _local_obstacle(group)
    place = "" if local else f"{socket.gethostname()} {torch.cuda.current_device()}"
    agreement.publish("peer", f"{local}|{place}")
    agreement.require("which ranks have symmetric memory")
    heard = [agreement.read("peer", rank).split("|") for rank in range(group.size())]
    for rank, (obstacle, _) in enumerate(heard):
        if obstacle:
            return f"rank {rank}: {obstacle}"
    places = [place.split() for _, place in heard]
    if len({host for host, _ in places}) > 1:
        return f"the group spans the hosts {sorted({host for host, _ in places})}"
    devices = [int(device) for _, device in places]
    if len(set(devices)) < len(devices):
        if os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") != "1":
            return "several ranks share a device, which needs TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1"
        return ""
    apart = [(a, b) for a in devices for b in devices if a != b and not torch.cuda.can_device_access_peer(a, b)]
    return f"devices {apart[0][0]} and {apart[0][1]} cannot reach one another's memory" if apart else ""


def _local_obstacle(group: ProcessGroup) -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if "cuda" not in [device.type for device in group._device_types]:
        return "the group has no backend for CUDA"
    try:
        _symmetric_memory()
    except ImportError as error:
        return f"this build of torch has no symmetric memory ({error})"
    return ""


def _symmetric_memory() -> Any:
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory
