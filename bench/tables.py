"""``bench tables``: the tables of docs/benchmarks.md, written from the committed results alone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError, NotHere
from .place import of_checkout
from .report import OVER_TEXT, number, percent
from .schema import Row, load, write_atomically

if TYPE_CHECKING:
    import argparse

TEXT = "the tables of docs/benchmarks.md from the committed results"
PAGE = ("docs", "benchmarks.md")
RESULTS = ("bench", "results")
BEGIN, END = "<!-- python -m bench tables: begin -->", "<!-- python -m bench tables: end -->"
FLOORS = ("copy", "matmul", "unsharded")  # what nobody can beat, or what the ranks share, is no competitor
MOST_LOSSES = 4  # named one by one in a family


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", type=Path, help="default: docs/benchmarks.md of this checkout")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: bench/results of this checkout")


def run_command(args: argparse.Namespace) -> int:
    page, results = args.file or of_checkout(*PAGE), args.results or of_checkout(*RESULTS)
    if page is None or results is None:
        raise NotHere(
            f"tables: {'/'.join(PAGE)} and the rows in {'/'.join(RESULTS)} belong to a checkout and are not installed: "
            "run python -m bench tables there, or name a page with --file and rows with --results"
        )
    print(f"{page}: {'written' if run(page, results) else 'up to date'}")
    return 0


def run(page: Path, results: Path) -> bool:
    """Writes the section; returns whether the file changed.

    Raises:
        BenchError: no results, or no place for them in the file.
    """
    try:
        before = page.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{page}: cannot be read ({error.strerror}): name a page with --file") from None
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{page}: lacks the lines {BEGIN} and {END}: put them where the figures belong")
    after = f"{head}{BEGIN}\n\n{section(results)}\n{END}{tail}"
    if after == before:
        return False
    try:
        write_atomically(page, after)
    except OSError as error:
        raise BenchError(f"{page}: cannot be written ({error.strerror})") from None
    return True


def section(results: Path) -> str:
    """One chapter a machine, GPUs and CPUs as they come.

    Raises:
        BenchError: no folder with results.
    """
    folders = sorted(path for path in results.glob("*") if path.is_dir()) if results.is_dir() else []
    if not folders:
        raise BenchError(f"{results}: no folder of results: measure with --save {results}/NAME")
    text = "\n".join(chapter(folder.name, load(folder)) for folder in folders)
    if not any(row.device == "cuda" for folder in folders for row in load(folder)):
        text += "\nNothing here was measured on a GPU: no figure for one exists yet.\n"
    return text


def chapter(name: str, rows: Sequence[Row]) -> str:
    newest = max(rows, key=lambda row: row.time)
    days = sorted({row.time[:10] for row in rows if row.time}) or ["undated"]
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = ", ".join(dict.fromkeys(row.commit[:9] for row in rows if row.commit))
    intro = (
        f"**{newest.machine}**, torch {newest.versions.get('torch', '?')}, {span}, commit {commits or 'unknown'}; rows "
        f"with versions, p20 and p80 in `bench/results/{name}/`. Median ms; the fastest in bold; in brackets percent "
        "of the ceiling of the same run: of the best memory bandwidth that copies and reads showed for norms, of the "
        "slower of matmul and wire for linears, of the linears and attention alone for layers. *copy* (one tensor "
        "read, one written) and *matmul* (alone, everything at hand) are floors. *by-hand* is one collective and one "
        "matmul, one after the other, *by-hand-parts* the same with each part of a sum sent to its owner, since gloo's "
        "reduce-scatter sends twice the bytes; *ours-kept* keeps the gathered input, like DTensor, which saves an "
        "exchange and costs memory."
    )
    text = [textwrap.fill(intro, 118, break_on_hyphens=False) + "\n"]
    for write in (norm, linear, attention, moe, layer, memory, host):
        text += write(rows)
    return "\n".join([*text, *losses(rows), *absent(rows)])


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = "|" + "---|" * len(header)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""]


def _timed(rows: Sequence[Row], prefix: str) -> list[Row]:
    """Chunk counts set by hand stay out: what is shown is what the planner does."""
    return [r for r in rows if r.op.startswith(prefix) and r.p50_ms is not None and "chunks" not in r.params]


def _comparison(rows: Sequence[Row], label: Callable[[Row], str], scale: float = 1.0) -> list[str]:
    """One line a question, one column a provider, ours first and floors last."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    order = {who: (who in FLOORS, not who.startswith("ours")) for who in providers}
    providers.sort(key=lambda who: order[who])
    lines, over = [], False
    for question in dict.fromkeys(row.question() for row in rows):
        asked = {row.provider: row for row in rows if row.question() == question}
        competing = [row.p50_ms or 0.0 for who, row in asked.items() if who not in FLOORS]
        if not competing:
            continue
        cells = []
        for who in providers:
            row = asked.get(who)
            if row is None or row.p50_ms is None:
                cells.append("")
                continue
            text = number(scale * row.p50_ms)
            text = f"**{text}**" if who not in FLOORS and row.p50_ms == min(competing) else text
            share = f" ({percent(row.percent)} %)" if who == "ours" and row.percent is not None else ""
            over |= "*" in share
            cells.append(text + share.replace("*", "\\*"))
        lines.append([label(next(iter(asked.values()))), *cells])
    return [*_table(["", *providers], lines), *([f"\\* {OVER_TEXT}.\n"] if over else [])]


def _values(rows: Sequence[Row], pick: Callable[[Row], object]) -> str:
    return " ".join(dict.fromkeys(str(pick(row)) for row in rows))


def _commands(rows: Sequence[Row]) -> str:
    """What was typed for these rows."""
    typed = dict.fromkeys(row.command or f"python -m bench {row.family}" for row in rows)
    return " and ".join(f"`{command}`" for command in typed)


def norm(rows: Sequence[Row]) -> list[str]:
    found = _timed(rows, "norm.")
    if not found:
        return []
    several = len({tuple(row.shape) for row in found}) > 1

    def label(row: Row) -> str:
        size = f" {row.shape[0]} x {row.shape[1]}" if several else ""
        return f"{row.op.removeprefix('norm.')} {row.dtype} p={row.params['p']}{size} {row.direction}"

    s, h = found[0].shape
    where = "" if several else f", {s} x {h}"
    return [f"Dropout + residual + norm{where}, {_commands(found)}:\n", *_comparison(found, label)]


def linear(rows: Sequence[Row]) -> list[str]:
    """A table for each size and number of ranks; below the size floor last."""
    found = _timed(rows, "linear.")
    settings = dict.fromkeys((_small(row), row.ranks, *row.shape) for row in found)
    links = [row for row in rows if row.op == "ceiling.link"]
    return [
        line
        for setting in sorted(settings)
        for line in _linear([row for row in found if (_small(row), row.ranks, *row.shape) == setting], links)
    ]


def _small(row: Row) -> bool:
    return "small" in row.params.get("link", "")


def _linear(found: Sequence[Row], ceilings: Sequence[Row]) -> list[str]:
    links = [
        link for link in dict.fromkeys(row.params.get("link", "") for row in found) if ":" in link or "bit" in link
    ]
    ranks = found[0].ranks
    size = " x ".join(map(str, found[0].shape))
    text = f"Matmul with its collective, {ranks} ranks of one thread each, sequence x hidden x inner = {size}, "
    text += _commands(found)
    if links:
        bursts = {row.metrics.get("burst") for row in ceilings if row.ranks == ranks and row.params["link"] in links}
        text += (
            " (as root; `ratio:R`: a link shaped so that the wire takes R times as long as the matmul; token buckets "
        )
        text += f"of {', '.join(sorted(filter(None, bursts)))}; the wire's time is its bytes over that rate, and ours "
        text += "has measured the link once, by `tune`)"
    elif _small(found[0]):
        text += ", below the size floor: nothing is cut"
    return [
        f"{text}:\n",
        *_comparison(found, lambda row: f"{row.op.removeprefix('linear.')} {row.direction}, {row.params.get('link')}"),
    ]


def attention(rows: Sequence[Row]) -> list[str]:
    """A table for each question of several ranks."""
    text = "Causal attention over a sequence that ranks share, sequence x heads x key heads x head_dim ="
    return _shared(_timed(rows, "attention."), text, "ideal", "1/t of unsharded SDPA")


def moe(rows: Sequence[Row]) -> list[str]:
    """A table for each question of several ranks."""
    text = "A mixture's experts on tokens that ranks share, tokens x experts x experts of a token x hidden x inner ="
    return _shared(_timed(rows, "moe."), text, "floor", "the slower of 1/t of all tokens on one rank and its wire")


def _shared(found: Sequence[Row], text: str, measure: str, meaning: str) -> list[str]:
    """One line a provider, forward and both: times, over the ``measure``, and what a rank sends and keeps."""
    lines: list[str] = []
    both = [row for row in found if row.direction == "fwd+bwd"]
    for question in dict.fromkeys(row.question() for row in both):
        asked = sorted((row for row in both if row.question() == question), key=lambda row: row.p50_ms or 0.0)
        first = asked[0]
        options = ", ".join(f"{name} {value}" for name, value in first.params.items())
        head = f"{text} {' x '.join(map(str, first.shape))}, {first.dtype}, {first.ranks} ranks, {options}, "
        head += f"{_commands(asked)} (x {measure}: {meaning}; bytes of the busiest rank)"
        cells = [[*_shared_cells(row, found, measure)] for row in asked]
        header = ["", "fwd ms", "fwd+bwd ms", f"x {measure}", "sent MiB", "kept MiB", "peak MiB"]
        lines += [f"{head}:\n", *_table(header, cells)]
    return lines


def _shared_cells(row: Row, found: Sequence[Row], measure: str) -> list[str]:
    forward = [r for r in found if r.direction == "fwd" and r.provider == row.provider and _same_place(r, row)]

    def mebibytes(size: float | None) -> str:
        return "" if size is None else f"{size / 2**20:.1f}"

    return [
        f"**{row.provider}**" if row.provider == "ours" else row.provider,
        number(forward[0].p50_ms) if forward else "",
        number(row.p50_ms),
        f"{row.metrics[f'x_{measure}']:.2f}" if f"x_{measure}" in row.metrics else "",
        mebibytes(row.bytes),
        *(mebibytes(row.metrics.get(name)) for name in ("kept_bytes", "peak_bytes")),
    ]


def _same_place(a: Row, b: Row) -> bool:
    return (a.op, a.shape, a.dtype, a.ranks, a.params) == (b.op, b.shape, b.dtype, b.ranks, b.params)


def layer(rows: Sequence[Row]) -> list[str]:
    """A table for each size, and for each way of having ranks."""
    found = [row for row in _timed(rows, "layer.") if " without " not in row.provider]
    settings = dict.fromkeys((tuple(row.shape), row.params.get("place", "")) for row in found)
    return [
        line
        for shape, place in settings
        for line in _layer([r for r in found if (tuple(r.shape), r.params.get("place", "")) == (shape, place)])
    ]


def _layer(found: Sequence[Row]) -> list[str]:
    def label(row: Row) -> str:
        where = f"{row.ranks} rank{'s' if row.ranks > 1 else ''}"
        return f"{row.op.removeprefix('layer.')} {row.dtype} p={row.params['p']} {where} {row.direction}"

    s, b, h, a = found[0].shape[:4]
    text = f"A transformer layer, sequence {s}, batch {b}, hidden {h}, {a} heads, {_commands(found)}"
    return [f"{text}:\n", *_comparison(found, label)]


def memory(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row.op.startswith("memory.") and row.bytes is not None]
    if not found:
        return []
    ranks = max(row.ranks for row in found)
    lines = [
        [row.op.removeprefix("memory."), row.provider, str(row.ranks), f"{row.bytes or 0:,}", _units(row)]
        for row in found
        if row.ranks == ranks or not row.provider.startswith("ours")
    ]
    s, b, h, a = found[0].shape
    return [
        f"Bytes a rank keeps of one layer for the backward, sequence {s}, batch {b}, hidden {h}, {a} heads, "
        f"{found[0].dtype}, {_commands(found)}:\n",
        *_table(["layer", "who", "ranks", "bytes", "sbh/t"], lines),
    ]


def _units(row: Row) -> str:
    best = row.provider in ("ours", "ours + recompute_activation")
    return f"**{row.metrics['sbh_over_t']:.1f}**" if best else f"{row.metrics['sbh_over_t']:.1f}"


def host(rows: Sequence[Row]) -> list[str]:
    found = _timed(rows, "host.")
    if not found:
        return []

    def label(row: Row) -> str:
        dropout = f" p={row.params['p']}" if "p" in row.params else ""
        return f"{row.op.removeprefix('host.')}{dropout} {row.direction}"

    return [
        f"CPU time of one call on a tiny tensor, in microseconds, {_commands(found)}:\n",
        *_comparison(found, label, 1e3),
    ]


def losses(rows: Sequence[Row]) -> list[str]:
    """Who is faster than ours: one's median lies outside the other's p20..p80. And what of ours was wrong or failed."""
    text = []
    for family in ("norm", "features", "reduce", "linear", "attention", "moe", "layer", "gemm", "host"):
        timed = _timed(rows, f"{family}.")
        found: list[tuple[float, str]] = []
        asked = 0
        for question in dict.fromkeys(row.question() for row in timed):
            answers = [row for row in timed if row.question() == question]
            own = next((row for row in answers if row.provider == "ours"), None)
            peers = [row for row in answers if row.provider not in FLOORS and row.is_peer()]
            if own is None or not peers:
                continue
            asked += 1
            best = min(peers, key=lambda row: row.p50_ms or 0.0)
            assert own.p50_ms is not None and own.p20_ms is not None
            assert best.p50_ms is not None and best.p80_ms is not None
            if own.p20_ms > best.p50_ms or own.p50_ms > best.p80_ms:
                ratio = own.p50_ms / best.p50_ms
                found.append((ratio, f"{own.label().removeprefix(family + '.')} ({ratio:.2f} times {best.provider})"))
        if found:
            worst = "; ".join(line for _, line in sorted(found, reverse=True)[:MOST_LOSSES])
            text.append(f"- {family}: in {len(found)} of {asked} questions; {worst}")
    bad = [row for row in rows if row.provider.startswith("ours") and row.status in ("wrong", "failed")]
    text += [f"- {row.label()}: {row.status}, {row.reason}" for row in bad]
    head = "**Where we lose**, one's median outside the other's p20..p80 (the worst first):\n"
    return [head, *text, ""] if text else []


def absent(rows: Sequence[Row]) -> list[str]:
    """Peers that could not take part, one reason each, and where, if they could elsewhere."""
    found: dict[str, tuple[str, dict[str, None]]] = {}
    present = {(row.provider, row.family) for row in rows if row.status == "ok"}
    for row in rows:
        took_part = (row.provider, row.family) in present
        if row.status == "absent" and row.family != "coverage" and row.is_peer() and not took_part:
            found.setdefault(row.provider, (row.reason, {}))[1][row.family] = None
    elsewhere = {who for who, _ in present}
    missing = [
        f"{who}{' in ' + ' and '.join(families) if who in elsewhere else ''} ({reason})"
        for who, (reason, families) in found.items()
    ]
    return [f"Absent here: {'; '.join(missing)}.\n"] if missing else []
