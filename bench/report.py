"""The terminal: a progress bar and tables. rich where it is installed, plain text where it is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from .errors import missing
from .schema import Row

if TYPE_CHECKING:
    import rich.progress


@cache
def has_rich() -> bool:
    """Measuring must not need it: a GPU machine may have no network. Its absence is said, once."""
    reason = missing("rich", "bench")
    if reason is not None:
        print(f"tables are plain text: {reason}", file=sys.stderr)
    return reason is None


class Progress:
    """``step(text)`` before each piece of work; ``total`` grows as more is planned."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None
        self._total = self._done = 0

    def plan(self, steps: int) -> None:
        self._total += steps
        if sys.stderr.isatty() and has_rich():
            import rich.console
            import rich.progress

            if self._bar is None:
                columns = [
                    rich.progress.BarColumn(30),
                    rich.progress.MofNCompleteColumn(),
                    rich.progress.TimeElapsedColumn(),
                    rich.progress.TextColumn("{task.description}", markup=False),
                ]
                console = rich.console.Console(stderr=True)
                self._bar = rich.progress.Progress(*columns, console=console, transient=True)
                self._task = self._bar.add_task("", total=self._total)
                self._bar.start()
            self._bar.update(self._task, total=self._total)

    def step(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        else:
            print(f"[{self._done + 1}/{max(self._total, self._done + 1)}] {text}", file=sys.stderr, flush=True)
        self._done += 1

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; the first ``left`` columns and the last are text, the others numbers."""
    if not has_rich():
        widths = [max(len(str(line[i])) for line in [header, *lines]) for i in range(len(header))]
        print(f"\n{title}")
        for line in [header, *lines]:
            print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    import rich.box
    import rich.console
    import rich.table

    out = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        text = i < left or i == len(header) - 1
        out.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for line in lines:
        out.add_row(*map(str, line))
    console = rich.console.Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 180
    console.print(out)


# metric -> column
FLOORS = {"matmul_ms": "matmul ms", "wire_ms": "wire ms", "x_floor": "x floor"}


#: What the star after a percent means.
OVER_TEXT = "above 100 % of its ceiling: that ceiling was measured too low in this run"


def percent(value: float) -> str:
    """Without the sign; starred where nothing can be so much of a ceiling that was measured right."""
    return f"{value:.0f}" + ("*" if round(value) > 100 else "")


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def timing_table(rows: Sequence[Row], title: str) -> None:
    """Time, bandwidth or rate, percent of ceiling, ratio to ours; one block for each question. The absent go last."""
    lines: list[list[str]] = []
    present = [row for row in rows if row.status != "absent"]
    for question in dict.fromkeys(row.question() for row in present):
        asked = [row for row in present if row.question() == question]
        ok = sorted((row for row in asked if row.p50_ms is not None), key=lambda row: row.p50_ms or 0)
        own = next((row.p50_ms for row in ok if row.who() == "ours"), None)
        for i, row in enumerate([*ok, *(row for row in asked if row.p50_ms is None)]):
            lines.append([row.label() if i == 0 else "", row.who(), *_figures(row, own), _remark(row)])
    header = ["what", "who", "ms", "p20..p80", "GB/s", "TFLOP/s", "% ceiling", "x ours", *FLOORS.values(), "remark"]
    used = [i for i in range(len(header)) if i < 3 or i == len(header) - 1 or any(line[i] for line in lines)]
    table(title, [header[i] for i in used], [[line[i] for i in used] for line in lines], left=2)
    remark_on_percents(rows)
    for provider, op, reason in sorted({(row.who(), row.op, row.reason) for row in rows if row.status == "absent"}):
        print(f"absent: {provider} in {op}: {reason}")


def remark_on_percents(rows: Sequence[Row]) -> None:
    """Printed below a table that stars one of them."""
    if any(row.percent is not None and percent(row.percent).endswith("*") for row in rows):
        print(f"* {OVER_TEXT}")


def _figures(row: Row, own: float | None) -> list[str]:
    if row.p50_ms is None:
        return [""] * (6 + len(FLOORS))
    per_second = 1e3 / row.p50_ms if row.p50_ms else 0.0
    return [
        number(row.p50_ms, 4),
        f"{number(row.p20_ms)}..{number(row.p80_ms)}",
        number(row.bytes * per_second / 1e9) if row.bytes else "",
        number(row.flops * per_second / 1e12) if row.flops else "",
        percent(row.percent) if row.percent is not None else "",
        f"{row.p50_ms / own:.2f}" if own else "",
        *(number(row.metrics.get(name)) for name in FLOORS),
    ]


def _remark(row: Row) -> str:
    if row.status != "ok":
        return f"{row.status}: {row.reason}"
    return ", ".join(
        f"{k} {number(v) if isinstance(v, float) else v}" for k, v in row.metrics.items() if k not in FLOORS
    )
