"""How the Triton kernels cut a [rows, cols] problem: a fixed table, so that nothing is tuned on a first call.

A thread gets 8 or 16 elements of a row, 32 of the longest rows, so that all values stay in registers. (The forward
spills some at 32768 columns, more with more terms.) Rows that are too long for one thread block use the chunked
kernels. ``tests/kernels/test_norm_triton.py`` holds the table to that.
"""

from functools import cache
from typing import NamedTuple


class Tile(NamedTuple):
    """``warps`` warps work on ``rows`` x ``block`` elements; ``held`` where ``block`` spans the whole row."""

    rows: int
    block: int
    warps: int
    held: bool = True
    early: bool = False  # load weights early, where enough registers are free
    programs: int = 1  # backward: programs per multiprocessor
    stages: int = 1  # backward: tiles in flight


class _Line(NamedTuple):
    """Serves rows of up to ``block`` columns; shorter ones are stacked until a tile has ``block`` elements."""

    block: int
    warps: int
    programs: int = 1
    partials: int = 5  # backward: the most vector gradients whose sums fit beside the row


# By bytes of the widest element.
_FORWARD = {
    2: (
        *(_Line(512, 1), _Line(1024, 2), _Line(2048, 4), _Line(4096, 8)),
        *(_Line(8192, 16), _Line(16384, 32), _Line(32768, 32)),
    ),
    4: (_Line(512, 1), _Line(1024, 2), _Line(2048, 4), _Line(4096, 8), _Line(8192, 16), _Line(16384, 32)),
    8: (_Line(512, 2), _Line(1024, 4), _Line(2048, 8), _Line(4096, 16)),
}
_BACKWARD = {
    2: (_Line(1024, 4, 4), _Line(2048, 8, 2), _Line(4096, 16), _Line(8192, 16, partials=3)),
    4: (_Line(1024, 4, 4), _Line(2048, 8, 2), _Line(4096, 16)),
    8: (_Line(512, 4, 2), _Line(2048, 16)),
}
_FORWARD_CHUNKED = {
    2: Tile(1, 8192, 16, held=False),
    4: Tile(1, 4096, 8, held=False),
    8: Tile(1, 2048, 8, held=False),
}
# More rows a tile mean fewer visits to the partial sums, until the second pass over them misses the L2 cache.
_BACKWARD_CHUNKED = {
    2: Tile(4, 2048, 8, held=False),
    4: Tile(4, 1024, 8, held=False),
    8: Tile(2, 512, 8, held=False),
}
_SMALLEST_BLOCK = 16
_LARGEST_STAGES = 3
#: Shared memory for the backward's tiles in flight on one multiprocessor; the smallest supported has 99 KiB.
_SHARED_BYTES = 80 * 1024

#: Compiler options of every launch: multiply-add in one instruction, which Triton 3.10 no longer does by default.
LAUNCH = {"enable_fp_fusion": True}

#: The sum over partial sums: few columns a program, since there are only ``cols`` columns for all programs.
PARTIALS = Tile(128, 32, 8, held=False)
#: The sum over shards streams: a program takes 16 elements a thread.
_SHARDS_ELEMENTS, _SHARDS_WARPS = 2048, 4


def _block(cols: int) -> int:
    return max(1 << (cols - 1).bit_length(), _SMALLEST_BLOCK)


def _held(lines: tuple[_Line, ...], cols: int, partials: int = 0) -> Tile | None:
    block = _block(cols)
    for line in lines:
        if block <= line.block and partials <= line.partials:
            return Tile(line.block // block, block, line.warps, programs=line.programs)
    return None


@cache
def forward_tile(cols: int, itemsize: int) -> Tile:
    """``itemsize``: bytes of the wider of x and z."""
    tile = _held(_FORWARD[itemsize], cols) or _FORWARD_CHUNKED[itemsize]
    return tile._replace(early=tile.rows * tile.block * itemsize <= 32 * 32 * tile.warps)


@cache
def backward_tile(cols: int, itemsize: int, streamed: int, partials: int) -> Tile:
    """``streamed``: bytes read for an element, of all tensors together. ``partials``: how many vector gradients."""
    tile = _held(_BACKWARD[itemsize], cols, partials)
    if tile is None:
        tile = _BACKWARD_CHUNKED[itemsize]
        if partials > 3:
            tile = tile._replace(rows=tile.rows // 2)
    bytes_in_flight = tile.rows * tile.block * streamed
    if not tile.held:  # a chunk's weights and partial sums are in flight with it
        bytes_in_flight += tile.block * (2 * itemsize + partials * max(itemsize, 4))
    stages = min(1 + _SHARED_BYTES // (bytes_in_flight * tile.programs), _LARGEST_STAGES)
    return tile._replace(stages=stages, early=tile.rows * tile.block <= 8 * 32 * tile.warps)


@cache
def shards_tile(cols: int) -> Tile:
    """A narrow row shares its tile with others; a wide one is cut where little of its last block is wasted."""
    block = min(_block(cols), _SHARDS_ELEMENTS // 2)
    return Tile(_SHARDS_ELEMENTS // block, block, _SHARDS_WARPS, held=False)
