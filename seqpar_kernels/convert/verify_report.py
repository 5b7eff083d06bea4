"""The table that :func:`seqpar_kernels.verify` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Columns of the printed table.
WIDTH = 120


@dataclass(frozen=True)
class VerifyRow:
    """One tensor that was compared.

    Attributes:
        name: of the output or the parameter.
        what: "loss", "output", "gradient" or "input gradient".
        error: the largest difference from the reference on any rank, in units of the largest magnitude there; nan
            if there is nothing to compare.
        tolerance: the largest error that passes.
        verdict: "ok", "wrong", "missing" (in the converted model), "extra" (not in the reference) or "ranks differ"
            (each rank within the tolerance, but not the same bits).
        rank: the global rank with the largest error.
        note: a remark.
    """

    name: str
    what: str
    error: float
    tolerance: float
    verdict: str
    rank: int = 0
    note: str = ""

    @property
    def share(self) -> float:
        """The error in units of the tolerance; infinite where nothing can be compared."""
        if math.isnan(self.error):
            return 0.0 if self.verdict == "ok" else math.inf
        return self.error / self.tolerance if self.tolerance > 0 else math.inf if self.error > 0 else 0.0


@dataclass(frozen=True)
class Verification:
    """The result of :func:`seqpar_kernels.verify`, the same on every rank; ``str()`` is the table.

    Attributes:
        title: the model, the ranks and how they were run.
        rows: one for every output, loss and gradient.
        notes: what was not compared, and why.
        shown: how many rows the text shows: all that are wrong first, then those next to their tolerance.

    Examples:
        >>> import copy, torch, seqpar_kernels as sp
        >>> plain = torch.nn.Sequential(torch.nn.LayerNorm(16, bias=False))
        >>> model = sp.parallelize(copy.deepcopy(plain), None, {"0": "scatter_input+norm+gather_output"})
        >>> loss = lambda out, batch: out.square().mean()
        >>> found = sp.verify(model, plain, torch.randn(2, 8, 16), loss_fn=loss, verbose=False)
        >>> sorted(row.what for row in found.rows)
        ['gradient', 'loss', 'output']
        >>> found.raise_if_wrong()
    """

    title: str
    rows: tuple[VerifyRow, ...]
    notes: tuple[str, ...] = ()
    shown: int = 10

    @property
    def ok(self) -> bool:
        return all(row.verdict == "ok" for row in self.rows)

    @property
    def worst(self) -> VerifyRow:
        """The row with the largest error in units of its tolerance, wrong rows first."""
        return max(self.rows, key=_order)

    def raise_if_wrong(self) -> None:
        """
        Raises:
            RuntimeError: with the table, where a row is not "ok".
        """
        if not self.ok:
            raise RuntimeError(str(self))

    def summary(self) -> str:
        kinds = dict.fromkeys(row.what for row in self.rows)
        counts = ", ".join(_count(sum(row.what == kind for row in self.rows), kind) for kind in kinds)
        wrong = [row for row in self.rows if row.verdict != "ok"]
        if wrong:
            return f"NOT THE SAME: {len(wrong)} of {len(self.rows)} rows differ ({counts})"
        return f"the same: {counts}; the worst is {self.worst.share:.2g} of its tolerance ({self.worst.name})"

    def __str__(self) -> str:
        ranked = sorted(self.rows, key=_order, reverse=True)[: self.shown]
        header = ("what", "name", "error", "tolerance", "rank", "verdict")
        cells = [header, *(_cells(row) for row in ranked)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        widths[1] = min(widths[1], WIDTH - sum(widths) + widths[1] - 2 * (len(widths) - 1))
        lines = [self.title, _line(header, widths), "  ".join("-" * width for width in widths)]
        for row, line in zip(ranked, cells[1:], strict=True):
            lines.append(_line(line, widths))
            if row.note:
                lines += _wrapped(f"    {row.note}")
        left = len(self.rows) - len(ranked)
        if left:
            lines.append(f"and {left} more, nearer to the reference")
        for note in self.notes:
            lines += _wrapped(note)
        return "\n".join([*lines, *_wrapped(self.summary())])


def _order(row: VerifyRow) -> tuple[bool, float]:
    return row.verdict != "ok", row.share


def _count(number: int, what: str) -> str:
    plural = "losses" if what == "loss" else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def _cells(row: VerifyRow) -> tuple[str, ...]:
    error = "" if math.isnan(row.error) else f"{row.error:.1e}"
    verdict = row.verdict if row.verdict == "ok" else row.verdict.upper()
    return (row.what, row.name, error, f"{row.tolerance:.1e}", str(row.rank), verdict)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    fitted = [
        cell if len(cell) <= width else "…" + cell[1 - width :] for cell, width in zip(cells, widths, strict=True)
    ]
    return "  ".join(cell.ljust(width) for cell, width in zip(fitted, widths, strict=True)).rstrip()


def _wrapped(text: str) -> list[str]:
    """Lines of at most ``WIDTH``, broken at blanks."""
    import textwrap

    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=True) or [""]
