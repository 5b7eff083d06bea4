"""The machine profile of a group: measured by :func:`tune` and saved on disk, or else the default.

All ranks use the profile of rank 0, since ranks with different profiles would cut a call differently. The first op on a
group reads it from the group's store; later ops look it up in this process.
"""

from __future__ import annotations

import json
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import Remembered, per_group
from ..comm.coordination import coordination_of
from ..comm.topology import on_one_host
from ..compiling import constant_when_traced
from ..layout import Group, process_group, resolve_group
from .machine_profile import MachineProfile, default_profile
from .machine_profile_cache import Place, load, save

_known: weakref.WeakKeyDictionary[ProcessGroup, dict[str, MachineProfile]] = weakref.WeakKeyDictionary()

_ROUNDS = 9
# A matmul and a message are measured whole and in pieces: the whole gives the rate, the difference the overhead of a
# piece. Weights have the size of a layer's, so that few caches hold them from one piece to the next.
_MESSAGE_BYTES = 2**18
_PIECES = 16
_ROWS_AND_WIDTH = {"cpu": (512, 2048), "cuda": (1024, 8192)}
_PIECE_ROWS = 64


@per_group
def planned_calls(group: ProcessGroup) -> Remembered[tuple[Any, ...], Any]:
    """Calls on ``group`` that have been planned with its profile, for who looks them up; forgotten when they change."""
    return Remembered()


def profile_of(group: ProcessGroup) -> Mapping[str, MachineProfile]:
    """The profile that the ranks of ``group`` plan with, by device type.

    Raises:
        RuntimeError: rank 0 has not published its profile within the time-out.
    """
    if torch.compiler.is_compiling():
        cpu, cuda = _profile_named(group.group_name)
        return {"cpu": MachineProfile(*cpu), "cuda": MachineProfile(*cuda)}
    found = _known.get(group)
    return _agree(group) if found is None else found


@constant_when_traced
def _profile_named(name: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    group = process_group(name)
    profile = _known.get(group) or _agree(group)
    return tuple(profile["cpu"]), tuple(profile["cuda"])


def _agree(group: ProcessGroup) -> dict[str, MachineProfile]:
    own = None
    if group.rank() == 0:
        own = json.dumps({device: _local(group, device).to_json() for device in ("cpu", "cuda")})
    shared = json.loads(coordination_of(group).share("profile", own))
    found = _known[group] = {device: MachineProfile.from_json(text) for device, text in shared.items()}
    return found


def _local(group: ProcessGroup, device_type: str) -> MachineProfile:
    """The tuned profile of this machine, or the defaults with the reason why."""
    place = _place(group, device_type)
    profile, reason = load(place)
    if profile is not None:
        return profile
    defaults = default_profile(device_type, place.one_host)
    where = {True: "on one host", False: "on several hosts", None: "maybe on several hosts"}[place.one_host]
    return defaults._replace(source=f"{defaults.source} ({reason}; ranks {where})")


def _place(group: ProcessGroup, device_type: str) -> Place:
    return Place.here(device_type, _backend(group, device_type), group.size(), on_one_host(group))


def _backend(group: ProcessGroup, device_type: str) -> str:
    types = [device.type for device in group._device_types]
    return group._get_backend(torch.device(device_type)).name() if device_type in types else "none"


def tune(group: Group = None, *, device: str | torch.device | None = None) -> MachineProfile:
    """Measure matmul and links of ``group``, plan with the result from now on, and save it on disk for later runs.

    All ranks must call it, with nothing else running on the machine; it takes some seconds. The slowest rank counts.
    The file is in ``$XDG_CACHE_HOME/seqpar_kernels`` (without the variable in ``~/.cache/seqpar_kernels``). It is valid
    for this machine, device, backend, number of ranks, number of threads and torch version, and for groups whose ranks
    are as well known to share a host.

    Args:
        group: ProcessGroup or 1-D DeviceMesh; None: all ranks.
        device: "cpu" or "cuda"; None: "cuda" for an NCCL group, else "cpu".

    Returns:
        MachineProfile: the same on every rank; ``source`` names the file.

    Raises:
        RuntimeError: torch.distributed has not been initialised.
        ValueError: a group of one rank, or a device that the group cannot reach.

    Examples:
        On every rank, under ``torchrun --nproc-per-node 2``:

        >>> import seqpar_kernels as sp
        >>> profile = sp.tune(device="cpu")
        >>> profile.link_bytes > 0 and profile.source.startswith("measured on")
        True
    """
    if group is None and not dist.is_initialized():
        raise RuntimeError("tune: torch.distributed has not been initialised; start it under torchrun")
    pg = resolve_group(dist.group.WORLD if group is None else group)
    if pg is None:
        raise ValueError("group: expected at least two ranks, one rank has no link to measure")
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    types = [kind for kind in here if kind in [d.type for d in pg._device_types]]
    usual = "cuda" if "cuda" in types and _backend(pg, "cuda") == "nccl" else "cpu"
    kind = usual if device is None else torch.device(device).type
    if kind not in types:
        raise ValueError(f"device: expected one of {types}, which the group's backends move, got {kind!r}")
    profile_of(pg)
    measured = _measure(pg, kind)
    place = _place(pg, kind)
    answer: list[str | None] = [None]
    if pg.rank() == 0:
        measured = measured._replace(source=f"measured on {place.machine}, {time.strftime('%Y-%m-%d')}")
        kept = save(place, measured)
        answer[0] = measured._replace(source=f"{measured.source}; {kept}").to_json()
    dist.broadcast_object_list(answer, group_src=0, group=pg)
    assert answer[0] is not None
    profile = _known[pg][kind] = MachineProfile.from_json(answer[0])
    planned_calls(pg).clear()
    return profile


def _measure(group: ProcessGroup, kind: str) -> MachineProfile:
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    clock = _Clock(group, device)
    tiny = torch.zeros(16, 16, device=device)
    call = clock(lambda: [torch.mm(tiny, tiny, out=tiny) for _ in range(100)]) / 100
    rows, width = _ROWS_AND_WIDTH[kind]
    rates: dict[torch.dtype, float] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # Random numbers: GPUs multiply zeros faster.
        own = torch.Generator(device).manual_seed(0)
        x, weight, out = (
            torch.randn(length, width, device=device, generator=own).to(dtype) for length in (rows, width, rows)
        )

        def multiply(piece: int, x: Tensor = x, weight: Tensor = weight, out: Tensor = out) -> None:
            for x_rows, out_rows in zip(x.split(piece), out.split(piece), strict=True):
                torch.mm(x_rows, weight.t(), out=out_rows)

        whole = clock(lambda: multiply(rows))
        rates[dtype] = 2 * rows * width * width / whole
        if dtype == torch.float32:
            again = (clock(lambda: multiply(_PIECE_ROWS)) - whole) / (rows // _PIECE_ROWS - 1)
            memory = weight.nbytes / max(again - call, 1e-7)
    large, small = _Ring(group, device, _PIECES * _MESSAGE_BYTES), _Ring(group, device, _PIECES * 64)
    whole = clock(lambda: large.move(1))
    busy = large.processor_seconds() if kind == "cpu" else 0.0
    message = max(clock(lambda: small.move(_PIECES)) / _PIECES, 1e-7)
    link = large.nbytes / max(whole - message, 1e-7)
    return MachineProfile(
        flops_64=rates[torch.float64],
        flops_32=rates[torch.float32],
        flops_16=rates[torch.bfloat16],
        memory_bytes=memory,
        call_seconds=call,
        link_bytes=link,
        message_seconds=message,
        busy_seconds=busy / large.nbytes / torch.get_num_threads(),
        source="",
    )


class _Clock:
    """Seconds of a call on the slowest rank: the largest median of rounds that all ranks start together."""

    def __init__(self, group: ProcessGroup, device: torch.device):
        self._group, self._device = group, device

    def __call__(self, work: Callable[[], object]) -> float:
        work()
        seconds = []
        for _ in range(_ROUNDS):
            dist.barrier(self._group)
            self._synchronize()
            start = time.perf_counter()
            work()
            self._synchronize()
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, self._group)
        return slowest.item()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


class _Ring:
    """Every rank sends ``nbytes`` to the next rank; both directions of every link are busy."""

    def __init__(self, group: ProcessGroup, device: torch.device, nbytes: int):
        self.nbytes = nbytes
        self._group = group
        self._right, self._left = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()
        self._out, self._into = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))

    def move(self, pieces: int) -> None:
        works = []
        for out, into in zip(self._out.chunk(pieces), self._into.chunk(pieces), strict=True):
            ops = [dist.P2POp(dist.irecv, into, None, self._group, 0, self._left)]
            ops += [dist.P2POp(dist.isend, out, None, self._group, 0, self._right)]
            works += dist.batch_isend_irecv(ops)
        for work in works:
            work.wait()

    def processor_seconds(self) -> float:
        """CPU time of all threads of this process for one move: the time that a matmul beside it loses."""
        start = time.process_time()
        for _ in range(_ROUNDS):
            self.move(1)
        return (time.process_time() - start) / _ROUNDS
