"""Documents packed into one sequence, found as Transformers finds them: where positions do not go on by one."""

from __future__ import annotations

import torch
from torch import Tensor

#: Of each batch entry: where its documents begin, and the length. None: the sequence is one document.
Documents = tuple[tuple[int, ...] | None, ...]


def documents_of(position_ids: Tensor) -> Documents | None:
    """The documents of [B, S] position ids of the whole sequence; None: each entry is one."""
    length = position_ids.shape[-1]
    if length < 2:
        return None
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(begins.any()):
        return None
    return tuple(_joined([0, *(row.nonzero().flatten() + 1).tolist(), length]) for row in begins)


def documents_of_lengths(cu_seqlens: Tensor, batch: int, length: int) -> Documents:
    """The documents of flash-attention's ``cu_seq_lens_q``, which counts the rows of all batch entries in one.

    Raises:
        ValueError: they do not end with the batch, or a document goes on in the next batch entry.
    """
    borders = cu_seqlens.tolist()
    rows = batch * length
    if cu_seqlens.dim() != 1 or not borders or borders[0] != 0 or borders[-1] != rows or borders != sorted(borders):
        raise ValueError(f"cu_seq_lens_q: expected ascending integers from 0 to the {rows} rows, got {borders}")
    missing = sorted(set(range(0, rows, length or 1)) - set(borders))
    if missing:
        raise ValueError(f"cu_seq_lens_q: a document crosses the border of two batch entries at row {missing[0]}")
    return tuple(
        _joined([0, *(b - entry * length for b in borders if entry * length < b < (entry + 1) * length), length])
        for entry in range(batch)
    )


def with_chunks(documents: Documents | None, chunk: int, batch: int, length: int) -> Documents:
    """Attention within chunks of ``chunk`` positions: each is a document too."""
    borders = range(0, length, chunk)
    return tuple(
        _joined(sorted({*borders, *((documents and documents[entry]) or ()), length})) for entry in range(batch)
    )


def as_tensors(documents: Documents | None, batch: int, device: torch.device) -> list[tuple[slice, Tensor | None]]:
    """Batch entries that are packed alike, consecutive ones together: (entries, ``cu_seqlens``)."""
    if documents is None:
        return [(slice(0, batch), None)]
    found: list[tuple[slice, Tensor | None]] = []
    begin = 0
    for entry in range(1, batch + 1):
        if entry == batch or documents[entry] != documents[begin]:
            borders = documents[begin]
            made = None if borders is None else torch.tensor(borders, dtype=torch.int32, device=device)
            found.append((slice(begin, entry), made))
            begin = entry
    return found


def _joined(borders: list[int]) -> tuple[int, ...] | None:
    return tuple(borders) if len(borders) > 2 else None
