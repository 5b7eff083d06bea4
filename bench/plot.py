"""``bench plot DIR``: pictures from the saved files alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import BenchError
from .schema import Row, load, write_atomically

# Providers keep their colour and marker in every picture.
STYLES = {
    "ours": ("#d62728", "o"),
    "ours-triton": ("#e6842a", "s"),
    "eager": ("#1f77b4", "v"),
    "compile": ("#2ca02c", "^"),
    "copy": ("#7f7f7f", "x"),
    "by-hand": ("#17becf", "<"),
    "ours-kept": ("#ff9896", "o"),
    "dtensor": ("#9467bd", "D"),
    "megatron": ("#8c564b", "P"),
}


def run(folder: Path) -> list[Path]:
    """Draws what the rows allow; returns the files written.

    Raises:
        BenchError: nothing to draw, or matplotlib is missing.
    """
    rows = [row for row in load(folder) if row.status == "ok"]
    try:
        import matplotlib
    except ImportError:
        raise BenchError("plot needs matplotlib: pip install 'seqpar-kernels[bench]'") from None
    matplotlib.use("Agg")
    target = folder if folder.is_dir() else folder.parent
    pictures = {"norm": draw_norm, "linear": draw_linear, "memory": draw_memory}
    written = []
    for name, draw in pictures.items():
        chosen = [row for row in rows if row.op.startswith(f"{name}.") and _can_be_drawn(row)]
        if chosen:
            written.append(_save(draw(chosen), target / f"{name}.png"))
    balanced = [row for row in rows if _is_balanced(row)]
    if balanced:
        written.append(_save(draw_overview(balanced), target / "overview.png"))
    if not written:
        raise BenchError(f"{folder}: no norm, linear or memory rows to draw: measure with --save {folder}")
    return written


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _can_be_drawn(row: Row) -> bool:
    """Whether it has what its picture shows: a file need not be of this version of the benchmarks."""
    kind = row.family
    if kind == "memory":
        return _is_number(row.metrics.get("sbh_over_t"))
    if kind == "norm":
        return bool(row.p50_ms and row.bytes) and len(row.shape) == 2
    return bool(row.p50_ms) and _is_number(row.params.get("chunks", 1))


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


def _grid(rows: Sequence[Row], panels: Sequence[Any]) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.2 * across, 3.4 * down), squeeze=False, layout="constrained")
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(panels) :]:
        axis.set_visible(False)
    newest = max(rows, key=lambda row: row.time)
    bars = "" if newest.op.startswith("memory") else "; median, bars p20 to p80"
    commit = newest.commit[:9] or "no commit"
    figure.suptitle(f"{newest.machine}; torch {newest.versions.get('torch', '?')}; {commit}{bars}", fontsize=9)
    return figure, flat


def _series(axis: Any, xs: Sequence[float], rows: Sequence[Row], values: Any, provider: str) -> None:
    """A line with its p20..p80 bars; ``values`` maps a time in ms to what is drawn."""
    color, marker = STYLES.get(provider, (None, "."))
    mid = [values(row, row.p50_ms) for row in rows]
    ends = [[values(row, row.p20_ms), values(row, row.p80_ms)] for row in rows]
    below = [max(0.0, m - min(e)) for m, e in zip(mid, ends, strict=True)]
    above = [max(0.0, max(e) - m) for m, e in zip(mid, ends, strict=True)]
    axis.errorbar(xs, mid, yerr=[below, above], label=provider, color=color, marker=marker, capsize=2, linewidth=1.2)


def _powers_of_two(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    axis.minorticks_off()


def _norm_panel(row: Row) -> tuple[Any, ...]:
    return row.op, row.direction, row.dtype, str(row.params.get("p")), row.shape[0], row.device


def draw_norm(rows: Sequence[Row]) -> Any:
    """Bandwidth against hidden size, the measured copy bandwidth drawn in."""
    panels = list(dict.fromkeys(map(_norm_panel, rows)))
    figure, axes = _grid(rows, panels)
    for axis, panel in zip(axes, panels, strict=False):
        inside = [row for row in rows if _norm_panel(row) == panel]
        for provider in dict.fromkeys(row.provider for row in inside):
            own = sorted((row for row in inside if row.provider == provider), key=lambda row: row.shape[1])
            _series(axis, [r.shape[1] for r in own], own, lambda r, ms: r.bytes / ms / 1e6, provider)
        ceilings = [row.bytes / row.p50_ms / 1e6 / row.percent * 100 for row in inside if row.percent]
        if ceilings:
            axis.axhline(max(ceilings), color="black", linestyle=":", linewidth=1, label="copy, large")
        op, direction, dtype, p, n, _ = panel
        axis.set_title(f"{op.removeprefix('norm.')} {direction} {dtype} p={p} rows={n}", fontsize=8)
        _powers_of_two(axis, sorted({row.shape[1] for row in inside}))
        axis.set(xlabel="hidden size", ylabel="GB/s")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    return figure


def draw_linear(rows: Sequence[Row]) -> Any:
    """Time against chunk count, with the matmul and wire floors, and everybody who has no chunks as a line."""
    panels = list(dict.fromkeys(row.question() for row in rows))
    figure, axes = _grid(rows, panels)
    for axis, question in zip(axes, panels, strict=False):
        inside = [row for row in rows if row.question() == question]
        chunked = sorted((row for row in inside if "chunks" in row.params), key=lambda row: row.params["chunks"])
        if chunked:
            _series(axis, [row.params["chunks"] for row in chunked], chunked, lambda r, ms: ms, "ours")
        for row in inside:
            if "chunks" not in row.params and row.provider not in ("matmul", "ours"):
                axis.axhline(row.p50_ms, color=STYLES.get(row.provider, (None,))[0], label=row.provider, linewidth=1.2)
            elif row.provider == "ours" and _is_number(row.metrics.get("chunks")):
                axis.plot(row.metrics["chunks"], row.p50_ms, "*", color="black", label="ours, as planned")
        floors = next((row.metrics for row in inside if "wire_ms" in row.metrics), {})
        for name, style in (("matmul_ms", "--"), ("wire_ms", ":")):
            if _is_number(floors.get(name)):
                axis.axhline(floors[name], color="black", linestyle=style, linewidth=1, label=f"floor: {name[:-3]}")
        row = inside[0]
        link = row.params.get("link", "")
        title = f"{row.op.removeprefix('linear.')} {row.direction}\n{'x'.join(map(str, row.shape))} {row.dtype}"
        axis.set_title(f"{title} {row.ranks} ranks, {link}", fontsize=8)
        axis.set(xlabel="chunks a shard", ylabel="ms")
        _powers_of_two(axis, [row.params["chunks"] for row in chunked])
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    return figure


def draw_overview(rows: Sequence[Row]) -> Any:
    """Bars for ours and its peers over the time of the matmul alone: the picture of the README."""
    import matplotlib.pyplot as plt

    newest = max(rows, key=lambda row: row.time)
    rows = [row for row in rows if row.shape == newest.shape and row.dtype == newest.dtype]
    calls = list(dict.fromkeys((row.op, row.direction) for row in rows))
    alone = {(r.op, r.direction): r.p50_ms for r in rows if r.provider == "matmul"}
    providers = [who for who in ("ours", "megatron", "dtensor", "by-hand") if any(r.provider == who for r in rows)]
    figure, axis = plt.subplots(figsize=(8.4, 3.2), layout="constrained")
    width = 0.8 / len(providers)
    for nth, who in enumerate(providers):
        times = {(r.op, r.direction): r.p50_ms for r in rows if r.provider == who}
        heights = [(times.get(call) or 0.0) / (alone.get(call) or 1.0) for call in calls]
        places = [group + (nth - (len(providers) - 1) / 2) * width for group in range(len(calls))]
        bars = axis.bar(places, heights, 0.92 * width, label=who, color=STYLES[who][0])
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axis.axhline(1.0, color="black", linestyle="--", linewidth=1, label="matmul alone")
    names = [f"{op.removeprefix('linear.')}\n{direction}" for op, direction in calls]
    axis.set_xticks(range(len(calls)), names, fontsize=8)
    axis.set_ylabel("time / matmul alone")
    shape = " x ".join(map(str, newest.shape))
    axis.set_title(
        f"Matmul with its collective, {shape} {newest.dtype}, 2 ranks, wire time = matmul time ({newest.machine})",
        fontsize=9,
    )
    axis.margins(y=0.12)
    axis.legend(fontsize=7, ncols=len(providers) + 1, loc="upper left", frameon=False)
    axis.set_ylim(top=1.12 * axis.get_ylim()[1])
    return figure


def draw_memory(rows: Sequence[Row]) -> Any:
    """Bytes of a layer in units of sbh/t."""
    panels = list(dict.fromkeys((row.op, tuple(row.shape), row.dtype) for row in rows))
    figure, axes = _grid(rows, panels)
    for axis, (op, shape, dtype) in zip(axes, panels, strict=False):
        inside = [row for row in rows if (row.op, tuple(row.shape), row.dtype) == (op, shape, dtype)]
        names = [f"{row.provider}\n{row.ranks} rank{'s' if row.ranks > 1 else ''}" for row in inside]
        colors = ["#d62728" if row.provider.startswith("ours") else "#b0b0b0" for row in inside]
        bars = axis.barh(names, [row.metrics["sbh_over_t"] for row in inside], color=colors)
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.tick_params(axis="y", labelsize=6)
        axis.set_title(f"{op.removeprefix('memory.')} s,b,h,a={','.join(map(str, shape))} {dtype}", fontsize=8)
        axis.set_xlabel("bytes kept for a layer, in sbh/t")
    return figure
