"""``bench compare A B``: two runs or two commits side by side.

A difference within the p20..p80 bands is noise. Runs minutes apart differ by more. The peers' code is the same in both
runs, so a change of theirs is the machine's. "Allowed" is what all peers changed by together at the same question, and
beside it the most by which one peer differed from the others at any question. Differences within it, and those of the
peers, are marked "machine". A link paced to the matmul of its own run (ratio) is another link in another run: such
times are compared in units of their floor.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import BenchError
from .report import number, table
from .schema import Row, load

if TYPE_CHECKING:
    import argparse

TEXT = "two runs side by side, noise marked"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A", help="a file or a folder of --save")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("--fail", action="store_true", help="exit 1 where a difference is more than noise")


def run_command(args: argparse.Namespace) -> int:
    return 1 if run(args.first, args.second) and args.fail else 0


class Drift(NamedTuple):
    """How many times slower the machine of B may have been: from the least to the most that was seen."""

    least: float = 1.0
    most: float = 1.0

    def __str__(self) -> str:
        return f"{self.least:.2f}..{self.most:.2f}" if self.most > self.least else ""


def verdict(a: Row, b: Row, drift: Drift = Drift()) -> str:  # noqa: B008 (a tuple)
    """What the second says beside the first: "noise" where the bands overlap, "machine" where ``drift`` explains it."""
    if a.status != b.status:
        return f"{a.status} -> {b.status}"
    if a.p50_ms is None or b.p50_ms is None:
        if a.bytes is not None and a.bytes != b.bytes:
            return "more" if (b.bytes or 0) > a.bytes else "less"
        return "same"
    assert a.p20_ms is not None and a.p80_ms is not None and b.p20_ms is not None and b.p80_ms is not None
    faster, slower = b.p80_ms < a.p20_ms, b.p20_ms > a.p80_ms
    if not faster and not slower:
        return "noise"
    explained = a.p20_ms * drift.least <= b.p80_ms and b.p20_ms <= a.p80_ms * drift.most
    if _same_code(a, b) or explained:
        return "machine"
    return "slower" if slower else "faster"


def _same_code(a: Row, b: Row) -> bool:
    """Whether nothing of ours is measured, and with the same versions of everything else."""
    shared = (set(a.versions) & set(b.versions)) - {"seqpar_kernels"}  # what else is installed changes nobody
    return a.is_peer() and all(a.versions[name] == b.versions[name] for name in shared)


def drifts(both: list[tuple[Row, Row]]) -> dict[tuple[Any, ...], Drift]:
    """Question -> what its peers, and those of all others, say of the machine."""
    peers: dict[tuple[Any, ...], list[tuple[Row, Row]]] = {}
    for a, b in both:
        if _same_code(a, b) and a.p50_ms and b.p50_ms:
            peers.setdefault(a.question(), []).append((a, b))
    together: dict[tuple[Any, ...], float] = {}
    apart = 1.0
    for question, rows in peers.items():
        together[question] = statistics.median((b.p50_ms or 0.0) / (a.p50_ms or 1.0) for a, b in rows)
        common = together[question] if len(rows) > 2 else 1.0  # of two, who is apart?
        apart = max([apart, *(_gap(a, b, common) for a, b in rows)])
    found = {}
    for a, _ in both:
        shift = together.get(a.question(), 1.0)
        found[a.question()] = Drift(min(1.0, shift) / apart, max(1.0, shift) * apart)
    return found


def _paced_alike(a: Row, b: Row) -> Row:
    """``b``, on a link paced to the matmul of its run as if that had taken what it took in ``a``."""
    floors = [max(row.metrics.get("matmul_ms") or 0.0, row.metrics.get("wire_ms") or 0.0) for row in (a, b)]
    if "ratio" not in str(a.params) or not all(floors) or b.p50_ms is None or b.p20_ms is None or b.p80_ms is None:
        return b
    factor = floors[0] / floors[1]
    return replace(b, p20_ms=factor * b.p20_ms, p50_ms=factor * b.p50_ms, p80_ms=factor * b.p80_ms)


def _gap(a: Row, b: Row, common: float) -> float:
    """By how much the slower lies above the faster, band from band, what is common to all aside; 1: they overlap."""
    assert a.p20_ms and a.p80_ms and b.p20_ms and b.p80_ms
    return max(1.0, b.p20_ms / common / a.p80_ms, a.p20_ms * common / b.p80_ms)


def pairs(a: list[Row], b: list[Row]) -> list[tuple[Row, Row]]:
    second = {row.key(): row for row in b}
    return [(row, _paced_alike(row, second[row.key()])) for row in a if row.key() in second]


def run(first: Path, second: Path) -> int:
    """Prints the table; returns how many rows differ beyond noise, or are of ours and gone.

    Raises:
        BenchError: nothing in common.
    """
    a, b = load(first), load(second)
    both = pairs(a, b)
    if not both:
        raise BenchError(f"{first} and {second} have no measurement in common: run the same command for both")
    lines, drift = [], drifts(both)
    for x, y in both:
        allowed = Drift() if _same_code(x, y) else drift[x.question()]
        said = verdict(x, y, allowed)
        if x.p50_ms is not None and y.p50_ms is not None:
            figures = [number(x.p50_ms, 4), number(y.p50_ms, 4), f"{y.p50_ms / x.p50_ms:.2f}" if x.p50_ms else ""]
        elif x.bytes is not None and y.bytes is not None and x.op.startswith("memory"):
            figures = [f"{x.bytes:,}", f"{y.bytes:,}", f"{y.bytes / x.bytes:.2f}" if x.bytes else ""]
        elif said == "same":
            continue
        else:
            figures = ["", "", ""]
        lines.append([x.label(), x.who(), *figures, str(allowed) if x.p50_ms is not None else "", said])
    title = f"A {_name(a, first)}   B {_name(b, second)}"
    table(title, ["what", "who", "A ms or bytes", "B", "B/A", "allowed", ""], lines, left=2)
    kept = {row.key() for row in b}
    lost = [row for row in a if row.key() not in kept]
    vanished = [row for row in lost if not row.is_peer() and row.status == "ok"]
    added = len({row.key() for row in b} - {row.key() for row in a})
    if lost or added:
        names = "".join(f"; {row.label()} of {row.who()}" for row in vanished[:3])
        print(f"only in A: {len(lost)} rows, {len(vanished)} of them ours{names}; only in B: {added} rows")
    if a[0].machine != b[0].machine:
        print(f"different machines: {a[0].machine} and {b[0].machine}")
    differing = [line for line in lines if line[-1] not in ("noise", "same", "machine")]
    explained = sum(line[-1] == "machine" for line in lines)
    print(
        f"{len(differing)} of {len(lines)} differ by more than noise; {explained} by no more than the machine may have"
    )
    return len(differing) + len(vanished)


def _name(rows: list[Row], path: Path) -> str:
    row = max(rows, key=lambda row: row.time)
    return f"{path.name} ({row.commit[:9] or 'no commit'}{'+' if row.commit.endswith('-modified') else ''} {row.time})"
