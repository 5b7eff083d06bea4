"""A matmul kernel that waits for its rows, and one that signals finished rows: each is one launch.

``gather_matmul`` is an all-gather -> matmul: the rows of ``x`` arrive while the kernel runs, and each chunk of rows has
a flag that is raised after it. ``matmul_scatter`` is the first half of a matmul -> reduce-scatter: it raises the flag
of each finished chunk of ``out``, so that the chunk can be sent. Chunks are visited in the given order, that of a
schedule;
:mod:`seqpar_kernels.overlap.fused_gemm` connects both to a transport. Several weights are several launches, and only
the first waits. It is better to pass weights that share rows as one weight: all its columns then fill the time until a
chunk arrives.

**Flags** are int32 and never reset: a flag is up when it has reached the call's *epoch*, a number that grows by one
from call to call. It may be a tensor, for CUDA graphs: the graph then begins with ``epoch.add_(1)`` and raises flags by
copying that tensor into them. Comparisons wrap around, as those of ``cuStreamWaitValue32(..., GEQ)`` do.

**Raising a flag must not need resources that the waiting kernel occupies**, or neither ends before the time-out:

- Copy engines and stream memory operations (``cuStreamWriteValue32``, ``symm_mem``'s ``stream_write_value32``) need no
  multiprocessor. The write goes behind the copy in the same stream, which orders them for a reader on any device.
- A kernel that copies or raises (``fill_``, NCCL) needs free multiprocessors: ``sm_margin``, and to have been launched
  once before, since the first launch may load code, which waits for the device to be idle.
- Either is enqueued before this kernel, on another stream. Behind it in the same stream it never begins; where
  ``CUDA_DEVICE_MAX_CONNECTIONS=1`` makes streams share one queue, neither does it behind it in another.

A waiting block of this kernel never keeps another from running: each block works through its own tiles in order and
depends on no other block. When a flag is not raised in time, a status word names it, and the rows that depend on it are
not written.

Sources: Wang et al. 2023 (ASPLOS) for the decomposition; Chang et al. 2024 (arXiv 2406.06858, Flux) and Zheng et al.
2025 (arXiv 2504.19442, Triton-distributed) for tiles that wait and signal inside one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_gemm_kernel
from .triton_config import LAUNCH
from .triton_gemm_config import gemm_tile
from .triton_gemm_kernel import await_kernel
from .triton_interpreter import as_on_a_gpu, interpreted

_INTERPRETED = interpreted(triton_gemm_kernel.gemm_kernel)
gemm_kernel = as_on_a_gpu(triton_gemm_kernel.gemm_kernel)
_INTERPRETED_MULTIPROCESSORS = 2
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: A poll takes about a microsecond, a round trip to the L2 cache.
_POLLS_PER_SECOND = 1_000_000


class Chunk(NamedTuple):
    """Rows ``start..stop`` and the index of their flag; -1 for rows without a flag."""

    start: int
    stop: int
    flag: int = -1


def rotated(shards: Sequence[Sequence[int]], rank: int, *, own_first: bool) -> tuple[Chunk, ...]:
    """The chunks in the order in which ``rank`` visits them: the peers' from ``rank + 1`` on, its own first or last.

    Args:
        shards: rows of each chunk of each rank's shard, in memory order: ``[[512, 512], [512, 511]]``. Flags are
            numbered in that order; the own shard is one chunk without a flag.
    """
    chunks: list[list[Chunk]] = []
    row = flag = 0
    for rank_of_shard, sizes in enumerate(shards):
        if rank_of_shard == rank:
            chunks.append([Chunk(row, row + sum(sizes))])
        else:
            starts = [row + sum(sizes[:i]) for i in range(len(sizes))]
            chunks.append([Chunk(s, s + n, flag + i) for i, (s, n) in enumerate(zip(starts, sizes, strict=True))])
        row += sum(sizes)
        flag += len(sizes)
    peers = [chunk for k in range(1, len(shards)) for chunk in chunks[(rank + k) % len(shards)]]
    return (*chunks[rank], *peers) if own_first else (*peers, *chunks[rank])


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot run on ``device``; None when it can."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the Triton matmul is for NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        return "the Triton matmul needs compute capability 8.0 or newer"
    if device.type == "cpu":
        return None if _INTERPRETED else "Triton runs on the CPU only where TRITON_INTERPRET=1 was set before import"
    return f"there is a Triton matmul for cuda, not for {device.type}"


def matmul(
    x: Tensor, weight: Tensor, out: Tensor | None = None, *, bias: Tensor | None = None, sm_margin: int = 0
) -> Tensor:
    """``x @ weight.T + bias`` without waiting. Arguments as in :func:`gather_matmul`."""
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    return _launch("matmul", x, weight, out, (Chunk(0, x.shape[0]),), None, 0, bias, sm_margin)


def gather_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    flags: Tensor,
    chunks: tuple[Chunk, ...],
    epoch: int | Tensor,
    status: Tensor,
    *,
    bias: Tensor | None = None,
    timeout: float = 60.0,
    sm_margin: int = 0,
) -> Tensor:
    """``out = x @ weight.T + bias`` while the rows of ``x`` arrive, accumulated in fp32 and rounded once.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32; rows contiguous, any distance apart. Rows of a chunk are read when
            its flag has reached ``epoch``, not before.
        weight: ``[N, K]`` in the dtype of ``x``, one of its dimensions contiguous: a ``[K, N]`` is passed as ``.t()``.
        out: ``[M, N]``, rows contiguous; any of the dtypes.
        flags: int32, one element a flag, in memory of this device; raised by the code that fills ``x``. Pass
            ``flags.view(torch.uint32)`` to functions that need uint32, as ``stream_write_value32`` does.
        chunks: every row once, in the order of the visit.
        epoch: the value of a raised flag. A number, or an int32 tensor of one element that the kernel reads.
        status: int32, one element, zero: becomes the number of the flag that was not raised in time plus 1. See
            :func:`check_status`.
        bias: ``[N]``, contiguous, any of the dtypes.
        timeout: seconds to wait for one flag, roughly: they are counted in polls.
        sm_margin: multiprocessors left free for kernels that run beside this one.

    float32 is multiplied in fp32, or as TF32 where ``torch.backends.cuda.matmul`` allows it.

    Raises:
        ValueError: an argument that does not fit this description.
        RuntimeError: the kernel cannot run on the device of ``x``, with the reason.
    """
    _check_words("gather_matmul", x, flags=flags, status=status)
    polls = _polls("gather_matmul", timeout)
    return _launch("gather_matmul", x, weight, out, chunks, flags, epoch, bias, sm_margin, status=status, polls=polls)


def matmul_scatter(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    flags: Tensor,
    chunks: tuple[Chunk, ...],
    epoch: int | Tensor,
    counts: Tensor,
    *,
    bias: Tensor | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """``out = x @ weight.T + bias``; the flag of a chunk is set to ``epoch`` when all of its rows are stored.

    Args:
        flags: int32; set for readers on any device, after whatever they guard. Several chunks may share a flag, which
            is set after the last of them. That of an empty chunk is left alone.
        counts: int32, one element a flag, zero before the call and after it. Calls that may run at the same time have
            their own.

    The other arguments, and what is raised, as in :func:`gather_matmul`.
    """
    _check_words("matmul_scatter", x, flags=flags, counts=counts)
    if counts.numel() < flags.numel():
        raise ValueError(
            f"matmul_scatter: counts: expected an element for each of the {flags.numel()} flags, got {counts.numel()}"
        )
    return _launch("matmul_scatter", x, weight, out, chunks, flags, epoch, bias, sm_margin, counts=counts)


def await_flag(flags: Tensor, flag: int, epoch: int, status: Tensor, *, timeout: float = 60.0) -> None:
    """Make the current stream wait until ``flags[flag]`` has reached ``epoch``: one warp polls.

    ``status`` and ``timeout`` as in :func:`gather_matmul`.
    """
    _check_words("await_flag", flags, flags=flags, status=status)
    with torch.cuda.device_of(flags):
        await_kernel[(1,)](flags, status, flag, epoch, _polls("await_flag", timeout), num_warps=1, **LAUNCH)


def check_status(status: Tensor, op: str = "gather_matmul") -> None:
    """Synchronize with the device, and check ``status``.

    Raises:
        RuntimeError: a flag was not raised in time.
    """
    flag = int(status.item()) - 1
    if flag >= 0:
        raise RuntimeError(f"{op}: the rows behind flag {flag} did not arrive in time; its result is incomplete")


def _polls(op: str, timeout: float) -> int:
    if timeout <= 0:
        raise ValueError(f"{op}: timeout: expected more than 0 seconds, got {timeout}")
    return max(1, min(int(timeout * _POLLS_PER_SECOND), 2**31 - 1))


@cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors."""
    if device.type != "cuda":
        return (9, 0), _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=256)
def _visits(chunks: tuple[Chunk, ...], rows: int, height: int, device: torch.device) -> tuple[Tensor, int]:
    """``p_chunks`` of the kernel, for the chunks that have rows, and the strips of all.

    Cached, so that a call that was made before may be captured in a graph.
    """
    strips_of: dict[int, int] = {}
    for start, stop, flag in chunks:
        strips_of[flag] = strips_of.get(flag, 0) + -(-(stop - start) // height)
    covered = 0
    for start, stop, _ in sorted(chunks):
        if start != covered or stop < start:
            raise ValueError(f"chunks: expected every row of x once, got rows {start}..{stop} after row {covered}")
        covered = stop
    if covered != rows:
        raise ValueError(f"chunks: expected all {rows} rows of x, got {covered}")
    table = [(*chunk, strips_of[chunk.flag]) for chunk in chunks if chunk.stop > chunk.start]
    return torch.tensor(table, dtype=torch.int32, device=device), sum(strips_of.values())


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _aligned(t: Tensor) -> bool:
    """Whether every row of a matrix begins at a multiple of 16 bytes, after the row before it, as TMA needs."""
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(0) >= t.shape[1]


def _launch(
    op: str,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    chunks: tuple[Chunk, ...],
    flags: Tensor | None,
    epoch: int | Tensor,
    bias: Tensor | None,
    sm_margin: int,
    *,
    status: Tensor | None = None,
    counts: Tensor | None = None,
    polls: int = 0,
) -> Tensor:
    _check_matrices(op, x, weight, out, bias)
    (m, k), n = x.shape, weight.shape[0]
    capability, multiprocessors = _device(x.device)
    if not 0 <= sm_margin < multiprocessors:
        raise ValueError(f"{op}: sm_margin: expected 0 to {multiprocessors - 1} multiprocessors, got {sm_margin}")
    if flags is not None and not all(-1 <= chunk.flag < flags.numel() for chunk in chunks):
        raise ValueError(f"{op}: chunks: expected flags from -1 to {flags.numel() - 1}, got {[c.flag for c in chunks]}")
    p_epoch = None
    if isinstance(epoch, Tensor):
        _check_words(op, x, epoch=epoch)
        p_epoch, epoch = epoch, 0
    tf32 = _tf32(x.dtype)
    transposed = weight.stride(1) != 1
    stored = weight.t() if transposed else weight
    aligned = _aligned(x) and _aligned(stored)
    tile = gemm_tile(m, n, x.dtype, tf32, aligned, capability, multiprocessors - sm_margin)
    table, strips = _visits(chunks, m, tile.rows, x.device)
    if not strips:
        return out
    x_in, weight_in = x, weight
    if tile.tma:
        block = (tile.depth, tile.cols) if transposed else (tile.cols, tile.depth)
        x_in = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
        weight_in = TensorDescriptor.from_tensor(stored, list(block))
    programs = min(strips * -(-n // tile.cols), (multiprocessors - sm_margin) * tile.programs)
    with torch.cuda.device_of(x):
        gemm_kernel[(programs,)](
            x_in, weight_in, bias, out, table, flags, counts, p_epoch, status,
            epoch, polls, table.shape[0], n, k, x.stride(0), weight.stride(0), weight.stride(1), out.stride(0),
            tile.tma, tile.tma and not _INTERPRETED, k % tile.depth == 0, transposed, "tf32" if tf32 else "ieee",
            tile.tma, tile.rows, tile.cols, tile.depth, tile.group,
            num_warps=tile.warps, num_stages=tile.stages, **LAUNCH,
        )  # fmt: skip
    return out


def _check_matrices(op: str, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
    reason = unavailable(x.device)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight: expected [N, K] for x [M, K], N and K at least 1, got {tuple(weight.shape)} for "
            f"{tuple(x.shape)}"
        )
    if out.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(f"{op}: out: expected {(x.shape[0], weight.shape[0])}, got {tuple(out.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, t in (("x", x), ("weight", weight), ("out", out), ("bias", bias)):
        if t is None:
            continue
        if t.dtype not in _DTYPES or (name == "weight" and t.dtype != x.dtype):
            expected = "bfloat16, float16 or float32" if name != "weight" else f"{x.dtype} as x"
            raise ValueError(f"{op}: {name}: expected {expected}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name}: expected a tensor on {x.device} as x, got one on {t.device}")
        if t.stride(-1) != 1 and not (name == "weight" and t.stride(0) == 1):
            expected = "contiguous rows" if name != "weight" else "one contiguous dimension"
            raise ValueError(f"{op}: {name}: expected {expected}, got strides {t.stride()}")


def _check_words(op: str, x: Tensor, **words: Tensor) -> None:
    for name, t in words.items():
        if t.dtype != torch.int32 or t.device != x.device or not t.is_contiguous() or not t.numel():
            raise ValueError(
                f"{op}: {name}: expected contiguous int32 elements on {x.device}, got {tuple(t.shape)} of {t.dtype} "
                f"on {t.device}"
            )
