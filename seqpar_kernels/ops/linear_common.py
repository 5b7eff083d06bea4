"""What the ops around a matmul share: where they run, sizes, what ranks agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import SequenceShard, group_rank, group_size
from .registry import group_named

#: Where an op runs, in every schema.
PLACE = "str group, int seq_dim, SymInt seq_len, int chunks, str engine"
Place = tuple[Any, ...]


def sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums of [rows, N], accumulated in fp32 (fp64) and rounded once. [N]"""
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.sum(0, dtype=acc).to(dtype)


def shape_with(x: Tensor, seq_dim: int, length: int, features: int) -> list[int]:
    shape = list(x.shape)
    shape[seq_dim], shape[-1] = length, features
    return shape


def rows_here(group: str, seq_len: int) -> int:
    pg = group_named(group)
    return SequenceShard(seq_len, group_size(pg), group_rank(pg)).size
