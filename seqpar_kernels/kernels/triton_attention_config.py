"""Tiles of the Triton attention kernels: a fixed table, so that nothing is tuned on a first call.

``tests/kernels/test_attention_triton.py`` holds it to the registers and the shared memory of the GPUs it is meant for.
"""

from functools import cache
from typing import NamedTuple

import torch

#: Every tile's ``keys`` divides it: calls that are cut at its multiples leave no trace in the bits of a result.
MOST_KEYS = 128


class AttentionTile(NamedTuple):
    """``rows`` of queries against ``keys`` at a time, in the hands of ``warps`` warps."""

    rows: int
    keys: int
    warps: int
    stages: int  # tiles in flight


class AttentionTiles(NamedTuple):
    """``queries`` makes dq and ``keys`` dk and dv."""

    forward: AttentionTile
    queries: AttentionTile
    keys: AttentionTile


class Widths(NamedTuple):
    """Head dimensions as kernels have them. Keys are read in two parts where that is narrower than one."""

    first: int
    second: int  # 0: none
    value: int

    @property
    def widest(self) -> int:
        return max(self.first + self.second, self.value)


_Line = tuple[int, AttentionTiles]  # the widest head it is for
_T, _A = AttentionTile, AttentionTiles

# 99 KiB of shared memory: sm_86, sm_89 and sm_120.
_SMALL: tuple[_Line, ...] = (
    (64, _A(_T(128, 64, 8, 2), _T(64, 64, 4, 2), _T(32, 64, 4, 2))),
    (128, _A(_T(128, 64, 8, 2), _T(64, 32, 4, 2), _T(32, 64, 8, 2))),
    (256, _A(_T(64, 32, 8, 2), _T(32, 32, 8, 1), _T(32, 32, 8, 1))),
)
# By kind of product, then from compute capability on, newest first, within the shared memory of the smallest such chip.
_TABLE: dict[str, tuple[tuple[tuple[int, int], tuple[_Line, ...]], ...]] = {
    "half": (
        ((12, 0), _SMALL),
        (
            (10, 0),  # accumulators lie in tensor memory, on their way to which they pass through registers
            (
                (64, _A(_T(128, 64, 8, 2), _T(128, 64, 8, 2), _T(32, 64, 8, 1))),
                (128, _A(_T(128, 64, 8, 2), _T(128, 64, 8, 2), _T(32, 64, 8, 1))),
                (256, _A(_T(64, 32, 8, 1), _T(32, 32, 8, 1), _T(32, 32, 8, 1))),
                (576, _A(_T(32, 32, 8, 1), _T(32, 32, 8, 1), _T(16, 16, 8, 1))),
            ),
        ),
        (
            (9, 0),
            (
                (64, _A(_T(128, 128, 8, 3), _T(128, 64, 8, 3), _T(64, 128, 8, 2))),
                (128, _A(_T(128, 128, 8, 2), _T(128, 64, 8, 2), _T(32, 128, 8, 2))),
                (192, _A(_T(128, 64, 8, 2), _T(64, 64, 8, 2), _T(16, 64, 8, 2))),
                (256, _A(_T(128, 64, 8, 2), _T(64, 64, 8, 2), _T(32, 32, 8, 1))),
                (576, _A(_T(32, 32, 8, 1), _T(32, 32, 8, 1), _T(16, 16, 8, 1))),
            ),
        ),
        ((8, 0), _SMALL),
    ),
    "tf32": (
        (
            (8, 0),
            (
                (64, _A(_T(64, 32, 4, 2), _T(64, 32, 4, 2), _T(32, 32, 4, 2))),
                (128, _A(_T(64, 32, 8, 2), _T(32, 32, 8, 1), _T(32, 32, 8, 1))),
                (256, _A(_T(32, 16, 8, 1), _T(16, 16, 8, 1), _T(16, 16, 8, 1))),
            ),
        ),
    ),
    # Every product in fp32, without tensor cores: bound by arithmetic whatever the tile.
    "ieee": (
        (
            (8, 0),
            (
                (64, _A(_T(64, 32, 8, 1), _T(64, 32, 8, 1), _T(32, 32, 8, 1))),
                (128, _A(_T(32, 32, 8, 1), _T(32, 32, 8, 1), _T(32, 32, 8, 1))),
                (256, _A(_T(16, 16, 8, 1), _T(16, 16, 8, 1), _T(16, 16, 8, 1))),
            ),
        ),
    ),
}


def _power_of_two(size: int) -> int:
    return max(16, 1 << max(0, size - 1).bit_length())


@cache
def widths(head_dim: int, value_dim: int) -> Widths:
    """Powers of two, 16 or more: 192 is read as 128 and 64, not as 256."""
    first, second = _power_of_two(head_dim), 0
    if head_dim < first and first > 16:
        rest = _power_of_two(head_dim - first // 2)
        if first // 2 + rest < first:
            first, second = first // 2, rest
    return Widths(first, second, _power_of_two(value_dim))


@cache
def attention_tiles(wide: Widths, dtype: torch.dtype, tf32: bool, capability: tuple[int, int]) -> AttentionTiles | None:
    """The tiles for heads of ``wide``; None where they have no room."""
    kind = "half" if dtype.itemsize == 2 else "tf32" if tf32 else "ieee"
    lines = next(lines for oldest, lines in _TABLE[kind] if oldest <= capability)
    return next((tiles for widest, tiles in lines if wide.widest <= widest), None)
