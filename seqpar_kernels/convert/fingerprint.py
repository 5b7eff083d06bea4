"""Fingerprints of tensors: 64 bits of all their bits, and a number for each of their rows.

Both are computed where the tensor lies and wait for no device. The first is exact: NaN equals itself, and rows in
another order give another number. The second stands for a row well enough to tell rounding from another row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Elements up to which each has a factor of its own; above it rows and columns have.
_DIRECT = 1 << 14
_factors: dict[torch.device, Tensor] = {}


def is_plain(x: object) -> bool:
    """Whether ``x`` is a tensor with values of its own: no subclass, not on the meta device."""
    if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter):
        return False
    return x.layout is torch.strided and not x.is_meta


def fingerprint(x: Tensor) -> Tensor:
    """[...] -> 0-d int64, the same for the same bits in the same places. ``x`` is plain (:func:`is_plain`)."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    words = _words(x)
    if words.numel() <= _DIRECT:
        flat = words.reshape(-1)
        return (flat * _factors_for(flat.numel(), x.device)).sum()
    columns, rows = words.sum(0), words.sum(1)
    by_column = (columns * _factors_for(columns.numel(), x.device)).sum()
    return by_column * 3 + (rows * _factors_for(rows.numel(), x.device)).sum()


def row_sketch(x: Tensor) -> Tensor:
    """[..., H] -> float32 [rows, 2]: each row's product with fixed signs, and the sum of its magnitudes."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(-1, 1)
    rows = rows.float()
    signs = 1.0 - 2.0 * ((_factors_for(rows.shape[1], x.device) >> 40) & 1).float()
    return torch.stack([rows @ signs, rows.abs().sum(1)], 1)


def _words(x: Tensor) -> Tensor:
    """The bits of ``x`` as int64 [rows, columns]; wider than its elements where they come in eights of bytes."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    x = x.contiguous()
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    width = x.shape[-1] if x.dim() > 1 else x.numel()
    table = x.reshape(-1, width)
    if width * x.element_size() % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0:
        return table.view(torch.int64)
    return table.view(_INTEGERS[x.element_size()]).long()


def _factors_for(count: int, device: torch.device) -> Tensor:
    """``count`` odd numbers without a pattern, always the same ones."""
    found = _factors.get(device)
    if found is None or found.numel() < count:
        with torch.inference_mode(False), torch.no_grad():
            places = torch.arange(1, 2 * count + 1, dtype=torch.int64, device=device)
            mixed = places * -7046029254386353131
            mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
            _factors[device] = found = mixed ^ (mixed >> 32) | 1
    return found[:count]
