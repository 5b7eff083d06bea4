"""Groups of 2, 3 and 4 of the four ranks of ``world4``, each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


@functools.cache
def _groups() -> dict[int, dist.ProcessGroup]:
    """Every rank of the world makes all of them, in one order."""
    return {t: dist.new_group(list(range(t))) for t in (2, 3, 4)}


def on_ranks(case: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """``case(group, *args)`` on 2, 3 and 4 ranks; the results of this rank by the number of ranks."""
    results = {}
    for t, group in _groups().items():
        try:
            if dist.get_rank() < t:
                torch.manual_seed(0)
                results[t] = case(group, *args)
        finally:
            dist.barrier()  # a failure on fewer ranks leaves the others able to go on
    return results
