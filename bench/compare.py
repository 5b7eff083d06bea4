"""``bench compare A B``: two runs or two commits side by side.

A difference within the p20..p80 bands is noise. Ours is judged beside those whose code is the same in both runs, timed
in the same rounds: as much as they became faster or slower, the machine may have made ours. A peer that differs is
marked "machine".
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from .errors import BenchError
from .report import number, table
from .schema import Row, load


class Drift(NamedTuple):
    """How many times slower the machine of B may have been: from the least to the most that was seen."""

    least: float = 1.0
    most: float = 1.0


def is_peer(row: Row) -> bool:
    return not row.provider.startswith("ours")


def verdict(a: Row, b: Row, drift: Drift = Drift()) -> str:  # noqa: B008 (a tuple)
    """What the second says beside the first: "noise" where some ``drift`` makes the two bands overlap."""
    if a.status != b.status:
        return f"{a.status} -> {b.status}"
    if a.p50_ms is None or b.p50_ms is None:
        if a.bytes is not None and a.bytes != b.bytes:
            return "more" if (b.bytes or 0) > a.bytes else "less"
        return "same"
    assert a.p20_ms is not None and a.p80_ms is not None and b.p20_ms is not None and b.p80_ms is not None
    faster, slower = b.p80_ms < a.p20_ms * drift.least, b.p20_ms > a.p80_ms * drift.most
    if not faster and not slower:
        return "noise"
    if is_peer(a) and a.versions.get("torch") == b.versions.get("torch"):
        return "machine"
    return "slower" if slower else "faster"


def drifts(both: list[tuple[Row, Row]]) -> dict[tuple[Any, ...], Drift]:
    """Question -> what its peers say of the machine, and what befell those of the same kind of op elsewhere.

    That is what they typically differ by, or the most that lay between the bands of one: what parts two runs of the
    same code in one place may part ours in another.
    """
    ratios: dict[tuple[Any, ...], list[float]] = {}
    typical: dict[str, list[float]] = {}
    apart: dict[str, float] = {}
    for a, b in both:
        if is_peer(a) and a.p50_ms and b.p50_ms:
            ratio, family = b.p50_ms / a.p50_ms, _family(a)
            ratios.setdefault(a.question(), []).append(ratio)
            typical.setdefault(family, []).append(abs(math.log(ratio)))
            apart[family] = max(apart.get(family, 1.0), _gap(a, b))
    spread = {family: max(math.exp(statistics.median(logs)), apart[family]) for family, logs in typical.items()}
    found = {}
    for question in dict.fromkeys(a.question() for a, _ in both):
        seen, more = [1.0, *ratios.get(question, [])], spread.get(question[0].partition(".")[0], 1.0)
        found[question] = Drift(min(seen) / more, max(seen) * more)
    return found


def _gap(a: Row, b: Row) -> float:
    """By how much the slower of two lies above the faster, band from band; 1 or less where they overlap."""
    assert a.p20_ms and a.p80_ms and b.p20_ms and b.p80_ms
    return max(b.p20_ms / a.p80_ms, a.p20_ms / b.p80_ms)


def _family(row: Row) -> str:
    return row.op.partition(".")[0]


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
        said = verdict(x, y) if is_peer(x) else verdict(x, y, drift[x.question()])
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
