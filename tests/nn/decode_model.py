"""A small transformer with grouped queries, rotary embeddings, a window in one layer and sinks in another; its
attention is whatever a caller gives it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEAD_DIM = 61, 48, 8
WINDOWS = ((-1, -1), (5, -1))  # of the layers


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """[B, S, H, D]"""
    half = x.shape[-1] // 2
    angles = positions[:, None].to(x.dtype) * 100.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model(nn.Module):
    """Logits of token ids at ``positions``; ``attend(layer, q, k, v, window, sinks)``."""

    def __init__(self, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, (heads + 2 * kv_heads) * HEAD_DIM) for _ in WINDOWS)
        self.out = nn.ModuleList(nn.Linear(heads * HEAD_DIM, WIDTH) for _ in WINDOWS)
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in WINDOWS)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.sinks = nn.ParameterList(nn.Parameter(torch.randn(heads)) for _ in WINDOWS)

    def forward(self, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        x = self.embedding(ids)
        for i, window in enumerate(WINDOWS):
            heads = self.qkv[i](F.rms_norm(x, x.shape[-1:])).unflatten(-1, (-1, HEAD_DIM))
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
            q, k = rotated(q, positions), rotated(k, positions)
            sinks = self.sinks[i] if i else None
            x = x + 4 * self.out[i](attend(i, q, k, v, window, sinks).flatten(2))
            x = x + F.gelu(self.mlp[i](F.rms_norm(x, x.shape[-1:])))
        return self.head(F.rms_norm(x, x.shape[-1:]))
