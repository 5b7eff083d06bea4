"""``bench plot DIR``: pictures from the saved files alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BenchError, need
from .figures import (
    draw_attention,
    draw_host,
    draw_layer,
    draw_linear,
    draw_memory,
    draw_moe,
    draw_norm,
    draw_overview,
    draw_reduce,
    is_number,
)
from .schema import Row, load, write_atomically

if TYPE_CHECKING:
    import argparse

TEXT = "pictures from saved files alone"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes DIR/*.png."
    parser.add_argument("folder", type=Path, metavar="DIR")


def run_command(args: argparse.Namespace) -> int:
    for path in run(args.folder):
        print(f"drawn: {path}")
    return 0


#: Family of rows -> its picture, which has the same name.
PICTURES: dict[str, Callable[[Sequence[Row]], Any]] = {
    "norm": draw_norm,
    "reduce": draw_reduce,
    "linear": draw_linear,
    "loopback": draw_linear,
    "layer": draw_layer,
    "attention": draw_attention,
    "moe": draw_moe,
    "memory": draw_memory,
    "host": draw_host,
}


def run(folder: Path) -> list[Path]:
    """Draws what the rows allow; returns the files written.

    Raises:
        BenchError: nothing to draw, or matplotlib is missing.
    """
    rows = [row for row in load(folder) if row.status == "ok"]
    need("matplotlib", "bench", "plot")
    import matplotlib

    matplotlib.use("Agg")
    target = folder if folder.is_dir() else folder.parent
    written = []
    for name, draw in PICTURES.items():
        chosen = [row for row in rows if row.family == name and _can_be_drawn(row)]
        if chosen:
            written.append(_save(draw(chosen), target / f"{name}.png"))
    balanced = [row for row in rows if _is_balanced(row)]
    if balanced:
        written.append(_save(draw_overview(balanced), target / "overview.png"))
    if not written:
        names = f"{', '.join(list(PICTURES)[:-1])} or {list(PICTURES)[-1]}"
        raise BenchError(f"{folder}: no {names} rows to draw: measure with --save {folder}")
    return written


def _can_be_drawn(row: Row) -> bool:
    """Whether it has what its picture shows: a file need not be of this version of the benchmarks."""
    if row.family == "memory":
        return is_number(row.metrics.get("sbh_over_t"))
    if row.family == "norm":
        return bool(row.p50_ms and row.bytes) and len(row.shape) == 2
    if row.family == "reduce":
        return bool(row.p50_ms and row.bytes) and len(row.shape) == 3
    if row.family == "layer":
        return bool(row.p50_ms) and len(row.shape) == 4
    return bool(row.p50_ms) and is_number(row.params.get("chunks", 1))


def _is_balanced(row: Row) -> bool:
    """Whether it times a planned linear on two ranks whose wire takes as long as the matmul."""
    planned = row.family == "linear" and "chunks" not in row.params and bool(row.p50_ms)
    return planned and row.params.get("link") == "ratio:1" and row.ranks == 2


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise BenchError(f"{path}: cannot be written ({error.strerror}): copy the rows to another folder") from None
    return path
