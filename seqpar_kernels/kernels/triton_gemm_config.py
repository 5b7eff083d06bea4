"""Tiles of the Triton matmul: a fixed table, so that nothing is tuned on a first call."""

from functools import cache
from typing import NamedTuple

import torch


class GemmTile(NamedTuple):
    """``warps`` warps compute ``rows`` x ``cols`` of the result, ``depth`` of K at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int  # depths in flight
    group: int = 8  # strips that share a block of the weight
    programs: int = 1  # per multiprocessor
    tma: bool = False


class _Line(NamedTuple):
    """Tiles from compute capability ``oldest`` on, within the shared memory of the smallest such chip."""

    oldest: tuple[int, int]
    large: GemmTile
    small: GemmTile  # for results where the large tile would leave multiprocessors idle


# Newest first. Those from (9, 0) on are read by TMA.
_HALF = (
    _Line((12, 0), GemmTile(128, 128, 64, 8, 2), GemmTile(64, 128, 64, 4, 3)),
    _Line((9, 0), GemmTile(128, 256, 64, 8, 4), GemmTile(128, 128, 64, 8, 4)),
    _Line((8, 0), GemmTile(128, 128, 64, 8, 3), GemmTile(64, 128, 32, 4, 4)),
)
_TF32 = (
    _Line((9, 0), GemmTile(128, 128, 32, 8, 3), GemmTile(64, 128, 32, 4, 3)),
    _Line((8, 0), GemmTile(128, 128, 16, 8, 4), GemmTile(64, 64, 32, 4, 3)),
)
# All products in fp32, without tensor cores: arithmetic is the bound for every tile.
_IEEE = (_Line((8, 0), GemmTile(64, 64, 16, 8, 3, programs=2), GemmTile(64, 64, 16, 8, 3, programs=2)),)


@cache
def gemm_tile(
    rows: int, cols: int, dtype: torch.dtype, tf32: bool, aligned: bool, capability: tuple[int, int], processors: int
) -> GemmTile:
    """The tile for a result of ``rows`` x ``cols`` on this many multiprocessors.

    ``aligned``: rows of the operands begin at multiples of 16 bytes. TMA cannot read other rows; they are read element
    by element, for which large tiles have too few registers.
    """
    lines = _HALF if dtype.itemsize == 2 else _TF32 if tf32 else _IEEE
    line = next(line for line in lines if line.oldest <= (capability if aligned else (8, 0)))
    count = -(-rows // line.large.rows) * -(-cols // line.large.cols)
    tile = line.large if aligned and count >= processors else line.small
    return tile._replace(tma=line.oldest >= (9, 0))
