"""The number of chunks of a call, from a cost model and the workspace bound.

The cost model chooses between one matmul and a pipelined one. Let m be the seconds of the whole matmul and w those of
the wire. An unchunked call takes m + w. A pipelined one takes the longer of two times. One is w plus the smallest piece
of the matmul, which no transfer hides (the first piece that is sent, or the last that arrives). The other is m plus the
part of the largest piece's transfer that the matmul of the own rows, m / t, does not hide (the first piece that
arrives, or the last that is sent). Each piece costs a message and a matmul call that reads the weight again. Where the
processor that multiplies also moves the bytes (gloo), moving adds to m. A call is not cut where cutting does not pay:
this is the size floor.

All inputs are the same on all ranks: the sizes of the largest shard, and the profile that the group has agreed on
(:mod:`.tuning`). So all ranks make the same plan.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm.transport import in_blocks
from ..environment import positive_int
from ..layout import SequenceShard
from .machine_profile import MachineProfile
from .schedule import chunk_weights

_MAX_CHUNKS = 16
# The fewest rows of a piece on average: matmuls with fewer rows cost more, and err more, than the rates predict.
_LEAST_ROWS = 64
# Cut only where the model predicts less than this part of the unchunked time: the model leaves out some costs.
_WORTH_CUTTING = 0.95
# Message buffers alive at one time with one post in flight: one is sent, one is computed. A message of several small
# blocks of memory is packed at both ends, and a backward moves two kinds of messages.
_STAGED, _STAGED_PACKED = 2, 5


class Work(NamedTuple):
    """The sizes of one call, the same on every rank."""

    ranks: int
    rows: int  # rows of the sequence in the largest shard, which chunks divide
    flops: int  # of one rank's whole matmul
    weight_bytes: int
    shard_bytes: int  # of the largest shard that is sent
    dtype: torch.dtype
    outer: int  # blocks of memory in a message

    @staticmethod
    def of(x: Tensor, seq_dim: int, shard: SequenceShard, features: int, elements: int) -> Work:
        """The sizes of a call that sends ``features`` of each row of x; one rank's weights have ``elements``."""
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
        """The rows of the matmul for the largest shard."""
        elements = self.weight_bytes // self.dtype.itemsize
        return self.flops // (2 * max(1, elements) * self.ranks)

    @property
    def wire_bytes(self) -> int:
        """Bytes that one rank sends; it receives as many."""
        return (self.ranks - 1) * self.shard_bytes

    def packed(self, chunks: int) -> bool:
        """Whether a message of so many chunks is packed into one block of memory, and unpacked from it."""
        block_row = self.shard_bytes // max(1, self.rows * self.outer)
        return self.outer > 1 and not in_blocks(self.outer, (self.rows - 1) // chunks * block_row)


class Estimate(NamedTuple):
    """The model's seconds for one forward."""

    matmul: float
    wire: float
    total: float

    @property
    def hidden(self) -> float:
        """The fraction of the shorter of matmul and wire that runs beside the longer one."""
        shorter = min(self.matmul, self.wire)
        return max(0.0, min(1.0, (self.matmul + self.wire - self.total) / shorter)) if shorter else 0.0

    def __str__(self) -> str:
        times = (f"{1e3 * seconds:.3g}" for seconds in (self.matmul, self.wire, self.total))
        return "matmul {}, wire {}, together {} ms, {:.0%} hidden".format(*times, self.hidden)


class Plan(NamedTuple):
    """How a call runs, and why. ``chunks`` is per shard: a group of t ranks works on t * chunks pieces."""

    engine: str
    chunks: int
    reason: str
    wire_bytes: int = 0  # sent by one rank in one forward
    estimate: Estimate | None = None


def estimate(chunks: int | None, work: Work, profile: MachineProfile) -> Estimate:
    """The cost model; ``chunks=None`` is the unchunked call."""
    peers = work.ranks - 1
    matmul = work.flops / profile.flops(work.dtype) + profile.call_seconds
    wire = work.wire_bytes / profile.link_bytes + peers * profile.message_seconds
    if chunks is None:
        return Estimate(matmul, wire, matmul + wire)
    pieces = peers * chunks
    call = profile.call_seconds + work.weight_bytes / profile.memory_bytes
    busy = matmul + pieces * (call + profile.message_seconds) + work.wire_bytes * profile.busy_seconds
    travelling = work.wire_bytes / profile.link_bytes + pieces * profile.message_seconds
    smallest, largest = _extremes(chunks, work.ranks)
    own, first = matmul / work.ranks, travelling / peers * largest
    return Estimate(matmul, wire, max(busy + max(0.0, first - own), travelling + own * smallest + call))


def spreads_weight_gradient(chunks: int, work: Work, profile: MachineProfile, dgrad: bool) -> bool:
    """Whether a row-parallel backward takes less time with the weight's gradient summed chunk by chunk.

    One matmul after the last chunk costs least. But where the wire takes longer than dgrad, the device is idle until
    then, and matmuls of chunks fill that time. Each chunk reads and writes the gradient once more.
    """
    pieces = (work.ranks - 1) * chunks
    matmul = work.flops / profile.flops(work.dtype)
    busy = work.wire_bytes * profile.busy_seconds + pieces * profile.message_seconds
    travelling = work.wire_bytes / profile.link_bytes + pieces * profile.message_seconds
    last = matmul / work.ranks * _extremes(chunks, work.ranks).smallest
    again = pieces * (profile.call_seconds + 2 * work.weight_bytes / profile.memory_bytes)
    once = max(dgrad * (matmul + last) + busy, travelling + dgrad * last) + matmul
    spread = max((dgrad + 1) * (matmul + last) + busy + again, travelling + (dgrad + 1) * last)
    return spread < _WORTH_CUTTING * once


class _Extremes(NamedTuple):
    """The smallest and the largest chunk, as fractions of a shard."""

    smallest: float
    largest: float


def _extremes(chunks: int, ranks: int) -> _Extremes:
    """The extremes of a gather's chunks: tapered on two ranks, else equal. Those of a scatter are taken as the same."""
    weights = chunk_weights(chunks, "rising" if ranks == 2 else "none")
    return _Extremes(min(weights) / sum(weights), max(weights) / sum(weights))


def pays(chunks: int, work: Work, profile: MachineProfile) -> bool:
    """Whether the model predicts a gain from cutting into so many chunks."""
    return estimate(chunks, work, profile).total <= _WORTH_CUTTING * estimate(None, work, profile).total


def best_count(work: Work, profile: MachineProfile) -> int:
    """The number of chunks, doubled as long as the model predicts a gain.

    With equal pieces this is the best power of two. On two ranks pieces are tapered, and a larger count may be some
    percent better. Trying all counts would make torch.compile recompile for lengths that now have the same plan.
    """
    most = min(work.rows, _MAX_CHUNKS, work.matrix_rows // _LEAST_ROWS)
    count, total = 1, estimate(1, work, profile).total
    while 2 * count <= most:
        finer = estimate(2 * count, work, profile).total
        if finer >= total:
            break
        count, total = 2 * count, finer
    return count


# --- the workspace bound ---------------------------------------------------------------------------------------------

_ENVIRONMENT = "SEQPAR_MAX_WORKSPACE_BYTES"
_bound: int | None = None


def set_max_workspace_bytes(limit: int | None) -> None:
    """Bound the staging buffers of each all_gather_linear and linear_reduce_scatter, forward and backward, from now on.

    Staging buffers hold messages: received chunks before they are multiplied, partial sums before they are sent, and
    messages packed from several small blocks of memory. With a bound chunks are smaller and wait for the buffers of
    earlier ones. Not counted are results, the partial sums of this rank's own rows, and in a backward the gathered
    operand of the weight gradient. What ``vocab_parallel_linear_cross_entropy`` and ``vocab_parallel_cross_entropy``
    compute from a slice of logits stays below the bound too. The initial bound is the variable
    SEQPAR_MAX_WORKSPACE_BYTES; unset, there is none.

    Args:
        limit: bytes on each rank, the same on all ranks of a group; None removes the bound.

    Raises:
        ValueError: not a positive int or None. A later call whose smallest chunk, one row of the sequence, does not fit
            raises a ValueError too.

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
    """How many posts may be in flight at one time within the bound; None: any number."""
    if _bound is None or message_bytes == 0:
        return None
    per_post = _STAGED_PACKED - 1 if packed else _STAGED - 1
    return max(1, (_bound // message_bytes - 1) // per_post)


def chunks_needed(work: Work, bound: int | None) -> int | None:
    """The least number of chunks that stay within the bound; None where the unchunked call does."""
    if bound is None or bound >= work.ranks * work.shard_bytes * (3 if work.packed(1) else 1):
        return None
    return chunks_within(work, bound, 1)


def chunks_within(work: Work, bound: int | None, count: int) -> int:
    """The least number of chunks, ``count`` or more, whose messages stay within the bound with one post in flight."""
    if bound is None or not work.shard_bytes:
        return count
    count = max(count, _chunks_of(bound, work, _STAGED))
    return max(count, _chunks_of(bound, work, _STAGED_PACKED)) if work.packed(count) else count


def _chunks_of(bound: int, work: Work, alive: int) -> int:
    """The least number of chunks such that ``alive`` messages stay within the bound."""
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
