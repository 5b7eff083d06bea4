"""How the Triton kernels cut a [rows, cols] problem: a fixed table, so that nothing is tuned on a first call."""

from functools import cache
from typing import NamedTuple


class Tile(NamedTuple):
    """``rows`` x ``block`` elements in the hands of ``warps`` warps; ``held`` where ``block`` spans the whole row."""

    rows: int
    block: int
    warps: int
    held: bool = True
    programs: int = 0  # persistent grids: programs per multiprocessor
    stages: int = 1  # loops: tiles in flight


class _Line(NamedTuple):
    """Rows of up to ``block`` columns; shorter ones are stacked until a tile has ``block`` elements."""

    block: int
    warps: int
    programs: int = 0
    stages: int = 1


# By bytes an element. Every line was compiled for sm_80, sm_90 and sm_100 and keeps its values in registers without a
# spill; the next power of two would not, which is where the chunked kernels take over.
_FORWARD = {
    2: (_Line(2048, 4), _Line(4096, 8), _Line(8192, 16), _Line(16384, 16), _Line(32768, 32)),
    4: (_Line(1024, 4), _Line(2048, 8), _Line(4096, 8), _Line(8192, 16), _Line(16384, 32), _Line(32768, 32)),
    8: (_Line(1024, 4), _Line(2048, 8), _Line(4096, 16)),
}
_BACKWARD = {
    2: (_Line(1024, 4, 4), _Line(2048, 8, 2), _Line(4096, 16, 1), _Line(8192, 32, 1)),
    4: (_Line(1024, 4, 4), _Line(2048, 8, 2), _Line(4096, 16, 1), _Line(8192, 32, 1)),
    8: (_Line(512, 4, 2), _Line(2048, 16, 1)),
}
_FORWARD_CHUNKED = {
    2: Tile(1, 8192, 16, False),
    4: Tile(1, 8192, 16, False),
    8: Tile(1, 2048, 8, False),
}
_BACKWARD_CHUNKED = {
    2: Tile(4, 2048, 8, False, programs=2),
    4: Tile(4, 1024, 8, False, programs=2),
    8: Tile(2, 512, 8, False, programs=2),
}
_SMALLEST_BLOCK = 16

#: The reduction of partial sums: few columns a program, since there are only ``cols`` of them to share out.
PARTIALS = Tile(32, 32, 4)
#: The sum over shards: streams, so a tile is what one thread block keeps in flight.
SHARDS_ELEMENTS, SHARDS_WARPS = 2048, 4


def _block(cols: int) -> int:
    return max(1 << (cols - 1).bit_length(), _SMALLEST_BLOCK)


def _held(lines: tuple[_Line, ...], cols: int) -> Tile | None:
    block = _block(cols)
    for line in lines:
        if block <= line.block:
            return Tile(line.block // block, block, line.warps, True, line.programs, line.stages)
    return None


@cache
def forward_tile(cols: int, itemsize: int) -> Tile:
    """``itemsize``: bytes of an element of x."""
    return _held(_FORWARD[itemsize], cols) or _FORWARD_CHUNKED[itemsize]


@cache
def backward_tile(cols: int, itemsize: int, partials: int) -> Tile:
    """``partials``: how many vector gradients are wanted, each of which a held tile carries in registers."""
    return _held(_BACKWARD[itemsize], cols) or _BACKWARD_CHUNKED[itemsize]


@cache
def shards_tile(cols: int) -> Tile:
    """A wide row is cut where that wastes little of the last block, a narrow one shares its tile with others."""
    block = min(_block(cols), SHARDS_ELEMENTS // 2)
    return Tile(SHARDS_ELEMENTS // block, block, SHARDS_WARPS, held=False)
