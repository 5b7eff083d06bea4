"""The table that ``explain(model)`` returns, as text of 120 columns, as HTML, or as plain values."""

from __future__ import annotations

import html
import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

_WIDTH = 120
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
_HEADER = ("module", "style", "engine", "chunks", "fused", "wire/forward", "kept", "why")


@dataclass(frozen=True)
class Row:
    """One module of the table, or several equal ones.

    ``wire`` is what one rank sends in one forward, ``model`` the planner's estimate of it. ``kept`` is what the last
    forward kept of a linear's input for the backward. ``slower`` marks a module that this package could run faster
    (SEQPAR_STRICT refuses it). A module that is best unfused is not marked.
    """

    module: str
    style: str
    engine: str
    chunks: str
    fused: str
    why: str
    wire: str = ""
    model: str = ""
    kept: str = ""
    slower: bool = False


@dataclass(frozen=True)
class Explanation:
    """How every module of a parallelized model runs.

    ``rows`` holds every module. ``str()`` shows equal layers as one row of a table of 120 columns, with the reasons
    below. Notebooks show HTML, and :meth:`to_dict` returns plain values.
    """

    title: str
    rows: tuple[Row, ...]

    def grouped(self) -> tuple[Row, ...]:
        """``rows``, with one row for those that differ only in a number of their names: ``layers.0..31.mlp``."""
        groups: dict[Row, list[str]] = {}
        for row in self.rows:
            groups.setdefault(replace(row, module=_NUMBER.sub("*", row.module)), []).append(row.module)
        return tuple(replace(row, module=name) for row, names in groups.items() for name in _joined(names))

    def to_dict(self) -> dict[str, Any]:
        """``{"title": ..., "rows": [{"module": ..., "style": ..., ...}, ...]}``, of strings and booleans."""
        return {"title": self.title, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        rows = self.grouped()
        notes = _notes(rows)
        table = [list(_HEADER), *([*_cells(row), f"[{notes[_note(row)]}]"] for row in rows)]
        widths = _fitting([max(map(len, column)) for column in zip(*table, strict=True)])
        lines = [line for cells in table for line in _wrapped(cells, widths)]
        lines.insert(len(_wrapped(table[0], widths)), "  ".join("-" * width for width in widths))
        for text, number in notes.items():
            lines += textwrap.wrap(text, _WIDTH, initial_indent=f"[{number}] ", subsequent_indent="    ")
        title = [line for part in self.title.splitlines() for line in textwrap.wrap(part, _WIDTH)]
        return "\n".join([*title, *lines])

    def _repr_html_(self) -> str:
        def line(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line([*_cells(row), _note(row)], "td") for row in self.grouped())
        title = html.escape(self.title).replace("\n", "<br>")
        return f"<table><caption>{title}</caption><thead>{line(_HEADER, 'th')}</thead><tbody>{body}</tbody></table>"


def _cells(row: Row) -> tuple[str, ...]:
    return row.module, row.style, row.engine, row.chunks, row.fused, row.wire, row.kept


def _note(row: Row) -> str:
    return f"{row.why}; model: {row.model}" if row.model else row.why


def _notes(rows: Sequence[Row]) -> dict[str, int]:
    """Reason -> its number, in the order of the rows."""
    return {text: number for number, text in enumerate(dict.fromkeys(map(_note, rows)), 1)}


def _joined(names: list[str]) -> list[str]:
    """One name if the numbers in ``names`` are all combinations of some sets of numbers; else ``names``."""
    numbers = [_NUMBER.findall(name) for name in names]
    columns = [sorted(set(column), key=int) for column in zip(*numbers, strict=True)]
    if len(names) == 1 or set(map(tuple, numbers)) != set(itertools.product(*columns)):
        return names
    ranges = iter(map(_range, columns))
    return [_NUMBER.sub(lambda _: next(ranges), names[0])]


def _range(numbers: list[str]) -> str:
    """``0..31``, or ``0,2,4``; runs of three and more are ranges."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _fitting(widths: list[int]) -> list[int]:
    """``widths``, with the longest reduced until the line has 120 columns."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > _WIDTH:
        longest = max(range(len(widths)), key=widths.__getitem__)
        widths[longest] -= 1
    return widths


def _wrapped(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    parts = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    lines = itertools.zip_longest(*parts, fillvalue="")
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
