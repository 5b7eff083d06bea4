"""The pictures of ``bench plot``, each drawn from the rows of one family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figure_parts import by_panel, grid, groups, powers_of_two, series, size_of, style_of, times
from .schema import Row


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def draw_norm(rows: Sequence[Row]) -> Any:
    """Bandwidth against hidden size, the measured copy bandwidth drawn in."""
    panels = by_panel(rows, lambda r: (r.op, r.direction, r.dtype, str(r.params.get("p")), r.shape[0], r.device))
    figure, axes = grid(rows, [3.4] * len(panels))
    for axis, ((op, direction, dtype, p, n, _), inside) in zip(axes, panels.items(), strict=True):
        for provider, own in by_panel(inside, lambda row: row.provider).items():
            own.sort(key=lambda row: row.shape[1])
            series(axis, [r.shape[1] for r in own], own, gigabytes, provider)
        ceiling(axis, inside)
        axis.set_title(f"{op.removeprefix('norm.')} {direction} {dtype} p={p} rows={n}", fontsize=8)
        powers_of_two(axis, sorted({row.shape[1] for row in inside}))
        axis.set(xlabel="hidden size", ylabel="GB/s")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    return figure


def gigabytes(row: Row, ms: float) -> float:
    """1e9 bytes a second."""
    return (row.bytes or 0) / ms / 1e6


def ceiling(axis: Any, rows: Sequence[Row]) -> None:
    """The bandwidth that the percents of these rows are of."""
    rates = [gigabytes(row, row.p50_ms or 1.0) / row.percent * 100 for row in rows if row.percent]
    if rates:
        axis.axhline(max(rates), color="black", linestyle=":", linewidth=1, label="measured ceiling")


def draw_reduce(rows: Sequence[Row]) -> Any:
    """Bandwidth of the sum of partial results, alone and with the norm in the same pass."""

    def group_of(row: Row) -> str:
        what = "sum" if row.op == "reduce" else f"sum + norm\np={row.params.get('p')}"
        return f"{row.shape[0]} shards\n{what}"

    panels = by_panel(rows, lambda row: (row.dtype, *row.shape[1:], row.device))
    figure, axes = grid(rows, [3.6] * len(panels), 2, 6.4)
    for axis, ((dtype, n, hidden, _), inside) in zip(axes, panels.items(), strict=True):
        groups(axis, inside, group_of, gigabytes, list(dict.fromkeys(row.provider for row in inside)))
        ceiling(axis, inside)
        axis.set_title(f"{n} x {hidden} {dtype}", fontsize=8)
        axis.set_ylabel("GB/s", fontsize=8)
        axis.legend(fontsize=6, ncols=5, loc="upper left")
    return figure


def draw_host(rows: Sequence[Row]) -> Any:
    """CPU time of one small call, in microseconds."""

    def group_of(row: Row) -> str:
        dropout = f"\np={row.params['p']}" if "p" in row.params else ""
        return row.op.removeprefix("host.").replace(".", "\n").replace("linear_reduce", "linear_\nreduce") + dropout

    panels = by_panel(rows, lambda row: (row.direction, row.device))
    figure, axes = grid(rows, [3.6] * len(panels), 2, 6.4)
    for axis, ((direction, device), inside) in zip(axes, panels.items(), strict=True):
        providers = list(dict.fromkeys(row.provider for row in inside))
        groups(axis, inside, group_of, lambda row, ms: 1e3 * ms, providers)
        axis.set_title(f"CPU time of a small call on {device} tensors, {direction}", fontsize=8)
        axis.set_ylabel("microseconds", fontsize=8)
        axis.legend(fontsize=6)
    return figure


def draw_linear(rows: Sequence[Row]) -> Any:
    """Each question by chunk count where it was asked for several, else a bar a provider; matmul and wire drawn in."""
    panels = by_panel(rows, Row.question)
    heights = [3.4 if any("chunks" in row.params for row in inside) else 2.2 for inside in panels.values()]
    figure, axes = grid(rows, heights)
    for axis, inside in zip(axes, panels.values(), strict=True):
        found = next((row.metrics for row in inside if "wire_ms" in row.metrics), {})
        floors = {name[:-3]: found[name] for name in ("matmul_ms", "wire_ms") if is_number(found.get(name))}
        measured = [row for row in inside if row.provider not in ("matmul", "messages")]
        if any("chunks" in row.params for row in measured):
            by_chunks(axis, measured, floors)
        else:
            times(axis, measured, floors)
        row = inside[0]
        link = row.params.get("link") or f"paced, ratio {row.params.get('ratio')}"
        title = f"{row.op.partition('.')[2]} {row.direction}\n{size_of(row)} {row.dtype} {row.ranks} ranks, {link}"
        axis.set_title(title, fontsize=8)
    return figure


def by_chunks(axis: Any, rows: Sequence[Row], floors: Mapping[str, float]) -> None:
    """Time against chunk count; everybody who has no chunks as a line."""
    chunked = sorted((row for row in rows if "chunks" in row.params), key=lambda row: row.params["chunks"])
    series(axis, [row.params["chunks"] for row in chunked], chunked, lambda row, ms: ms, "ours")
    for row in rows:
        if "chunks" in row.params:
            continue
        planned = row.metrics.get("chunks") if row.provider == "ours" else None
        if is_number(planned):
            axis.plot(planned, row.p50_ms, "*", color="black", label="ours, as planned")
        elif row.provider == "ours":  # uncut; or virtual ranks, whose rows do not say how it was cut
            axis.axhline(row.p50_ms, color="black", linewidth=0.8, label="ours, as planned")
        else:
            axis.axhline(row.p50_ms, color=style_of(row.provider)[0], label=row.provider, linewidth=1.2)
    for (name, value), style in zip(floors.items(), ("--", ":"), strict=False):
        axis.axhline(value, color="black", linestyle=style, linewidth=1, label=f"floor: {name}")
    axis.set(xlabel="chunks a shard", ylabel="ms")
    powers_of_two(axis, [row.params["chunks"] for row in chunked])
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=6)


def draw_layer(rows: Sequence[Row]) -> Any:
    """A transformer layer: everybody's time, beside that of its linears and attention alone."""
    panels = by_panel(rows, lambda row: (*row.question()[:-2], _place(row)))
    figure, axes = grid(rows, [0.8 + 0.24 * len(inside) for inside in panels.values()], 2, 6.4)
    for axis, inside in zip(axes, panels.values(), strict=True):
        floor = next((row.p50_ms for row in inside if row.provider == "matmul"), None)
        measured = [row for row in inside if row.provider != "matmul"]
        times(axis, measured, {} if floor is None else {"its linears and attention alone": floor})
        row = inside[0]
        s, b, h, a = row.shape
        title = f"{row.op.removeprefix('layer.')} {row.direction}, s={s} b={b} h={h} a={a} {row.dtype}, {_place(row)}"
        axis.set_title(title, fontsize=8)
    return figure


def _place(row: Row) -> str:
    """Virtual ranks are drawn beside the whole layer that they are measured beside."""
    if "place" in row.params:
        return "one device"
    return f"{row.ranks} rank{'s' if row.ranks > 1 else ''}"


def draw_attention(rows: Sequence[Row]) -> Any:
    """Causal attention over a shared sequence: everybody's time, beside unsharded attention divided by the ranks."""
    panels = by_panel(rows, Row.question)
    figure, axes = grid(rows, [0.8 + 0.24 * len(inside) for inside in panels.values()], 2, 6.4)
    for axis, inside in zip(axes, panels.values(), strict=True):
        ideal = next((row.metrics["ideal_ms"] for row in inside if is_number(row.metrics.get("ideal_ms"))), None)
        row = inside[0]
        label = "unsharded" if row.op == "attention.loopback" else "unsharded / ranks"  # virtual ranks share a device
        times(axis, inside, {} if ideal is None else {label: ideal})
        extra = ", ".join(f"{name} {value}" for name, value in row.params.items())
        axis.set_title(f"{row.direction} {size_of(row)} {row.dtype}, {row.ranks} ranks, {extra}", fontsize=8)
    return figure


def draw_moe(rows: Sequence[Row]) -> Any:
    """Experts of a mixture: everybody's time, beside unsharded experts divided by the ranks; grouped matmuls alone."""
    panels = by_panel(rows, Row.question)
    figure, axes = grid(rows, [0.8 + 0.24 * len(inside) for inside in panels.values()], 2, 6.4)
    for axis, inside in zip(axes, panels.values(), strict=True):
        ideal = next((row.metrics["ideal_ms"] for row in inside if is_number(row.metrics.get("ideal_ms"))), None)
        times(axis, inside, {} if ideal is None else {"unsharded / ranks": ideal})
        row = inside[0]
        where = f", {row.ranks} ranks, {row.params.get('link')}" if row.ranks > 1 else ""
        title = f"{row.op.removeprefix('moe.')} {row.direction} {size_of(row)} {row.dtype}{where}"
        axis.set_title(title, fontsize=8)
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
        found = {(r.op, r.direction): r.p50_ms for r in rows if r.provider == who}
        heights = [(found.get(call) or 0.0) / (alone.get(call) or 1.0) for call in calls]
        places = [group + (nth - (len(providers) - 1) / 2) * width for group in range(len(calls))]
        bars = axis.bar(places, heights, 0.92 * width, label=who, color=style_of(who)[0])
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
    """Bytes of a layer in units of sbh/t: a block of bars for each count of ranks."""
    panels = by_panel(rows, lambda row: (row.op, tuple(row.shape), row.dtype))
    lines = [len(inside) + len({row.ranks for row in inside}) for inside in panels.values()]
    figure, axes = grid(rows, [1.0 + 0.22 * count for count in lines], 2, 7.0, bars=False)
    for axis, ((op, shape, dtype), inside) in zip(axes, panels.items(), strict=True):
        place, ticks, names = 0, [], []
        for ranks, block in by_panel(sorted(inside, key=lambda row: row.ranks), lambda row: row.ranks).items():
            values = [row.metrics["sbh_over_t"] for row in block]
            places = list(range(place, place + len(block)))
            bars = axis.barh(places, values, 0.75, color=[_memory_color(row) for row in block])
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=3)
            axis.text(0.99, place - 0.5, f"{ranks} rank{'s' if ranks > 1 else ''}", fontsize=8, ha="right",
                      va="bottom", weight="bold", transform=axis.get_yaxis_transform())  # fmt: skip
            if place:
                axis.axhline(place - 1, color="#d0d0d0", linewidth=0.8)
            ticks, names = ticks + places, names + [row.provider for row in block]
            place += len(block) + 1
        axis.set_yticks(ticks, names, fontsize=8)
        axis.set_ylim(place - 1.2, -1.2)
        axis.margins(x=0.14)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(f"{op.removeprefix('memory.')}, s,b,h,a = {','.join(map(str, shape))}, {dtype}", fontsize=9)
        axis.set_xlabel("bytes kept for a layer, in sbh/t", fontsize=8)
    return figure


def _memory_color(row: Row) -> str:
    """The paper's formula is no measurement: it is paler than those who were measured."""
    if row.provider.startswith("ours"):
        return style_of("ours")[0]
    return "#d9d9d9" if row.provider.startswith("paper") else "#8c8c8c"
