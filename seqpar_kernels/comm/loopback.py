"""Virtual ranks: R ranks as R threads of one process on one device, for tests and for timing on a single GPU.

Schedules, ops, autograd and modules are the same as on real ranks. Each thread holds a :class:`LoopbackGroup`, a
``ProcessGroup`` that ops find by its name. Transfers are copies on the device. On CUDA every virtual rank has a stream
for computation and one of high priority for receives; events order the copies. With a rate each receiver's link is
paced: a message arrives after bytes / rate seconds. On CUDA one thread of one SM spins for that time on the receiving
stream, on CPU a thread sleeps.

Backward passes run in the thread that called them (``torch.autograd.set_multithreading_enabled(False)``). Autograd's
thread would serve all ranks of a device, so that a backward that waits for another rank would block that rank too. The
end of a transfer that comes second starts the copy, since a stream can only wait for an event that was recorded.

Each rank draws dropout seeds from a generator of its own; all are seeded from the process's default generator. Other
random numbers come from the default generators, which the virtual ranks share in no fixed order.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import ProcessGroup

from ..random import own_generator
from .coordination import PATIENCE_SECONDS, Ticket, coordination_of, failure, group_gone
from .steps import Transfer
from .transport import Message, Room

if TYPE_CHECKING:  # not in every version of PyTorch
    from torch.distributed.distributed_c10d import GroupName

_names = itertools.count()


class LoopbackGroup(ProcessGroup):
    """One virtual rank's view of its :class:`Loopback`."""

    def __init__(self, world: Loopback, rank: int, name: str):
        super().__init__(rank, world.ranks)  # type: ignore[call-arg]  # the stub knows another constructor only
        self.world = world
        self.timeout = timedelta(seconds=world.timeout)
        self._own_name = name

    @property
    def group_name(self) -> GroupName:
        return cast("GroupName", self._own_name)

    def get_group_store(self) -> dist.Store:
        return self.world.store

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: object = None
    ) -> dist.Work:
        """An all-gather for the debug checks; the ops of this package use transports."""
        gathered = self.world.gathered(self.rank(), inputs[0])
        for output, value in zip(outputs[0], gathered, strict=True):
            output.copy_(value)
        return _Done()


class _Done(dist.Work):
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


@dataclass
class _Letter:
    """The state of one transfer: the buffers of both ends, and whether it has arrived."""

    source: Tensor | None = None
    target: Tensor | None = None
    posted: list[torch.cuda.Event] | None = None  # recorded when either end's buffer was ready
    arrived: bool = False  # on CUDA: the copy is on the stream, and ``event`` is recorded behind it
    event: torch.cuda.Event | None = None
    failed: BaseException | None = None  # the error of the copy

    @property
    def complete(self) -> bool:
        return self.source is not None and self.target is not None


class RankErrors(RuntimeError):
    """Virtual ranks that failed: ``errors`` maps the rank to what it raised."""

    def __init__(self, errors: dict[int, BaseException]):
        self.errors = errors
        super().__init__("; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in errors.items()))


class Loopback:
    """``ranks`` virtual ranks on ``device``.

    Args:
        ranks: how many.
        device: where all of them live.
        bytes_per_second: pace of each rank's incoming link; None copies as fast as the device does.
        timeout: seconds after which a rank that waits for another raises.
    """

    def __init__(
        self,
        ranks: int,
        device: torch.device | str = "cpu",
        *,
        bytes_per_second: float | None = None,
        timeout: float = 60.0,
    ):
        if ranks < 1:
            raise ValueError(f"ranks: expected at least one, got {ranks}")
        if bytes_per_second is not None and not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second: expected a positive rate or None, got {bytes_per_second}")
        self.ranks, self.device, self.timeout = ranks, torch.device(device), timeout
        self.store = dist.HashStore()
        self.changed = threading.Condition()
        self._letters: dict[tuple[int, int, Transfer], _Letter] = {}
        self._gathering: dict[int, Tensor] = {}
        self._barrier = threading.Barrier(ranks, timeout=timeout)
        on_cuda = self.device.type == "cuda"
        self._computing = [torch.cuda.Stream(self.device) for _ in range(ranks)] if on_cuda else []
        link = _CudaLink if on_cuda else _CopyLink if bytes_per_second is None else _PacedLink
        self._links = [link(self, bytes_per_second) for _ in range(ranks)]
        name = f"loopback-{next(_names)}"
        self.groups = [LoopbackGroup(self, rank, f"{name}/{rank}") for rank in range(ranks)]
        for group in self.groups:
            _register_process_group(group.group_name, group)

    def close(self) -> None:
        """Forget the groups. Also what ``with`` does at its end."""
        for group in self.groups:
            _unregister_process_group(group.group_name)
        for link in self._links:
            link.close()
        self.groups = []

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """``fn(group, *args)`` on every virtual rank, each in a thread of its own; the results in rank order.

        On CUDA the caller's stream comes before and after.

        Raises:
            RankErrors: any rank raised.
        """
        outcomes = self.outcomes(fn, *args)
        errors = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)}
        if errors:
            raise RankErrors(errors) from next(iter(errors.values()))
        return outcomes

    def outcomes(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What :meth:`run` returns, with the exception in the place of each rank that raised one."""
        outcomes: list[Any] = [None] * self.ranks
        seed = int(torch.randint(2**63 - 1, ()))
        grad = torch.is_grad_enabled()
        started = torch.cuda.current_stream(self.device).record_event() if self._computing else None

        def work(rank: int) -> None:
            try:
                with self._place(rank, seed, started), torch.set_grad_enabled(grad):
                    outcomes[rank] = fn(self.groups[rank], *args)
            except BaseException as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank}") for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stream in self._computing:
            torch.cuda.current_stream(self.device).wait_stream(stream)
        self._barrier.reset()
        return outcomes

    @contextmanager
    def _place(self, rank: int, seed: int, started: torch.cuda.Event | None) -> Iterator[None]:
        """The stream, generator and autograd mode of one virtual rank's thread."""
        generator = torch.Generator(self.device).manual_seed(seed)
        stream = torch.cuda.stream(self._computing[rank]) if self._computing else nullcontext()
        with stream, own_generator(generator), torch.autograd.set_multithreading_enabled(False):
            if started is not None:
                started.wait(self._computing[rank])
            yield

    def gathered(self, rank: int, value: Tensor) -> list[Tensor]:
        """The values of all ranks; all ranks must call."""
        self._gathering[rank] = value.detach().clone()
        self._barrier.wait()
        values = [self._gathering[peer] for peer in range(self.ranks)]
        self._barrier.wait()
        return values

    def bring(self, tag: tuple[int, int], transfer: Transfer, source: Tensor | None, target: Tensor | None) -> _Letter:
        """Add one end of a transfer; the second end starts the copy."""
        with self.changed:
            letter = self._letters.setdefault((*tag, transfer), _Letter())
            letter.source = letter.source if source is None else source
            letter.target = letter.target if target is None else target
            link = self._links[transfer.target]
            link.bring(letter)
            if letter.complete:
                link.carry(letter)
                self.changed.notify_all()
        return letter

    def wait(self, letter: _Letter, transfer: Transfer, seconds: float) -> bool:
        """Whether ``letter`` has arrived (on CUDA: the current stream may use it now)."""
        with self.changed:
            if not self.changed.wait_for(lambda: letter.arrived or letter.failed is not None, seconds):
                return False
        if letter.failed is not None:
            raise RuntimeError(f"{transfer}: the link could not carry it") from letter.failed
        self._links[transfer.target].await_(letter)
        return True

    def forget(self, tag: tuple[int, int], transfer: Transfer) -> None:
        """Drop a transfer that was received or given up."""
        with self.changed:
            self._letters.pop((*tag, transfer), None)


class _CopyLink:
    """Arrival at the speed of a copy."""

    def __init__(self, world: Loopback, rate: float | None):
        self._world, self._rate = world, rate

    def bring(self, letter: _Letter) -> None:
        """Note that one end's buffer is ready."""

    def carry(self, letter: _Letter) -> None:
        """Copy from source to target; both ends are there, and the world's lock is held."""
        assert letter.source is not None and letter.target is not None
        letter.target.copy_(letter.source)
        letter.arrived = True

    def await_(self, letter: _Letter) -> None:
        """Make the current stream wait for the copy."""

    def close(self) -> None:
        """Free nothing: there is no thread and no stream."""


class _PacedLink(_CopyLink):
    """Arrival after bytes / rate seconds on a link that carries one message at a time."""

    def __init__(self, world: Loopback, rate: float | None):
        super().__init__(world, rate)
        self._queue: queue.SimpleQueue[_Letter | None] = queue.SimpleQueue()
        self._mover = threading.Thread(target=self._move, daemon=True, name="link")
        self._mover.start()

    def carry(self, letter: _Letter) -> None:
        self._queue.put(letter)

    def close(self) -> None:
        self._queue.put(None)
        self._mover.join()

    def _move(self) -> None:
        assert self._rate is not None
        free = time.perf_counter()
        while (letter := self._queue.get()) is not None:
            assert letter.source is not None
            free = max(free, time.perf_counter()) + letter.source.nbytes / self._rate
            time.sleep(max(0.0, free - time.perf_counter()))
            with self._world.changed, torch.no_grad():  # grad mode is per thread, and the buffers may need gradients
                try:
                    super().carry(letter)
                except BaseException as error:
                    letter.failed = error
                self._world.changed.notify_all()


class _CudaLink(_CopyLink):
    """Copies on a stream of high priority, after both ends' streams are ready, spun out to bytes / rate."""

    def __init__(self, world: Loopback, rate: float | None):
        super().__init__(world, rate)
        self._stream = torch.cuda.Stream(world.device, priority=-1)
        self._cycles = 0.0 if rate is None else _cycles_per_second(world.device) / rate

    def bring(self, letter: _Letter) -> None:
        ready = torch.cuda.current_stream(self._world.device).record_event()
        letter.posted = [*(letter.posted or ()), ready]

    def carry(self, letter: _Letter) -> None:
        assert letter.source is not None and letter.target is not None
        with torch.cuda.stream(self._stream):
            for ready in letter.posted or ():
                ready.wait(self._stream)
            if self._cycles:
                torch.cuda._sleep(int(letter.source.nbytes * self._cycles))
            letter.target.copy_(letter.source)
            letter.event = self._stream.record_event()
        letter.arrived = True

    def await_(self, letter: _Letter) -> None:
        assert letter.event is not None
        letter.event.wait(torch.cuda.current_stream(self._world.device))


def _cycles_per_second(device: torch.device) -> float:
    """The measured rate of ``torch.cuda._sleep``."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 20_000_000
    with torch.cuda.device(device):
        torch.cuda._sleep(cycles)  # brings the clocks to their full rate
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return cycles / (begin.elapsed_time(end) * 1e-3)


class LoopbackTransport:
    """Moves messages between the virtual ranks of one :class:`Loopback`."""

    def __init__(self, group: LoopbackGroup):
        self._group = weakref.ref(group)  # a transport is kept as long as its group

    def session(self, signature: str, room: Room) -> LoopbackSession:
        group = self._group()
        if group is None:
            raise group_gone(signature)
        return LoopbackSession(group, coordination_of(group).begin(signature))


class LoopbackSession:
    """The transfers of one op. Step and transfer together identify a message on both ends."""

    def __init__(self, group: LoopbackGroup, ticket: Ticket):
        self._group, self._world, self._ticket = group, group.world, ticket
        self._tag = (ticket.epoch, ticket.tag)
        self._open: dict[Transfer, _Letter] = {}

    def empty(self, transfer: Transfer, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def post(self, sends: list[Message], receives: list[Message]) -> None:
        for message in receives:
            self._bring(message.transfer, None, message.buffer)
        for message in sends:
            self._bring(message.transfer, message.buffer, None)

    def gathers_itself(self, device_type: str) -> bool:
        return False

    def all_gather(self, whole: Tensor, own: Tensor) -> None:
        raise NotImplementedError("virtual ranks have no all-gather of their own")

    def all_gathered(self) -> None:
        """Nothing was started."""

    def takes_receives_early(self, device_type: str) -> bool:
        return False  # a send starts as soon as both ends are there, in whatever order they came

    def wait(self, transfer: Transfer) -> None:
        self._await(transfer, "receiving")

    def drain(self) -> None:
        for transfer in [transfer for transfer in self._open if transfer.source == self._group.rank()]:
            self._await(transfer, "sending")

    def finish(self) -> None:
        self.drain()
        coordination_of(self._group).end()

    def abort(self, error: BaseException) -> None:
        coordination_of(self._group).give_up(self._ticket, error)
        for transfer, letter in self._open.items():
            self._world.forget(self._tag, transfer)
            if letter.complete and letter.failed is None:  # after the copy no thread uses this rank's memory
                with suppress(RuntimeError):
                    self._world.wait(letter, transfer, self._world.timeout)

    def _bring(self, transfer: Transfer, source: Tensor | None, target: Tensor | None) -> None:
        self._open[transfer] = self._world.bring(self._tag, transfer, source, target)

    def _await(self, transfer: Transfer, doing: str) -> None:
        coordination, waited = coordination_of(self._group), 0.0
        while not self._world.wait(self._open[transfer], transfer, PATIENCE_SECONDS):
            waited += PATIENCE_SECONDS
            cause = coordination.suspect(self._ticket)
            if cause is None and waited > self._world.timeout:
                cause = f"the other rank did not post this transfer within {self._world.timeout} s"
            if cause is not None:
                raise failure(self._group.rank(), self._ticket, doing, transfer, cause)
        del self._open[transfer]
        if doing == "receiving":
            self._world.forget(self._tag, transfer)
