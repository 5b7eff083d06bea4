"""All-gather -> matmul and matmul -> reduce-scatter in one launch: the kernel itself waits for chunks or signals them.

Schedule (:mod:`.schedule`) and transport are those of the pipelined engines. One kernel replaces the matmuls of all
``Compute`` steps, and its tiles poll one flag for each chunk (:mod:`seqpar_kernels.kernels.triton_gemm`). Posts and
waits go to a second stream. There a flag is raised after each arrival, or a chunk is posted after its flag. The
backward runs the ordinary schedules.

No kernel may wait for one that cannot start. So the matmuls of all virtual ranks of a device share its multiprocessors,
and leave some for copies, packing and polls. On the CPU, under Triton's interpreter, every call returns when it is
done, so that the order of the calls is the order of execution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..comm import select, symm_mem
from ..comm.coordination import coordination_of
from ..comm.loopback import LoopbackGroup
from ..comm.steps import Compute, Post, Step, Transfer, Wait
from ..compiling import constant_when_traced
from ..tensors import reshaped
from . import planner
from . import schedule as schedules
from .pipeline import Call, Partials, Sequence3D, matmul_into, weights_signature
from .profiling import span

if TYPE_CHECKING:
    from ..kernels.triton_gemm import Chunk

# Multiprocessors that the matmul leaves free. Not measured: a copy within a device needs a few, poll and packing one.
_FREE_MULTIPROCESSORS = 8


#: The transport of the chunks: its kernels must not need the multiprocessors that the matmul holds.
transport_of = select.symmetric_memory_or_loopback


class Visits(NamedTuple):
    """The rows of a matmul in the order of a schedule; the flag of a chunk is the index of its transfer."""

    transfers: tuple[Transfer, ...]
    chunks: tuple[Chunk, ...]


def visits(steps: Sequence[Step], outer: int, length: int, inner: int) -> Visits:
    """The visits of ``outer * length * inner`` rows: a chunk has rows in each of ``outer`` blocks, and one flag."""
    from ..kernels.triton_gemm import Chunk

    arrivals = [step.transfer for step in steps if isinstance(step, Wait) and step.transfer.buffer == schedules.SHARD]
    leaving = [t for step in steps if isinstance(step, Post) for t in step.sends if t.buffer == schedules.PARTIAL_SUMS]
    transfers = tuple(arrivals or leaving)
    flags = {(t.rows.start, t.rows.stop): flag for flag, t in enumerate(transfers)}
    chunks = tuple(
        Chunk(
            (i * length + step.start) * inner, (i * length + step.stop) * inner, flags.get((step.start, step.stop), -1)
        )
        for step in steps
        if isinstance(step, Compute) and step.stage == "matmul"
        for i in range(outer)
    )
    return Visits(transfers, chunks)


def gather_matmul(
    engine: str,
    group: ProcessGroup,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    seq_dim: int,
    seq_len: int,
    chunks: int,
    keep: bool,
) -> list[Tensor]:
    """linear(all_gather(x)) for each weight, and last all rows of x, whether ``keep`` is set or not.

    The matmul with the first weight waits for the chunks; the others start when all of them are there.
    """
    from ..kernels import triton_gemm

    details = weights_signature(weights, f"chunks={chunks}", f"engine={engine}")
    call = Call("all_gather_linear", x, seq_dim, seq_len, group, *details)
    mine = call.mine(x)
    outs = [call.empty_whole(w.shape[0], x) for w in weights]
    exchange = call.exchange(x.shape[-1], x, transport_of)
    steps = schedules.gather_matmul(call.shard, chunks)
    length, whole = call.shard.length, call.around(mine)
    transfers, rows = visits(steps, call.layout.outer, length, call.layout.inner)
    with exchange.open(steps), span(call.name, f"a matmul that waits for {len(transfers)} chunks"):
        flags, beside = _Flags(call, len(transfers), mine.data), _Beside(call, mine.data)
        with beside:
            for step in steps:
                if isinstance(step, Post):
                    exchange.post(
                        step,
                        source=lambda t: mine.window(t.rows.start, t.rows.stop),
                        target=lambda t: whole.window(t.rows.start, t.rows.stop),
                    )
            for flag, transfer in enumerate(transfers):
                exchange.wait(transfer)
                flags.up(flag)
        triton_gemm.gather_matmul(
            *(_matrix(whole), _laid_out(weights[0]), _matrix(outs[0]), flags.words, rows, 1, flags.status),
            bias=None if biases[0] is None else biases[0].contiguous(),
            timeout=flags.timeout,
            sm_margin=_margin(call, mine.data),
        )
        beside.join()
        for out, weight, bias in zip(outs[1:], weights[1:], biases[1:], strict=True):
            matmul_into(out.matrices(0, length), whole.matrices(0, length), weight.t(), bias)
    flags.check()
    return [reshaped(out.data, call.shape(seq_len, out.features)) for out in (*outs, whole)]


def matmul_scatter(
    engine: str, name: str, group: ProcessGroup, x: Tensor, weight: Tensor, seq_dim: int, chunks: int
) -> Partials:
    """The partial results of all ranks' linear(x, weight) for this rank's rows."""
    from ..kernels import triton_gemm

    details = weights_signature([weight], f"chunks={chunks}", f"engine={engine}")
    call = Call(name, x, seq_dim, x.shape[seq_dim], group, *details)
    shard, features = call.shard, weight.shape[0]
    whole, partials = call.whole(x), Partials(call, features, x)
    exchange = call.exchange(features, x, transport_of)
    steps = schedules.matmul_scatter(shard, chunks)
    out = call.empty_whole(weight.shape[0], whole.data)
    transfers, rows = visits(steps, call.layout.outer, shard.length, call.layout.inner)
    with exchange.open(steps), span(call.name, f"a matmul that tells of {len(transfers)} chunks"):
        flags, beside = _Flags(call, len(transfers), whole.data), _Beside(call, whole.data)
        triton_gemm.matmul_scatter(
            *(_matrix(whole), _laid_out(weight), _matrix(out), flags.words, rows, 1, flags.counts),
            sm_margin=_margin(call, whole.data),
        )
        number = {transfer: flag for flag, transfer in enumerate(transfers)}
        with beside:
            for step in steps:
                if isinstance(step, Post):
                    for transfer in step.sends:
                        triton_gemm.await_flag(flags.words, number[transfer], 1, flags.status, timeout=flags.timeout)
                    exchange.post(
                        step,
                        source=lambda t: out.window(t.rows.start, t.rows.stop),
                        target=lambda t: partials.window(t.source, t.rows.start, t.rows.stop),
                    )
        partials.window(shard.rank, shard.start, shard.stop).copy_(out.window(shard.start, shard.stop))
        beside.join()
        for step in steps:
            if isinstance(step, Wait):
                exchange.wait(step.transfer)
    flags.check()
    return partials


def why_not(group: ProcessGroup, x: Tensor, elements: int) -> str:
    """Why this engine cannot run for ``x`` and weights of ``elements`` in ``group``; "" where it can."""
    if planner.max_workspace_bytes() is not None:
        return "it holds all rows at once, and max_workspace_bytes is set"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it multiplies bfloat16, float16 and float32, not {x.dtype}"
    if not elements:
        return "the weight is empty"
    return _why_not_on(x.device) or ("" if isinstance(group, LoopbackGroup) else symm_mem.why_not(group))


@constant_when_traced
def _why_not_on(device: torch.device) -> str:
    try:
        from ..kernels import triton_gemm
    except ImportError as error:
        return str(error)
    return triton_gemm.unavailable(device) or ""


class _Flags:
    """The flags of one launch, all low; the epoch of a call is 1."""

    def __init__(self, call: Call, count: int, like: Tensor):
        assert call.group is not None
        words = torch.zeros(3, -(-max(count, 1) // 4) * 4, dtype=torch.int32, device=like.device)
        self.words, self.counts, self.status = words[0], words[1], words[2, :1]
        self.timeout = coordination_of(call.group).timeout.total_seconds()
        self._name = call.name

    def up(self, flag: int) -> None:
        """Raise a flag in the order of the current stream, without a kernel."""
        if self.words.is_cuda:
            from torch._C._distributed_c10d import _SymmetricMemory

            words = self.words.view(torch.uint32)
            if torch.cuda.is_current_stream_capturing():  # graphs have no memory operations, but memsets
                _SymmetricMemory.memset32(words, flag, 1)
            else:
                _SymmetricMemory.stream_write_value32(words, flag, 1)
        else:
            self.words[flag] = 1

    def check(self) -> None:
        """Raise where a flag was not raised in time (on CUDA: when the device runs the check)."""
        torch._assert_async(self.status == 0, f"{self._name}: a chunk did not come in time; its result is incomplete")


class _Beside:
    """A block whose work goes to a second stream, after all earlier work of the computing stream."""

    def __init__(self, call: Call, like: Tensor):
        assert call.group is not None
        self._stream = _stream(call.group.group_name, like.device) if like.is_cuda else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(like.device))
        self._within = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._within.__enter__()

    def __exit__(self, *error: object) -> None:
        self._within.__exit__(*error)

    def join(self) -> None:
        """Make the computing stream wait for this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@functools.lru_cache(256)
def _stream(group_name: str, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _margin(call: Call, like: Tensor) -> int:
    """Multiprocessors that this rank's matmul leaves free: for other ranks on the device, and for moving rows."""
    if not like.is_cuda:
        return 0
    total = torch.cuda.get_device_properties(like.device).multi_processor_count
    sharing = call.shard.ranks if isinstance(call.group, LoopbackGroup) else 1
    return total - max(1, (total - _FREE_MULTIPROCESSORS) // sharing)


def _matrix(sequence: Sequence3D) -> Tensor:
    """[outer * S * inner, features]; a view for tensors that this package has made."""
    rows = sequence.data.reshape(-1, sequence.features)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _laid_out(weight: Tensor) -> Tensor:
    return weight if 1 in weight.stride() else weight.contiguous()
