"""Into how many chunks a call is cut: what the cost model foresees, and the bound of the workspace.

The choice between one matmul and a pipelined one is that of a small cost model. With m the seconds of the whole matmul
and w those of the wire, an unpipelined call takes m + w. A pipelined one takes whichever is longer: w plus the
smallest piece of the matmul (the first that leaves, or the last to arrive); or m plus what the own rows, a t-th of the
matmul, leave of the largest piece's travel (the first to arrive, or the last that leaves). Each piece costs a message
and a matmul call that reads the weight again; where the processor that multiplies also moves the bytes (gloo), that
adds to m. Where cutting does not pay, nothing is cut: that is the size floor.

All that enters is alike on all ranks: sizes are those of the largest shard, figures those that the group has agreed on
(:mod:`.tuning`), so all come to the same plan.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm.transport import in_blocks
from ..environment import positive_int
from ..layout import SequenceShard
from .machine_profile import Figures
from .schedule import chunk_weights

_MAX_CHUNKS = 16
# Matmuls of fewer rows than this in the mean cost more, and err more, than the rates of larger ones tell.
_LEAST_ROWS = 64
# Cut only where the model promises this much: what it leaves out must not make a small call slower than uncut.
_WORTH_CUTTING = 0.95
# Message buffers alive at once with one post in flight: one leaving, one being computed; a message of several small
# blocks of memory is packed at both ends, and a backward moves two kinds.
_STAGED, _STAGED_PACKED = 2, 5


class Work(NamedTuple):
    """What one call computes and sends, alike on every rank."""

    ranks: int
    rows: int  # of the sequence in the largest shard: what can be cut
    flops: int  # of one rank's whole matmul
    weight_bytes: int
    shard_bytes: int  # of the largest shard of what travels
    dtype: torch.dtype
    outer: int  # blocks of memory in a message

    @staticmethod
    def of(x: Tensor, seq_dim: int, shard: SequenceShard, features: int, elements: int) -> Work:
        """``features`` of each row travel, rows as those of x; one rank's weights have ``elements``."""
        shape, itemsize = x.shape, x.dtype.itemsize
        outer, inner = math.prod(shape[:seq_dim]), math.prod(shape[seq_dim + 1 : -1])
        rows = -(-shard.length // shard.ranks)
        return Work(
            ranks=shard.ranks,
            rows=rows,
            flops=2 * outer * shard.length * inner * elements,
            weight_bytes=elements * itemsize,
            shard_bytes=outer * rows * inner * features * itemsize,
            dtype=x.dtype,
            outer=outer,
        )

    @property
    def matrix_rows(self) -> int:
        """What the matmul has of them in the largest shard."""
        elements = self.weight_bytes // self.dtype.itemsize
        return self.flops // (2 * max(1, elements) * self.ranks)

    @property
    def wire_bytes(self) -> int:
        """What one rank sends, and as much receives."""
        return (self.ranks - 1) * self.shard_bytes

    def packed(self, chunks: int) -> bool:
        """Whether any message of so many chunks is copied into one block of memory, and out of it again."""
        block_row = self.shard_bytes // max(1, self.rows * self.outer)
        return self.outer > 1 and not in_blocks(self.outer, (self.rows - 1) // chunks * block_row)


class Estimate(NamedTuple):
    """The model's seconds for one forward."""

    matmul: float
    wire: float
    total: float

    @property
    def hidden(self) -> float:
        """The part of the shorter of matmul and wire that runs beside the longer one."""
        shorter = min(self.matmul, self.wire)
        return max(0.0, min(1.0, (self.matmul + self.wire - self.total) / shorter)) if shorter else 0.0

    def __str__(self) -> str:
        times = (f"{1e3 * seconds:.3g}" for seconds in (self.matmul, self.wire, self.total))
        return "matmul {}, wire {}, together {} ms, {:.0%} hidden".format(*times, self.hidden)


class Plan(NamedTuple):
    """What will run and why. ``chunks`` is per shard: a group of t ranks works on t * chunks pieces."""

    engine: str
    chunks: int
    reason: str
    wire_bytes: int = 0  # sent by one rank in one forward
    estimate: Estimate | None = None


def estimate(chunks: int | None, work: Work, figures: Figures) -> Estimate:
    """The cost model; ``chunks=None`` is the unpipelined call."""
    peers = work.ranks - 1
    matmul = work.flops / figures.flops(work.dtype) + figures.call_seconds
    wire = work.wire_bytes / figures.link_bytes + peers * figures.message_seconds
    if chunks is None:
        return Estimate(matmul, wire, matmul + wire)
    pieces = peers * chunks
    call = figures.call_seconds + work.weight_bytes / figures.memory_bytes
    busy = matmul + pieces * (call + figures.message_seconds) + work.wire_bytes * figures.busy_seconds
    travelling = work.wire_bytes / figures.link_bytes + pieces * figures.message_seconds
    smallest, largest = _extremes(chunks, work.ranks)
    own, first = matmul / work.ranks, travelling / peers * largest
    return Estimate(matmul, wire, max(busy + max(0.0, first - own), travelling + own * smallest + call))


def spreads_weight_gradient(chunks: int, work: Work, figures: Figures, dgrad: bool) -> bool:
    """Whether a row-parallel backward is sooner done when the weight's gradient is summed up chunk by chunk.

    Once, when the last chunk is in, it costs least; but where the wire takes longer than dgrad, the time until then is
    free. A chunk more reads and writes the gradient once more.
    """
    pieces = (work.ranks - 1) * chunks
    matmul = work.flops / figures.flops(work.dtype)
    busy = work.wire_bytes * figures.busy_seconds + pieces * figures.message_seconds
    travelling = work.wire_bytes / figures.link_bytes + pieces * figures.message_seconds
    last = matmul / work.ranks * _extremes(chunks, work.ranks).smallest
    again = pieces * (figures.call_seconds + 2 * work.weight_bytes / figures.memory_bytes)
    once = max(dgrad * (matmul + last) + busy, travelling + dgrad * last) + matmul
    spread = max((dgrad + 1) * (matmul + last) + busy + again, travelling + (dgrad + 1) * last)
    return spread < _WORTH_CUTTING * once


class _Extremes(NamedTuple):
    """Parts of a shard."""

    smallest: float
    largest: float


def _extremes(chunks: int, ranks: int) -> _Extremes:
    """Of a gather: on two ranks its chunks are tapered, else all alike. A scatter's are taken to be the same."""
    weights = chunk_weights(chunks, "rising" if ranks == 2 else "none")
    return _Extremes(min(weights) / sum(weights), max(weights) / sum(weights))


def pays(chunks: int, work: Work, figures: Figures) -> bool:
    """Whether cutting into so many chunks is worth while."""
    return estimate(chunks, work, figures).total <= _WORTH_CUTTING * estimate(None, work, figures).total


def best_count(work: Work, figures: Figures) -> int:
    """Doubled as long as the model gains by it.

    With pieces all alike that ends at the best count. On two ranks, where they are tapered, a later one may be some
    percent better; to look for it would have a compiled function made anew for lengths that come to the same plan.
    """
    most = min(work.rows, _MAX_CHUNKS, work.matrix_rows // _LEAST_ROWS)
    count, total = 1, estimate(1, work, figures).total
    while 2 * count <= most:
        finer = estimate(2 * count, work, figures).total
        if finer >= total:
            break
        count, total = 2 * count, finer
    return count


# --- the workspace bound ---------------------------------------------------------------------------------------------

_ENVIRONMENT = "SEQPAR_MAX_WORKSPACE_BYTES"
_bound: int | None = None


def set_max_workspace_bytes(limit: int | None) -> None:
    """From now on, bound the staging buffers of each all_gather_linear and linear_reduce_scatter, forward and backward.

    Staging is what holds messages and nothing else: chunks on their way in before they are multiplied, partial sums on
    their way out, messages packed of several small blocks of memory. It lowers the chunk size, and chunks wait
    for buffers of earlier ones. Not counted: results, the partial sums of this rank's own rows, and in a backward the
    gathered operand of the weight gradient. Initially that of the variable SEQPAR_MAX_WORKSPACE_BYTES, else no bound.

    Args:
        limit: bytes on each rank, alike on all ranks of a group; None takes the bound away.

    Raises:
        ValueError: not a positive int or None. A call whose smallest chunk, one row of the sequence, does not fit
            raises one too.

    Examples:
        >>> import seqpar_kernels as sp
        >>> sp.set_max_workspace_bytes(64 * 2**20)
        >>> sp.set_max_workspace_bytes(None)
    """
    global _bound
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit: expected a positive int or None, got {limit!r}")
    _bound = limit


def max_workspace_bytes() -> int | None:
    """The bound that :func:`set_max_workspace_bytes` has set."""
    return _bound


def window(message_bytes: int, packed: bool) -> int | None:
    """How many posts may be under way at once within the bound; None: any number."""
    if _bound is None or message_bytes == 0:
        return None
    per_post = _STAGED_PACKED - 1 if packed else _STAGED - 1
    return max(1, (_bound // message_bytes - 1) // per_post)


def chunks_needed(work: Work, bound: int | None) -> int | None:
    """The least number of chunks that stay within the bound; None where uncut does."""
    if bound is None or bound >= work.ranks * work.shard_bytes * (3 if work.packed(1) else 1):
        return None
    return chunks_within(work, bound, 1)


def chunks_within(work: Work, bound: int | None, count: int) -> int:
    """The least number of chunks, ``count`` or more, whose messages stay within the bound, one post under way."""
    if bound is None or not work.shard_bytes:
        return count
    count = max(count, _chunks_of(bound, work, _STAGED))
    return max(count, _chunks_of(bound, work, _STAGED_PACKED)) if work.packed(count) else count


def _chunks_of(bound: int, work: Work, alive: int) -> int:
    """The least number of chunks of which ``alive`` stay within the bound."""
    row_bytes = work.shard_bytes // work.rows
    rows = bound // (alive * row_bytes)
    if rows < 1:
        raise ValueError(
            f"max_workspace_bytes: expected at least {alive * row_bytes}, room for {alive} messages of one row of the "
            f"sequence, got {bound}"
        )
    return -(-work.rows // rows)


def _initial_bound() -> None:
    set_max_workspace_bytes(positive_int(_ENVIRONMENT, "bytes"))


_initial_bound()
