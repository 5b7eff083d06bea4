"""Results files: one schema, all or nothing, damage named; statistics; comparison; pictures from files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.cli import main
from bench.errors import BenchError
from bench.schema import Row, load, parse_row, save
from bench.timing import Stats


def norm_row(provider: str = "ours", p50: float = 1.0, **options: Any) -> Row:
    given = {"direction": "fwd", "shape": [8, 32], "dtype": "bf16", "params": {"p": 0.1}, "bytes": 4096, **options}
    row = Row("norm.layer", provider, **given)
    row.p20_ms, row.p50_ms, row.p80_ms, row.samples, row.percent = 0.9 * p50, p50, 1.1 * p50, 9, 50.0
    row.versions, row.machine, row.commit, row.time = {"torch": "2"}, "a machine", "c0ffee", "2026-01-01T00:00:00Z"
    return row


def linear_rows() -> list[Row]:
    common: dict[str, Any] = {"direction": "fwd", "shape": [8, 4, 16], "dtype": "fp32", "ranks": 2}
    rows = [Row("linear.all_gather_linear", "ours", params={"link": "1gbit", "chunks": c}, **common) for c in (1, 2)]
    rows += [Row("linear.all_gather_linear", who, params={"link": "1gbit"}, **common) for who in ("ours", "dtensor")]
    for row in rows:
        row.p20_ms, row.p50_ms, row.p80_ms = 1.0, 2.0, 3.0
        row.metrics = {"matmul_ms": 1.0, "wire_ms": 1.5, "chunks": 2}
    return rows


def memory_rows() -> list[Row]:
    shape = [64, 1, 128, 2]
    return [Row("memory.gpt2", who, shape=shape, bytes=100, metrics={"sbh_over_t": 32.1}) for who in ("ours", "paper")]


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [norm_row(), norm_row("eager", 2.0), *linear_rows(), *memory_rows()]
    save(tmp_path / "a.jsonl", rows)
    assert load(tmp_path / "a.jsonl") == rows
    assert load(tmp_path) == rows


def test_of_the_same_measurement_the_latest_counts(tmp_path: Path) -> None:
    old, new = norm_row(p50=1.0), norm_row(p50=2.0)
    new.time = "2026-01-02T00:00:00Z"
    save(tmp_path / "a.jsonl", [new])
    save(tmp_path / "b.jsonl", [old])
    assert load(tmp_path) == [new]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"op": "norm', r"damaged.jsonl:1: damaged, not JSON .*measure again"),
        ("[1, 2]", "not a line of a results file"),
        ('{"op": "x", "provider": "y", "speed": 3}', r"another schema \(speed\)"),
        ('{"op": "x", "provider": "y", "p50_ms": "fast"}', "does not know"),
        ("", "empty"),
    ],
)
def test_damaged_and_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "damaged.jsonl").write_text(text)
    with pytest.raises(BenchError, match=message):
        load(tmp_path)
    for command in (["plot", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        assert main(command) == 2
        assert capsys.readouterr().err.startswith("bench: ")
    assert list(tmp_path.glob("*.png")) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    save(path, [norm_row()])
    before = path.read_text()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, [norm_row("eager")])
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_statistics() -> None:
    assert Stats.of([float(i) for i in range(11)]) == Stats(2.0, 5.0, 8.0, 11)
    assert Stats.of([3.0]) == Stats(3.0, 3.0, 3.0, 1)


def test_parse_row_fills_what_is_missing() -> None:
    assert parse_row('{"op": "norm.rms", "provider": "ours"}', "here") == Row("norm.rms", "ours")


def test_compare_marks_noise_and_takes_the_machine_out() -> None:
    assert compare.verdict(norm_row(p50=1.0), norm_row(p50=1.1)) == "noise"
    assert compare.verdict(norm_row(p50=1.0), norm_row(p50=2.0)) == "slower"
    assert compare.verdict(norm_row(p50=2.0), norm_row(p50=1.0)) == "faster"
    a = [norm_row(p50=1.0), norm_row("eager", 4.0)]
    b = [norm_row(p50=2.0), norm_row("eager", 8.0)]  # everything took twice as long: not ours
    (drift,) = compare.drifts(compare.pairs(a, b)).values()
    assert compare.verdict(a[0], b[0], drift) == "noise"
    assert compare.verdict(a[1], b[1]) == "machine"
    wrong = norm_row()
    wrong.status, wrong.p50_ms = "wrong", None
    assert compare.verdict(a[0], wrong) == "ok -> wrong"


def test_compare_prints_and_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.jsonl", [norm_row()])
    save(tmp_path / "b.jsonl", [norm_row(p50=3.0)])
    save(tmp_path / "c.jsonl", memory_rows())
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    assert main(["compare", a, b]) == 0
    assert "1 of 1 differ by more than noise" in capsys.readouterr().out
    assert main(["compare", a, b, "--fail"]) == 1
    assert main(["compare", a, a, "--fail"]) == 0
    assert main(["compare", a, c]) == 2
    assert "no measurement in common" in capsys.readouterr().err


def test_plot_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    save(tmp_path / "a.jsonl", [norm_row(), norm_row("copy", 0.5), *linear_rows(), *memory_rows()])
    assert main(["plot", str(tmp_path)]) == 0
    written = {path.name: path.read_bytes()[:4] for path in tmp_path.glob("*.png")}
    assert written == dict.fromkeys(("norm.png", "linear.png", "memory.png"), b"\x89PNG")
    (tmp_path / "empty").mkdir()
    assert main(["plot", str(tmp_path / "empty")]) == 2
    assert "measure first" in capsys.readouterr().err
