"""Which engine runs a call and into how many chunks it is cut.

"single" gathers (or scatters) everything at once around one matmul; "collective" pipelines chunks over
torch.distributed. A chunk must be large enough that its message is not all latency and its matmul not all overhead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

ENGINES = ("auto", "single", "collective")

# Below this many bytes a rank a call is one matmul and one exchange.
SIZE_FLOOR_BYTES = {"cpu": 64 * 1024, "cuda": 1024 * 1024}
# No chunk smaller than this: per-message cost stays a small part of the wire time.
MIN_CHUNK_BYTES = {"cpu": 256 * 1024, "cuda": 4 * 1024 * 1024}
MAX_CHUNKS = 4


class Plan(NamedTuple):
    """What will run and why. ``chunks`` is per shard: a group of t ranks works on t * chunks pieces."""

    engine: str
    chunks: int
    reason: str


def check_engine(engine: str) -> None:
    """Raises ValueError for a name that is no engine."""
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")


def plan(engine: str, chunks: int | None, *, shard_bytes: int, ranks: int, device: torch.device) -> Plan:
    """Settle ``engine="auto"`` and ``chunks=None`` for a shard of ``shard_bytes`` bytes.

    Sizes enter as those of the largest shard, so that every rank of a group comes to the same plan.
    """
    if ranks == 1:
        return Plan("single", 1, "one rank: plain matmul, no communication")
    floor = SIZE_FLOOR_BYTES.get(device.type, SIZE_FLOOR_BYTES["cuda"])
    least = MIN_CHUNK_BYTES.get(device.type, MIN_CHUNK_BYTES["cuda"])
    if engine == "single":
        return Plan("single", 1, "asked for" if chunks in (None, 1) else f"asked for; chunks={chunks} has no effect")
    if engine == "auto" and chunks is None and shard_bytes < floor:
        return Plan("single", 1, f"shard of {shard_bytes} bytes is below the floor of {floor}")
    if chunks is None:
        chunks = max(1, min(MAX_CHUNKS, shard_bytes // least))
        return Plan("collective", chunks, f"{shard_bytes} bytes a shard, at least {least} a chunk")
    return Plan("collective", chunks, "chunks given")
