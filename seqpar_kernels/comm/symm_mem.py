"""Transport over symmetric memory: copy engines between GPUs that reach one another's memory (NVLink, PCIe P2P).

Each rank of the group owns a workspace that its peers can read. A sender puts a chunk in its workspace and signals the
receiver. The receiver pulls the chunk into its own buffer, and signals once an op that it has pulled the last chunk.
An input shard costs one local copy. Partial results cost none: they are computed in the workspace
(:meth:`SymmMemSession.empty`). The only kernels on SMs are those of the signals, one warp each.

Streams order everything, and the host never waits. A group has three streams of high priority: one sends signals after
the computing stream, one waits for signals and pulls, one waits for the signals that the peers have pulled. Ops use
the two halves of the workspace in turn. An op begins after the last pull from its half, so that ops on different
streams never share bytes. Signals between two ranks are taken in the order in which they were sent, so a counter on
either side gives the channel of each signal.

A wait on the device cannot be cancelled. It traps when the group's time-out is over, and the process ends with a CUDA
error. Before that a watchdog thread logs which rank waits for which peer, op and chunk, and ends the epoch for all
other ranks (:mod:`.coordination`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import per_group
from ..compiling import constant_when_traced
from ..layout import process_group
from .background import pause, start_watching
from .coordination import PATIENCE_SECONDS, Coordination, Ticket, coordination_of, failure
from .steps import Transfer
from .transport import Message, Room

_log = logging.getLogger(__name__)

Stream = Any
Event = Any


class Memory(Protocol):
    """The workspaces of all ranks: the methods of torch's ``_SymmetricMemory`` that are used here."""

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor: ...


class Device(Protocol):
    """Streams, events and signals. Work on one stream runs in the order in which it was put there."""

    channels: int  # the most signals between two ranks that may be untaken at one time

    def allocate(self, nbytes: int) -> Memory:
        """Workspaces of ``nbytes`` on all ranks, with all signals low; all ranks must call."""

    def new_stream(self) -> Stream: ...

    def current(self) -> Stream:
        """The stream on which the caller computes."""

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
    """A handle of torch and its tensor, which must live as long: freed memory would be given to another tensor."""

    handle: Any
    workspace: Tensor

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        buffer: Tensor = self.handle.get_buffer(rank, sizes, dtype, storage_offset)
        return buffer


class CudaDevice:
    """Streams, events and signals of CUDA and torch's symmetric memory."""

    def __init__(self, group: ProcessGroup):
        self._group_name, self._ranks = group.group_name, group.size()
        self._timeout_ms = int(coordination_of(group).timeout.total_seconds() * 1000)
        self._symmetric = _symmetric_memory()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self.channels = self._symmetric.get_signal_pad_size() // 4 // self._ranks

    def allocate(self, nbytes: int) -> Memory:
        # Not symm_mem.empty: since torch 2.11 it takes memory from a pool. Freed memory comes back from the pool with
        # its old signals, which are still high where an epoch failed.
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
        self.coordination, self.device = coordination_of(group), device
        self.rank, self.ranks = group.rank(), group.size()
        self.sending, self.pulling, self.settling = (device.new_stream() for _ in range(3))
        self.memory: Memory  # set by the first op that sends something
        self.watchdog = _Overdue(self.coordination, self.rank, device)
        self._in_graphs: list[Memory] = []  # captured graphs keep using their workspace after it was replaced
        self._half_bytes = 0
        self._free: list[Event | None] = [None, None]  # for each half: the peers have pulled everything from it
        self._next = 0
        self._epoch: int | None = None  # the epoch of the last op
        self._counts: Counter[tuple[str, int]] = Counter()

    def session(self, signature: str, room: Room) -> SymmMemSession:
        ticket = self.coordination.begin(signature)
        nbytes = room.nbytes()
        try:
            if self._epoch not in (None, ticket.epoch):  # signals of the failed epoch are in an unknown state
                self._allocate(self._half_bytes, f"workspace of epoch {ticket.epoch}")
            self._epoch = ticket.epoch
            if nbytes > self._half_bytes:
                self.reserve(nbytes, signature)
        except BaseException as error:
            self.coordination.give_up(ticket, error)
            raise
        half, self._next = self._next, 1 - self._next
        free, self._free[half] = self._free[half], None
        if self.device.capturing():  # a capture begins on an idle device, so there is no earlier op to wait for
            if nbytes and not any(memory is self.memory for memory in self._in_graphs):
                self._in_graphs.append(self.memory)
            for stream in (self.sending, self.pulling, self.settling):
                self.device.wait(stream, self.device.record(self.device.current()))
        elif free is not None:
            self.device.wait(self.device.current(), free)
        return SymmMemSession(self, ticket, room, half, half * self._half_bytes)

    def reserve(self, nbytes: int, purpose: str) -> None:
        """Make the workspace large enough for ops that send ``nbytes`` each; all ranks must call.

        Raises:
            RuntimeError: the workspace would have to grow while a graph is being captured.
        """
        if nbytes <= self._half_bytes:
            return
        if self.device.capturing():
            raise RuntimeError(
                f"{purpose} needs a workspace of {nbytes} bytes, the workspace has {self._half_bytes} and cannot grow "
                f"during graph capture; call reserve_workspace(group, {nbytes}) on every rank before the capture"
            )
        self._allocate(1 << (nbytes - 1).bit_length(), "workspace")

    def release(self, half: int, when: Event) -> None:
        self._free[half] = when

    def channel(self, kind: str, peer: int) -> int:
        """The channel of the next signal of ``kind`` in one direction between ``peer`` and this rank."""
        count = self._counts[kind, peer]
        self._counts[kind, peer] += 1
        # Channels of the upper half signal that a chunk is there, those of the lower half that it has been pulled.
        lanes = self.device.channels // 2
        return count % lanes + (lanes if kind in ("send", "receive") else 0)

    def _allocate(self, half_bytes: int, name: str) -> None:
        self.device.synchronize()
        self.coordination.require(f"{name}, {half_bytes} bytes an op")  # after this no rank reads the old workspace
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
        self._targets: dict[int, Transfer] = {}  # the last transfer to each peer
        self._sources: dict[int, Transfer] = {}  # the last transfer from each peer

    def empty(self, transfer: Transfer, shape: Sequence[int], like: Tensor) -> Tensor:
        return self._slot(self._transport.rank, transfer, shape, like.dtype)

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        transport, device = self._transport, self._device
        memory = transport.memory
        for transfer, buffer in sends:
            slot = self._slot(transport.rank, transfer, buffer.shape, buffer.dtype)
            offset = self._room.offset(transfer)
            if slot.data_ptr() != buffer.data_ptr() and offset not in self._staged:
                self._staged.add(offset)  # one copy serves all peers that pull it
                slot.copy_(buffer)
            device.wait(transport.sending, device.record(device.current()))
            channel = transport.channel("send", transfer.target)
            device.signal(transport.sending, memory, transfer.target, channel)
            self._targets[transfer.target] = transfer
        if receives:  # the computing stream may still read the buffers that the pulls overwrite
            device.wait(transport.pulling, device.record(device.current()))
        for transfer, buffer in receives:
            channel = transport.channel("receive", transfer.source)
            device.await_signal(transport.pulling, memory, transfer.source, channel)
            slot = self._slot(transfer.source, transfer, buffer.shape, buffer.dtype)
            device.copy(transport.pulling, buffer, slot)
            arrival = self._arrivals[transfer] = device.record(transport.pulling)
            transport.watchdog.add(arrival, self._ticket, "receiving", transfer)
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
        """Nothing to wait for: sent chunks are in the workspace, so that the caller's buffers are free."""

    def finish(self) -> None:
        transport, device = self._transport, self._device
        for source in self._sources:
            device.signal(transport.pulling, transport.memory, source, transport.channel("pulled", source))
        for target, transfer in self._targets.items():
            channel = transport.channel("taken", target)
            device.await_signal(transport.settling, transport.memory, target, channel)
            transport.watchdog.add(device.record(transport.settling), self._ticket, "sending", transfer)
        free = device.record(transport.settling)
        transport.release(self._half, free)
        if device.capturing():  # the captured streams must join the capturing stream
            for stream in (transport.sending, transport.pulling, transport.settling):
                device.wait(device.current(), device.record(stream))
        transport.coordination.end()

    def abort(self, error: BaseException) -> None:
        self._transport.coordination.give_up(self._ticket, error)

    def _slot(self, rank: int, transfer: Transfer, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Where the workspace of ``rank`` holds the message of ``transfer``."""
        offset = self._base + self._room.offset(transfer)
        return self._transport.memory.get_buffer(rank, list(shape), dtype, offset // dtype.itemsize)

    def _failure(self, doing: str, transfer: Transfer, error: RuntimeError) -> RuntimeError:
        cause = self._transport.coordination.suspect(self._ticket) or f"{type(error).__name__}: {error}"
        return failure(self._transport.rank, self._ticket, doing, transfer, cause)


class _Wait(NamedTuple):
    event: Event
    since: float
    ticket: Ticket
    doing: str
    transfer: Transfer


class _Overdue:
    """A watchdog of the waits on the device: logs a long wait and ends its epoch, which the device cannot do."""

    def __init__(self, coordination: Coordination, rank: int, device: Device):
        self._rank, self._device = rank, device
        self._waits: deque[_Wait] = deque()
        start_watching(self._look, weakref.ref(coordination), name="seqpar-overdue")

    def add(self, event: Event, ticket: Ticket, doing: str, transfer: Transfer) -> None:
        if not self._device.capturing():
            self._waits.append(_Wait(event, time.monotonic(), ticket, doing, transfer))

    def rest(self) -> None:
        """Forget all waits: the device is idle, so each of them has ended."""
        self._waits.clear()

    def _look(self, owner: weakref.ref[Coordination]) -> None:
        told: set[Ticket] = set()
        while pause(PATIENCE_SECONDS / 2):
            coordination = owner()
            if coordination is None:
                return
            # The device or the store may be gone, and rest() may empty the queue at any time.
            with contextlib.suppress(Exception):
                late = self._waits[0] if self._waits else None
                while late is not None and self._device.done(late.event):
                    self._waits.popleft()
                    late = self._waits[0] if self._waits else None
                if late is not None and late.ticket not in told:
                    error = self._judge(coordination, late)
                    if error is not None:
                        told.add(late.ticket)
                        _log.error("%s", error)
            del coordination

    def _judge(self, coordination: Coordination, late: _Wait) -> RuntimeError | None:
        waited = time.monotonic() - late.since
        if waited < PATIENCE_SECONDS:
            return None
        cause = coordination.suspect(late.ticket)
        if cause is None and waited > 0.75 * coordination.timeout.total_seconds():
            cause = f"no signal for {waited:.1f} s"
        if cause is None:
            return None
        error = failure(self._rank, late.ticket, late.doing, late.transfer, cause)
        coordination.note_break(late.ticket, str(error))
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
    """Make the workspace large enough for ops that send ``nbytes`` each, before a graph is captured.

    All ranks must call it right before the capture, during which no workspace can grow. It also synchronizes the
    device and makes the watchdog forget earlier waits: CUDA forbids a thread to query events while another captures.

    Raises:
        RuntimeError: no symmetric memory on this group, with the reason.
    """
    transport = transport_over(group)
    transport.reserve(nbytes, "reserve_workspace")
    transport.device.synchronize()
    transport.watchdog.rest()


def why_not(group: ProcessGroup) -> str:
    """Why ``group`` cannot use symmetric memory; "" where it can. All ranks must make the first call."""
    if torch.compiler.is_compiling():
        return _why_not_named(group.group_name)
    found = _obstacles.get(group)
    if found is None:
        found = _obstacles[group] = _obstacle_among(group)
    return found


@constant_when_traced
def _why_not_named(name: str) -> str:
    return why_not(process_group(name))


def _obstacle_among(group: ProcessGroup) -> str:
    """The first obstacle of any rank, from what all ranks publish, so that all ranks find the same."""
    coordination = coordination_of(group)
    local = _local_obstacle(group)
    place = "" if local else f"{socket.gethostname()} {torch.cuda.current_device()}"
    coordination.publish("peer", f"{local}|{place}")
    coordination.require("which ranks have symmetric memory")
    heard = [coordination.read("peer", rank).split("|") for rank in range(group.size())]
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
