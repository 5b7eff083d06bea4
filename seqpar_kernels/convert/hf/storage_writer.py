"""``HuggingFaceStorageWriter`` of torch, where it would lose shards: refused before anything is written."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from torch.distributed.checkpoint import HuggingFaceStorageWriter

from ..conversion import Conversion

_REMEDY = (
    "save the whole model with model.save_pretrained(folder), or its shards with torch.distributed.checkpoint's "
    "default writer"
)


def refuse_lost_shards(conversion: Conversion) -> None:
    """Let the writer refuse what its files cannot hold, from here on; may be called often."""
    writer: Any = HuggingFaceStorageWriter
    original = writer.prepare_global_plan
    if conversion.region.ranks == 1 or hasattr(original, "_seqpar"):
        return

    @functools.wraps(original)
    def prepare_global_plan(self: Any, plans: list[Any]) -> list[Any]:
        _check(self.save_distributed, plans)
        return original(self, plans)

    writer.prepare_global_plan = prepare_global_plan
    writer.prepare_global_plan._seqpar = True


def _check(save_distributed: bool, plans: list[Any]) -> None:
    writers = [rank for rank, plan in enumerate(plans) if plan.items]
    if not save_distributed and len(writers) > 1:
        raise ValueError(
            f"HuggingFaceStorageWriter: expected save_distributed=True with shards on {len(writers)} ranks, got False: "
            f"all would write one file, and all shards but one rank's would be lost; {_REMEDY}"
        )
    for plan in plans:
        counts = Counter(item.index.fqn for item in plan.items)
        packed = next((name for name, count in counts.items() if count > 1), None)
        if packed is not None:
            raise ValueError(
                f"HuggingFaceStorageWriter: {packed} lies in {counts[packed]} pieces on a rank (packed sections), and "
                f"its files hold one of each tensor: the others would be lost; {_REMEDY}"
            )
