"""The buffers of one layer of :class:`.sequence_cache.SequenceShardedCache` on one rank."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 16  # the fewest rows that a buffer grows by


class CacheLayer:
    """One layer's keys and values on this rank, [B, Hkv, room, D] and [B, Hkv, room, Dv]; room grows by a quarter."""

    def __init__(self) -> None:
        self.length = 0  # the length of the whole sequence
        self.k = self.v = torch.empty(0)

    def make_room(self, rows: int, used: int, heads: int, k: Tensor, v: Tensor) -> None:
        """Make the buffers large enough for ``rows`` rows of all heads; the first ``used`` rows are kept."""
        room = self.k.shape[2] if self.k.dim() == 4 else 0
        wanted = [(t.shape[0], heads, t.shape[3]) for t in (k, v)]
        found = [(*t.shape[:2], t.shape[3]) if t.dim() == 4 else None for t in (self.k, self.v)]
        if room < rows or wanted != found or (self.k.dtype, self.k.device) != (k.dtype, k.device):
            if used:
                rows = max(rows, room + room // 4, room + _LEAST)
            with torch.inference_mode(False):  # inference tensors could not be written to outside of inference mode
                new = [t.new_empty(t.shape[0], heads, rows, t.shape[3]) for t in (k, v)]
            if used:
                for old, t in zip((self.k, self.v), new, strict=True):
                    t[:, :, :used] = old[:, :, :used]
            self.k, self.v = new

    def store(self, heads: range, slot: int, k: Tensor, v: Tensor) -> None:
        for whole, t in ((self.k, k), (self.v, v)):
            whole[:, heads.start : heads.stop, slot : slot + t.shape[1]] = t.transpose(1, 2)

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Views of the first ``count`` rows, [B, count, Hkv, D] and [B, count, Hkv, Dv]."""
        return self.k[:, :, :count].transpose(1, 2), self.v[:, :, :count].transpose(1, 2)
