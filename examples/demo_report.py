"""The report of the demo: two tables, a picture, and the numbers as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from demo import Comparison
    from demo_run import Job

INK, GREY, PALE = "#1b1f24", "#8b949e", "#d0d7de"
ONE, MANY = "#9ec5f4", "#d1495b"  # unsharded: wide and light; sharded: thin, on top of it
MIB = 2**20


def shown_steps(count: int) -> list[int]:
    """About ten steps, the first and the last among them."""
    return sorted({round(i * (count - 1) / 9) for i in range(10)})


def losses_table(results: Sequence["Comparison"]) -> Table:
    table = Table(title="Loss, step by step", title_justify="left")
    table.add_column("step", justify="right")
    for result in results:
        table.add_column(f"{result.model}\n1 process", justify="right")
        table.add_column(f"\n{result.ranks} ranks", justify="right")
        table.add_column("\ndifference", justify="right")
    for step in shown_steps(len(results[0].losses)):
        cells = [str(step)]
        for result in results:
            cells += [f"{result.losses[step]:.6f}", f"{result.sharded_losses[step]:.6f}"]
            cells.append(f"{result.loss_differences[step]:.1e}")
        table.add_row(*cells)
    return table


def verdict(value: float, limit: float) -> str:
    colour, word = ("green", "within") if value <= limit else ("bold red", "BEYOND")
    return f"{value:.1e}  [{colour}]{word} {limit:.1e}[/]"


def summary_table(results: Sequence["Comparison"], loss_limit: float) -> Table:
    table = Table(title="The two runs compared", title_justify="left", show_lines=True)
    table.add_column("")
    for result in results:
        table.add_column(f"{result.model}, {result.parameters / 1e6:.1f} M parameters", overflow="fold")

    def row(what: str, cells: Sequence[str]) -> None:
        table.add_row(what, *cells)

    row(
        "largest loss difference\nover all steps, relative",
        [verdict(result.largest_loss_difference, loss_limit) for result in results],
    )
    row(
        "largest gradient difference\nat step 0, relative to its tensor",
        [f"{verdict(r.gradient_difference, r.gradient_limit)}\n[dim]{r.gradient_tensor}[/]" for r in results],
    )
    row(
        "dropout off, both runs against\nplain Hugging Face in fp64",
        [
            f"loss {verdict(r.plain_loss_difference, loss_limit)}\n"
            f"gradient {verdict(r.plain_gradient_difference, r.gradient_limit)}"
            for r in results
        ],
    )
    row(
        "activations kept for backward\nper rank",
        [
            f"{r.activation_bytes / MIB:.1f} MiB in 1 process\n{max(r.sharded_activation_bytes) / MIB:.1f} MiB on each "
            f"of {r.ranks}: [bold]{max(r.sharded_activation_bytes) / r.activation_bytes:.2f}x[/]"
            for r in results
        ],
    )
    row(
        "step time, median",
        [f"{r.step_ms:.0f} ms in 1 process\n{r.sharded_step_ms:.0f} ms on {r.ranks} ranks" for r in results],
    )
    return table


def show(
    console: Console,
    results: Sequence["Comparison"],
    loss_limit: float,
    job: "Job",
    files: Sequence[Path],
    seconds: float,
) -> None:
    """Prints the tables, what they mean, where the files are, and what failed."""
    console.print()
    console.print(losses_table(results))
    console.print(summary_table(results, loss_limit))
    console.print(
        "Gradient limit: twice the largest error that the plain fp32 model's gradients show against the same model in "
        "fp64, since two runs that each stay within that error differ by at most twice as much."
    )
    if job.device == "cpu":
        console.print(
            "Time is not the point here: the ranks share this machine's cores, the single process has all of them, and "
            "every byte between ranks is copied through the loopback device. Memory and agreement are."
        )
    for path in files:
        console.print(f"[bold]{path}[/]", soft_wrap=True)
    failures = [failure for result in results for failure in result.failures]
    for failure in failures:
        console.print(f"[bold red]FAILED[/] {failure}", soft_wrap=True)
    if not failures:
        console.print(f"[bold green]The runs agree.[/] {seconds:.0f} s")


def write_numbers(
    results: Sequence["Comparison"], job: dict[str, Any], explanations: dict[str, str], folder: Path
) -> list[Path]:
    """``demo.json`` (every number) and ``explain.txt`` (how each module runs)."""
    facts = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": torch.get_num_threads(), **job}
    numbers = folder / "demo.json"
    numbers.write_text(json.dumps({"run": facts, "models": [asdict(result) for result in results]}, indent=1) + "\n")
    explained = folder / "explain.txt"
    explained.write_text("\n".join(f"{name}\n\n{table}\n" for name, table in explanations.items()), encoding="utf-8")
    return [numbers, explained]


def style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=GREY, labelsize=8.5)


def draw_losses(axes: Any, strip: Any, result: "Comparison", loss_limit: float) -> None:
    steps = range(len(result.losses))
    axes.plot(steps, result.losses, color=ONE, linewidth=6, solid_capstyle="round", label="1 process")
    axes.plot(steps, result.sharded_losses, color=MANY, linewidth=1.4, label=f"{result.ranks} ranks, sequence-parallel")
    axes.set_title(
        f"{result.model}-shaped, {result.parameters / 1e6:.1f} M parameters", loc="left", fontsize=11, color=INK
    )
    axes.set_ylabel("loss", color=GREY, fontsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.tick_params(labelbottom=False)
    floor = loss_limit * 1e-4
    strip.semilogy(steps, [max(d, floor) for d in result.loss_differences], ".", color=MANY, markersize=4)
    strip.axhline(loss_limit, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    strip.text(len(result.losses) - 1, loss_limit * 1.6, "limit", ha="right", va="bottom", fontsize=8, color=GREY)
    strip.set_ylim(floor / 3, loss_limit * 30)
    strip.set_yticks([floor, 1e-7, loss_limit], ["0", "1e-7", f"{loss_limit:.0e}".replace("e-0", "e-")])
    strip.minorticks_off()
    strip.set_ylabel("relative\ndifference", color=GREY, fontsize=8)
    strip.set_xlabel("step", color=GREY, fontsize=9)


def draw_memory(axes: Any, result: "Comparison") -> None:
    sizes = [result.activation_bytes, *result.sharded_activation_bytes]
    labels = ["1 process", *(f"rank {rank}" for rank in range(result.ranks))]
    values = [size / MIB for size in sizes]
    bars = axes.barh(labels, values, color=[ONE] + [MANY] * result.ranks, height=0.66)
    for bar, size, value in zip(bars, sizes, values, strict=True):
        share = "" if size == sizes[0] else f"  ({size / sizes[0]:.2f}x)"
        axes.text(
            value, bar.get_y() + bar.get_height() / 2, f" {value:.1f} MiB{share}", va="center", fontsize=9, color=INK
        )
    ideal = values[0] / result.ranks
    axes.axvline(ideal, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(ideal, len(sizes) - 0.42, f" 1/{result.ranks} of the unsharded run", fontsize=8, color=GREY, va="center")
    axes.set_ylim(len(sizes) - 0.25, -0.5)
    axes.set_xlim(0, values[0] * 1.32)
    axes.set_title("Activations kept for backward", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("MiB per rank", color=GREY, fontsize=9)
    axes.tick_params(axis="y", length=0, colors=INK)


def draw(results: Sequence["Comparison"], loss_limit: float, path: Path) -> Path:
    """Loss curves on top of each other, their difference under them, activation memory side by side."""
    figure = plt.figure(figsize=(11, 3.6 * len(results) + 0.5), layout="constrained", facecolor="white")
    figure.suptitle(
        f"Same model, same text, same dropout masks: one process and {results[0].ranks} sequence-parallel ranks",
        fontsize=13,
        color=INK,
        x=0.02,
        ha="left",
    )
    rows = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for part, result in zip(rows, results, strict=True):
        grid = part.add_gridspec(2, 2, width_ratios=(1.55, 1), height_ratios=(2.6, 1))
        axes = part.add_subplot(grid[0, 0])
        strip = part.add_subplot(grid[1, 0], sharex=axes)
        memory = part.add_subplot(grid[:, 1])
        draw_losses(axes, strip, result, loss_limit)
        draw_memory(memory, result)
        for each in (axes, strip, memory):
            style(each)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
