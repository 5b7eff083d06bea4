"""What the pictures of ``bench plot`` have in common: colours, the grid of panels, bars with their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .report import OVER_TEXT, number, percent
from .schema import Row

#: Providers keep their colour and marker in every picture; no two have the same colour.
STYLES = {
    "ours": ("#d62728", "o"),
    "ours-kept": ("#ff9896", "o"),
    "ours-triton": ("#e6842a", "s"),
    "two-steps": ("#f7b6d2", "d"),
    "one after the other": ("#c49c94", "d"),
    "eager": ("#1f77b4", "v"),
    "compile": ("#2ca02c", "^"),
    "copy": ("#7f7f7f", "x"),
    "by-hand": ("#17becf", "<"),
    "by-hand-parts": ("#1b7f8c", "<"),
    "dtensor": ("#9467bd", "D"),
    "megatron": ("#8c564b", "P"),
    "symm-mem": ("#bcbd22", "X"),
    "deepspeed": ("#393b79", "p"),
    "flash-attn": ("#637939", "h"),
    "liger": ("#8c6d31", "*"),
    "quack": ("#843c39", "H"),
    "torch-ring": ("#7b4173", "8"),
    "yunchang": ("#98df8a", "1"),
    "ring-flash-attn": ("#aec7e8", "2"),
    "async-input-mm": ("#dbdb8d", "3"),
    "all-gather": ("#ffbb78", ">"),
    "transformers": ("#c5b0d5", "4"),
    "torch-grouped": ("#9edae5", "+"),
}
#: Ours with a part of it otherwise; anybody else.
OTHERS = {True: ("#eb9394", "o"), False: ("#b0b0b0", ".")}


def style_of(provider: str) -> tuple[str, str]:
    """Colour and marker."""
    return STYLES.get(provider) or OTHERS[provider.startswith("ours")]


def grid(
    rows: Sequence[Row], heights: Sequence[float], across: int = 4, width: float = 4.2, bars: bool = True
) -> tuple[Any, list[Any]]:
    """A figure and its panels, ``heights`` inches high; a line of panels is as high as its highest."""
    import matplotlib.pyplot as plt

    across = min(len(heights), across)
    lines = [max(heights[i : i + across]) for i in range(0, len(heights), across)]
    figure, axes = plt.subplots(
        len(lines),
        across,
        figsize=(width * across, sum(lines)),
        height_ratios=lines,
        squeeze=False,
        layout="constrained",
    )
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(heights) :]:
        axis.set_visible(False)
    newest = max(rows, key=lambda row: row.time)
    commit = newest.commit[:9] or "no commit"
    title = f"{newest.machine}; torch {newest.versions.get('torch', '?')}; {commit}"
    title += "; median, bars p20 to p80" if bars else ""
    if any(is_over(row) for row in rows):
        title += f"\n* {OVER_TEXT}"
    figure.suptitle(title, fontsize=9)
    return figure, flat[: len(heights)]


def is_over(row: Row) -> bool:
    return row.percent is not None and percent(row.percent).endswith("*")


def spread(row: Row, values: Callable[[Row, float], float] = lambda row, ms: ms) -> tuple[float, float, float]:
    """What is drawn of a time, and by how much p20 and p80 lie below and above that."""
    assert row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None
    mid = values(row, row.p50_ms)
    ends = (values(row, row.p20_ms), values(row, row.p80_ms))
    return mid, max(0.0, mid - min(ends)), max(0.0, max(ends) - mid)


def series(
    axis: Any, xs: Sequence[float], rows: Sequence[Row], values: Callable[[Row, float], float], provider: str
) -> None:
    """A line with its p20..p80 bars; ``values`` maps a time in ms to what is drawn. A star: above its ceiling."""
    color, marker = style_of(provider)
    mid, below, above = (list(column) for column in zip(*(spread(row, values) for row in rows), strict=True))
    axis.errorbar(xs, mid, yerr=[below, above], label=provider, color=color, marker=marker, capsize=2, linewidth=1.2)
    for x, y, row in zip(xs, mid, rows, strict=True):
        if is_over(row):
            axis.annotate("*", (x, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)


def times(axis: Any, rows: Sequence[Row], floors: Mapping[str, float]) -> None:
    """A horizontal bar a provider, the fastest first, its time and its percent of the ceiling beside it."""
    if not rows:  # the floors alone
        return
    ordered = sorted(rows, key=lambda row: row.p50_ms or 0.0)
    mid, below, above = (list(column) for column in zip(*map(spread, ordered), strict=True))
    places, colors = range(len(ordered)), [style_of(row.provider)[0] for row in ordered]
    axis.barh(places, mid, 0.7, xerr=[below, above], color=colors, error_kw={"lw": 0.8})
    for place, row, middle, more in zip(places, ordered, mid, above, strict=True):
        text = number(middle) + (f" ({percent(row.percent)} %)" if row.percent is not None else "")
        axis.annotate(text, (middle + more, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(places, [row.who() for row in ordered], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    axis.tick_params(axis="x", labelsize=7)
    told = ["ms"]
    for (name, value), (style, word) in zip(floors.items(), (("--", "dashed"), (":", "dotted")), strict=False):
        axis.axvline(value, color="black", linestyle=style, linewidth=1)
        told.append(f"{word}: {name}")
    axis.set_xlabel("; ".join(told), fontsize=7)


def groups(
    axis: Any,
    rows: Sequence[Row],
    group_of: Callable[[Row], str],
    values: Callable[[Row, float], float],
    providers: Sequence[str],
) -> None:
    """Upright bars: a group a question, in it a bar a provider. A star: above its ceiling."""
    names = list(dict.fromkeys(map(group_of, rows)))
    width = 0.8 / len(providers)
    for nth, who in enumerate(providers):
        own = [row for row in rows if row.provider == who]
        places = [names.index(group_of(row)) + (nth - (len(providers) - 1) / 2) * width for row in own]
        mid, below, above = (list(column) for column in zip(*(spread(row, values) for row in own), strict=True))
        color = style_of(who)[0]
        axis.bar(places, mid, 0.92 * width, yerr=[below, above], color=color, label=who, error_kw={"lw": 0.8})
        for place, top, more, row in zip(places, mid, above, own, strict=True):
            text = number(top) + ("*" if is_over(row) else "")
            offset = {"xytext": (0, 1), "textcoords": "offset points"}
            axis.annotate(text, (place, top + more), ha="center", va="bottom", fontsize=6, rotation=90, **offset)
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.tick_params(axis="y", labelsize=7)
    axis.margins(y=0.4)
    axis.set_ylim(bottom=0)


def powers_of_two(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    axis.minorticks_off()


def by_panel(rows: Sequence[Row], panel_of: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Panel -> its rows, in the order in which they come."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(panel_of(row), []).append(row)
    return found


def size_of(row: Row) -> str:
    return "x".join(map(str, row.shape))
