"""The planner's model fitted to rows: known figures come out again, missing rows are named, and what it is is said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import project_model as project
from bench.cli import main
from bench.errors import BenchError
from bench.schema import Row, load, save

COMMITTED = Path(__file__).resolve().parents[2] / "bench" / "results" / "epyc-2core"
RATE, MEMORY, CALL = 700e12, 2e12, 8e-6  # FLOP/s, bytes/s read, seconds a piece
S, K, F, RANKS = 8192, 8192, 32768, 4


def timed(row: Row, seconds: float, device: str = "cuda") -> Row:
    row.p20_ms = row.p50_ms = row.p80_ms = 1e3 * seconds
    row.samples, row.machine, row.device = 9, "a GPU", device
    return row


def made(chunks: tuple[int, ...] = (1, 2, 4, 8)) -> list[Row]:
    """What a machine of just these figures would have measured."""
    size = 2**31
    rows = [timed(Row(op="ceiling.copy", provider="torch", shape=[size], bytes=2 * size), size / MEMORY)]
    flops = 2 * S * K * F // RANKS
    whole, reading = flops / RATE, K * F // RANKS * 2 / MEMORY
    common = {"shape": [S, K, F], "dtype": "bf16", "ranks": RANKS, "direction": "fwd", "flops": flops}
    for op in ("pieces.all_gather_linear", "pieces.linear_reduce_scatter"):
        rows.append(timed(Row(op=op, provider="one matmul", **common), whole))
        for count in chunks:
            row = Row(op=op, provider="ours", params={"chunks": count}, **common)
            rows.append(timed(row, whole + (RANKS * count - 1) * (CALL + reading)))
    return rows


def test_known_figures_come_out_again(tmp_path: Path) -> None:
    found = project.fit(made(), tmp_path)
    assert (found.dtype, found.machine) == ("bf16", "a GPU")
    assert found.figures.flops_16 == pytest.approx(RATE)
    assert found.figures.memory_bytes == pytest.approx(MEMORY)
    assert found.figures.call_seconds == pytest.approx(CALL)
    assert project.fit(made(), tmp_path, 5e-6).figures.message_seconds == 5e-6


def test_pieces_that_cost_less_than_nothing_cost_nothing(tmp_path: Path) -> None:
    rows = made()
    for row in rows:
        if "chunks" in row.params:
            row.p50_ms = rows[1].p50_ms
    assert project.fit(rows, tmp_path).figures.call_seconds == 0.0


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("ceiling.copy", r"ceiling\.copy \(bench norm\)"),
        ("pieces.", r"one matmul .* nor of .* in chunks \(bench loopback --chunks 1 2 4 8\)"),
    ],
)
def test_rows_that_are_missing_are_named(tmp_path: Path, gone: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        project.fit([row for row in made() if not row.op.startswith(gone)], tmp_path)


def test_rows_of_two_machines_are_refused(tmp_path: Path) -> None:
    rows = made()
    rows[-1].machine = "another"
    with pytest.raises(BenchError, match="2 machines"):
        project.fit(rows, tmp_path)


def test_a_virtual_row_is_foretold(tmp_path: Path) -> None:
    """One after the other: the matmuls of all ranks, then the wire."""
    rows = made()
    common = {"shape": [S, K, F], "dtype": "bf16", "ranks": RANKS, "direction": "fwd"}
    wire = S * K * 2 * (RANKS - 1) // RANKS / 1e9
    row = Row(op="loopback.all_gather_linear", provider="one after the other", metrics={"paced_mbit": 8e3}, **common)
    rows.append(timed(row, 2 * S * K * F / RATE + wire))
    (check,) = project.checks(project.fit(rows, tmp_path), rows)
    assert abs(check.error) < 0.01


def test_it_says_that_it_is_a_projection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "rows.jsonl", made())
    assert main(["project", str(tmp_path), "--size", "llama-8b", "--nvlink-gbytes", "123"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "PROJECTION, NOT MEASURED" in told and "NVLink 123 GB/s each way" in told and "a GPU" in told
    assert "not held against anything" in told
    assert main(["project", str(tmp_path / "nowhere")]) == 2


def test_committed_rows_can_be_fitted_and_held_against() -> None:
    """How far off the model is, is for the reader to judge; that it says so of every row it can is not."""
    rows = load(COMMITTED)
    found = list(project.checks(project.fit(rows, COMMITTED), rows))
    assert {check.row.provider for check in found} == {"ours", "by-hand"}
    assert all(math.isfinite(check.error) for check in found)
