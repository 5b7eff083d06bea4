"""What masks and sizes there are to attend with, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention_problem import BF16, F16, F32, F64, Problem


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def padding(rows: int) -> torch.Tensor:
    return (torch.arange(rows) < torch.tensor([[5], [rows - 3]]))[:, None, None]


def some(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.4


CASES: dict[str, Callable[[], Problem]] = {
    "full": lambda: Problem(),
    "causal": lambda: Problem(is_causal=True, scale=0.3),
    "zigzag, causal": lambda: Problem((43, 43), is_causal=True, layout="zigzag"),
    "bottom right": lambda: Problem((21, 37), is_causal=True),
    "fewer keys than queries": lambda: Problem((37, 21), is_causal=True, layout="zigzag"),
    "window": lambda: Problem(is_causal=True, window_size=(9, 0), layout="zigzag"),
    "two-sided window, latent": lambda: Problem((30, 41), dims=(24, 8), window_size=(7, 3)),
    "documents, sinks": lambda: Problem(is_causal=True, cu_seqlens=ends(0, 5, 5, 22, 37), layout="zigzag", sinks=True),
    "documents, window, cap": lambda: Problem(window_size=(6, 2), cu_seqlens=ends(0, 11, 30, 37), softcap=2.0),
    "sinks, multi-query": lambda: Problem(heads=(4, 1), is_causal=True, sinks=True),
    "padding": lambda: Problem(mask=padding(37), is_causal=True, layout="zigzag"),
    "mask": lambda: Problem(mask=some((2, 1, 37, 37)), sinks=True),
    "mask of heads": lambda: Problem(mask=some((4, 37, 37)), layout="zigzag"),
    "bias": lambda: Problem(bias=(2, 4, 37, 37), is_causal=True),
    "bias of one head": lambda: Problem(bias=(1, 1, 37, 37), layout="zigzag"),
    "alibi": lambda: Problem(bias=(4, 1, 37), is_causal=True, layout="zigzag"),
    "dropout": lambda: Problem(dropout_p=0.3, is_causal=True, layout="zigzag"),
    "dropout, bottom right": lambda: Problem((21, 37), dropout_p=0.1, is_causal=True),
    "few rows": lambda: Problem((3, 3), is_causal=True, bias=(1, 4, 1, 3)),
    "few rows, zigzag": lambda: Problem((5, 5), is_causal=True, layout="zigzag", mask=some((5, 5)), sinks=True),
    "uneven heads": lambda: Problem(heads=(6, 3), is_causal=True),
    "heads across groups": lambda: Problem(heads=(8, 2), is_causal=True, sinks=True, dropout_p=0.1, layout="zigzag"),
    "bf16": lambda: Problem((61, 61), dtype=BF16, is_causal=True, layout="zigzag"),
    "bf16, sinks, window": lambda: Problem((61, 61), dtype=BF16, is_causal=True, window_size=(20, 0), sinks=True),
    "fp16": lambda: Problem((61, 61), dtype=F16, is_causal=True, cu_seqlens=ends(0, 40, 61)),
    "fp64": lambda: Problem(dtype=F64, is_causal=True, layout="zigzag", softcap=3.0),
}

#: Engines by the number of ranks.
ENGINES: dict[int, list[dict[str, Any]]] = {
    1: [dict()],
    2: [dict(engine="ring", save_kv=True), dict(engine="ulysses"), dict(engine="all_gather", save_kv=False)],
    3: [dict(engine="ring", save_kv=False, chunks=2), dict(engine="ulysses"), dict()],
    4: [
        dict(engine="ring"),
        dict(engine="ulysses"),
        dict(engine="all_gather"),
        dict(ulysses_degree=2, save_kv=False),
        dict(ring_degree=2, save_kv=True, engine="all_gather"),
    ],
}

__all__ = ["CASES", "ENGINES", "F32"]
