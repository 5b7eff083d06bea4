"""Engines: the ways to run a matmul and its collective, and which of them runs a call. Their names stand here alone.

An engine is an :class:`Engine`: whether it can run, who moves its bytes, its two matmuls. To add one, write its two
matmuls in a file of their own, or take those of :mod:`.pipelined` over another transport, and list it in ENGINES.
``engine="auto"`` takes what the cost model (:mod:`.planner`) says; engines without a known profile run where a variable
of the environment asks for them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import MOST
from ..checks import check_chunks
from ..comm import select, symm_mem
from ..environment import flag
from ..layout import SequenceShard
from . import fused_gemm, pipelined, unchunked
from .machine_profile import MachineProfile
from .pipeline import Partials, TransportOf
from .planner import Plan, Work, best_count, chunks_needed, chunks_within, estimate, max_workspace_bytes, pays
from .unchunked import GatherMatmulReady, MatmulScatterReady


class GatherMatmul(Protocol):
    """linear(all_gather(x)) for each weight, and last all rows of x, which are only there for sure if ``keep``."""

    def __call__(
        self,
        group: ProcessGroup,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor | None],
        seq_dim: int,
        seq_len: int,
        chunks: int,
        keep: bool,
    ) -> list[Tensor]: ...


class MatmulScatter(Protocol):
    """The partial results of every rank's linear(x, weight) for our rows; ``name`` is that of the op."""

    def __call__(
        self, name: str, group: ProcessGroup, x: Tensor, weight: Tensor, seq_dim: int, chunks: int
    ) -> Partials: ...


def _never(group: ProcessGroup, x: Tensor, elements: int) -> str:
    """Runs everywhere."""
    return ""


@dataclass(frozen=True, eq=False)
class Engine:
    """One way to run a matmul and its collective."""

    name: str
    chunked: bool  # chunks travel while others are worked on; else all rows travel at once
    transport: TransportOf
    gather_matmul: GatherMatmul
    matmul_scatter: MatmulScatter
    #: Why it cannot run on a group, for x and weights of so many elements; "" where it can.
    unavailable: Callable[[ProcessGroup, Tensor, int], str] = _never
    variable: str = ""  # of the environment: "auto" takes it where it can
    means: str = ""
    #: Its matmuls made ready for operands of the same sizes, where their host time counts.
    gather_matmul_ready: (
        Callable[[ProcessGroup, Tensor, Sequence[Tensor], int, int, bool], GatherMatmulReady] | None
    ) = None
    matmul_scatter_ready: Callable[[str, ProcessGroup, Tensor, Tensor, int], MatmulScatterReady] | None = None

    def ready_gather_matmul(
        self,
        group: ProcessGroup,
        x: Tensor,
        weights: Sequence[Tensor],
        seq_dim: int,
        seq_len: int,
        chunks: int,
        keep: bool,
    ) -> GatherMatmulReady:
        """:attr:`gather_matmul` for operands of these sizes, all rows of x only if ``keep``; holds no group."""
        if self.gather_matmul_ready is not None:
            return self.gather_matmul_ready(group, x, weights, seq_dim, seq_len, keep)
        held = weakref.ref(group)

        def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
            group = held()
            assert group is not None  # the caller passes it
            outs = self.gather_matmul(group, x, list(weights), list(biases), seq_dim, seq_len, chunks, keep)
            return outs if keep else outs[:-1]

        return run

    def ready_matmul_scatter(
        self, name: str, group: ProcessGroup, x: Tensor, weight: Tensor, seq_dim: int, chunks: int
    ) -> MatmulScatterReady:
        """:attr:`matmul_scatter` likewise."""
        if self.matmul_scatter_ready is not None:
            return self.matmul_scatter_ready(name, group, x, weight, seq_dim)
        held = weakref.ref(group)

        def run(x: Tensor, weight: Tensor) -> Partials:
            group = held()
            assert group is not None
            return self.matmul_scatter(name, group, x, weight, seq_dim, chunks)

        return run

    @property
    def everywhere(self) -> bool:
        """Whether it can run on any group, at any time."""
        return self.unavailable is _never


def _pipelined(name: str, transport: TransportOf, **more: Any) -> Engine:
    """Chunks over ``transport`` between ordinary matmuls."""
    gather = functools.partial(pipelined.gather_matmul, name, transport)
    scatter = functools.partial(pipelined.matmul_scatter, name, transport)
    return Engine(name, True, transport, gather, scatter, **more)


def _no_symmetric_memory(group: ProcessGroup, x: Tensor, elements: int) -> str:
    return symm_mem.why_not(group)


#: Everything at once, around one matmul.
SINGLE = Engine(
    "single",
    False,
    select.messages,
    unchunked.gather_matmul,
    unchunked.matmul_scatter,
    gather_matmul_ready=unchunked.ready_gather_matmul,
    matmul_scatter_ready=unchunked.ready_matmul_scatter,
)
#: Pipelined over messages of torch.distributed.
P2P = _pipelined("p2p", select.messages)
#: Pipelined over symmetric memory.
SYMM_MEM = _pipelined(
    "symm_mem",
    select.symmetric_memory,
    unavailable=_no_symmetric_memory,
    variable="SEQPAR_PEER",
    means="symmetric memory",
)
#: One matmul that waits for its rows, or tells of its results, by itself. The backward is pipelined.
FUSED = Engine(
    "fused",
    True,
    fused_gemm.transport_of,
    functools.partial(fused_gemm.gather_matmul, "fused"),
    functools.partial(fused_gemm.matmul_scatter, "fused"),
    unavailable=fused_gemm.why_not,
    variable="SEQPAR_FUSED",
    means="a matmul that waits by itself",
)

ENGINES = (SINGLE, P2P, SYMM_MEM, FUSED)
#: What ``engine=`` takes; old names too.
NAMES = ("auto", *(engine.name for engine in ENGINES))
ALIASES = {"collective": P2P.name, "peer": SYMM_MEM.name}

_by_name = {engine.name: engine for engine in ENGINES}
_by_name |= {old: _by_name[new] for old, new in ALIASES.items()}
_accepted = (*NAMES, *ALIASES)
#: Read once, when the package is imported.
_wanted = tuple(engine for engine in (FUSED, SYMM_MEM) if flag(engine.variable))

#: Without a group.
PLAIN = Plan(SINGLE.name, 1, "one rank: plain matmul, no communication")


def named(name: str) -> Engine:
    """The engine of that name, or of that old name."""
    return _by_name[name]


def check_engine(engine: str) -> None:
    """Raises ValueError for a name that is no engine."""
    if engine not in _accepted:
        raise ValueError(f"engine: expected one of {NAMES}, got {engine!r}")


def plan(engine: str, chunks: int | None, work: Work, profile: MachineProfile) -> Plan:
    """Settle ``engine="auto"`` and ``chunks=None`` on two ranks or more, by the cost model.

    Raises:
        ValueError: the call cannot be cut finely enough for the workspace bound.
    """
    settle = _plan if torch.compiler.is_compiling() else _remembered_plan
    return settle(engine, chunks, work, profile, max_workspace_bytes())


def _plan(engine: str, chunks: int | None, work: Work, profile: MachineProfile, bound: int | None) -> Plan:
    needed = chunks_needed(work, bound)
    bounded = "" if needed is None else f"; max_workspace_bytes={bound} wants {needed} or more"

    def unchunked(reason: str) -> Plan:
        return Plan(SINGLE.name, 1, reason, work.wire_bytes, estimate(None, work, profile))

    def cut(count: int, reason: str) -> Plan:
        if needed is not None:
            count = chunks_within(work, bound, count)
        return Plan(P2P.name, count, reason + bounded, work.wire_bytes, estimate(count, work, profile))

    if engine == SINGLE.name:
        if bounded:
            raise ValueError(f"engine: {engine!r} moves everything at once, expected another with {bounded[2:]} chunks")
        return unchunked("asked for" if chunks in (None, 1) else f"asked for; chunks={chunks} has no effect")
    if chunks is not None:
        return cut(chunks, f"chunks={chunks} given")
    best = cut(best_count(work, profile), "the model's best")
    if engine == "auto" and not bounded and not pays(best.chunks, work, profile):
        return unchunked("below the size floor: cutting saves less than 5 %")
    return best


_remembered_plan = functools.lru_cache(MOST)(_plan)


def rather(special: Engine, settled: Plan, engine: str, obstacle: str) -> Plan:
    """``settled`` by the engine ``special``, where it is pipelined, asked for and nothing stands against it.

    Args:
        special: one that does not run everywhere.
        settled: what :func:`plan` says.
        engine: what the caller asked for.
        obstacle: why ``special`` cannot run; "" where it can.

    Raises:
        RuntimeError: ``special`` was asked for by name and cannot be.
    """
    if engine == special.name and obstacle:
        raise RuntimeError(f"engine: {engine!r} cannot run here: {obstacle}")
    if settled.engine != P2P.name or engine not in ("auto", special.name):
        return settled
    if obstacle:
        means = special.means.removeprefix("a ")
        return settled._replace(reason=f"{settled.reason}; {special.variable} is set, but no {means}: {obstacle}")
    asked = "asked for" if engine == special.name else f"{special.variable} is set"
    return settled._replace(engine=special.name, reason=f"{settled.reason}; by {special.means}: {asked}")


def settle_plan(
    x: Tensor,
    seq_dim: int,
    shard: SequenceShard,
    features: int,
    elements: int,
    engine: str,
    chunks: int | None,
    profiles: Mapping[str, MachineProfile] | None,
    group: ProcessGroup | None,
    *,
    fusible: bool = True,
) -> Plan:
    """``features`` of each row travel; the weights of one rank have ``elements``, alike on all ranks.

    ``fusible=False``: the op has no matmul that could wait by itself.
    """
    check_engine(engine)
    check_chunks(chunks)
    if profiles is None:
        return PLAIN
    engine = ALIASES.get(engine, engine)
    work = Work.of(x, seq_dim, shard, features, elements)
    settled = plan(engine, chunks, work, profiles["cpu" if x.device.type == "cpu" else "cuda"])
    if group is None:
        return settled
    for special in (FUSED, SYMM_MEM):
        if engine == special.name or (engine == "auto" and special in _wanted):
            has_none = special is FUSED and not fusible
            obstacle = "this op has none" if has_none else special.unavailable(group, x, elements)
            settled = rather(special, settled, engine, obstacle)
    return settled
