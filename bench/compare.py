"""``bench compare A B``: two runs or two commits side by side.

A difference within the p20..p80 bands is noise. Ours is judged relative to the peers of the same rounds, whose code is
the same in both runs: where they became slower, the machine did. A peer that differs is marked "machine".
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .errors import BenchError
from .report import number, table
from .schema import Row, load


def verdict(a: Row, b: Row, drift: float = 1.0) -> str:
    """What the second says beside the first, once ``drift``, how much slower B's whole machine was, is taken out."""
    if a.status != b.status:
        return f"{a.status} -> {b.status}"
    if a.p50_ms is None or b.p50_ms is None:
        if a.bytes is not None and a.bytes != b.bytes:
            return "more" if (b.bytes or 0) > a.bytes else "less"
        return "same"
    assert a.p20_ms is not None and a.p80_ms is not None and b.p20_ms is not None and b.p80_ms is not None
    if a.p20_ms <= b.p80_ms / drift and b.p20_ms / drift <= a.p80_ms:  # the bands overlap
        return "noise"
    if not a.provider.startswith("ours") and a.versions.get("torch") == b.versions.get("torch"):
        return "machine"
    return "slower" if b.p50_ms / drift > a.p50_ms else "faster"


def drifts(both: list[tuple[Row, Row]]) -> dict[tuple[Any, ...], float]:
    """Question -> the median of B / A over those whose code did not change: the peers, timed in the same rounds."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for a, b in both:
        if not a.provider.startswith("ours") and a.p50_ms and b.p50_ms:
            found.setdefault(a.question(), []).append(b.p50_ms / a.p50_ms)
    return {question: statistics.median(ratios) for question, ratios in found.items()}


def pairs(a: list[Row], b: list[Row]) -> list[tuple[Row, Row]]:
    second = {row.key(): row for row in b}
    return [(row, second[row.key()]) for row in a if row.key() in second]


def run(first: Path, second: Path) -> int:
    """Prints the table; returns how many rows differ beyond noise.

    Raises:
        BenchError: nothing in common.
    """
    a, b = load(first), load(second)
    both = pairs(a, b)
    if not both:
        raise BenchError(f"{first} and {second} have no measurement in common: run the same command for both")
    lines, drift = [], drifts(both)
    for x, y in both:
        said = verdict(x, y, drift.get(x.question(), 1.0) if x.provider.startswith("ours") else 1.0)
        if x.p50_ms is not None and y.p50_ms is not None:
            figures = [number(x.p50_ms, 4), number(y.p50_ms, 4), f"{y.p50_ms / x.p50_ms:.2f}" if x.p50_ms else ""]
        elif x.bytes is not None and y.bytes is not None and x.op.startswith("memory"):
            figures = [f"{x.bytes:,}", f"{y.bytes:,}", f"{y.bytes / x.bytes:.2f}" if x.bytes else ""]
        elif said == "same":
            continue
        else:
            figures = ["", "", ""]
        lines.append([x.label(), x.who(), *figures, said])
    title = f"A {_name(a, first)}   B {_name(b, second)}"
    table(title, ["what", "who", "A ms or bytes", "B", "B/A", ""], lines, left=2)
    for name, rows, others in (("A", a, b), ("B", b, a)):
        missing = len({row.key() for row in rows} - {row.key() for row in others})
        if missing:
            print(f"only in {name}: {missing} rows")
    if a[0].machine != b[0].machine:
        print(f"different machines: {a[0].machine} and {b[0].machine}")
    differing = [line for line in lines if line[-1] not in ("noise", "same", "machine")]
    print(f"{len(differing)} of {len(lines)} differ by more than noise")
    return len(differing)


def _name(rows: list[Row], path: Path) -> str:
    row = max(rows, key=lambda row: row.time)
    return f"{path.name} ({row.commit[:9] or 'no commit'}{'+' if row.commit.endswith('-modified') else ''} {row.time})"
