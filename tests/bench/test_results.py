"""Results files: one schema, all or nothing, damage named; statistics; comparison; pictures from files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import compare, figure_parts, figures, place, plot, report, suite, tables
from bench.cli import main
from bench.errors import BenchError
from bench.place import of_checkout
from bench.schema import Row, load, parse_row, save
from bench.timing import Stats

RUNS = Path(__file__).parent / "recorded"


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
        (
            '{"op": "x", "provider": "y", "p50_ms": "fast"}',
            r"damaged.jsonl:1: p50_ms: expected float \| None, got 'fast'",
        ),
        ('{"op": "x", "provider": "y", "params": null}', r"params: expected dict\[str, Any\], got None"),
        ('{"op": 1, "provider": "y"}', "op: expected str, got 1"),
        ('{"op": "x", "provider": "y", "shape": [8, "n"]}', r"shape: expected list\[int\], got \[8, 'n'\]"),
        ('{"op": "x", "provider": "y", "ranks": true}', "ranks: expected int, got True"),
        ('{"op": "x", "provider": "y", "versions": {"torch": 2}}', r"versions: expected dict\[str, str\]"),
        ('{"op": "x", "provider": "y", "status": "fine"}', "status: expected one of ok, wrong, .*, got 'fine'"),
        ('{"op": "x", "provider": "y", "p50_ms": 1.0}', r"in this order or none of them, got \[None, 1.0, None\]"),
        ('{"op": "x", "provider": "y", "p20_ms": 2, "p50_ms": 1, "p80_ms": 3}', r"in this order .* got \[2, 1, 3\]"),
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


def test_a_disk_that_fills_up_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After measuring, and while drawing: a message, and nothing half written."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path / "a.jsonl", memory_rows())
    monkeypatch.setattr(os, "replace", fail)
    (tmp_path / "out").mkdir()
    assert main(["coverage", "--quick", "--dtype", "fp32", "--save", str(tmp_path / "out")]) == 2
    assert "cannot be saved (No space left on device): name another folder" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    pytest.importorskip("matplotlib")
    assert main(["plot", str(tmp_path / "a.jsonl")]) == 2
    assert "memory.png: cannot be written (No space left on device)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.jsonl"]


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
    assert compare.verdict(a[0], b[0], drift) == "machine"
    assert compare.verdict(a[0], norm_row(p50=1.0), drift) == "noise"  # the peers' trouble need not be ours
    assert compare.verdict(a[0], norm_row(p50=8.0), drift) == "slower"
    assert compare.verdict(a[1], b[1]) == "machine"
    wrong = norm_row()
    wrong.status, wrong.p50_ms = "wrong", None
    assert compare.verdict(a[0], wrong) == "ok -> wrong"


def test_compare_allows_ours_what_befell_a_peer_elsewhere() -> None:
    """One peer of nine stood still at its own question and lay 1.3 times its band above it at another."""
    still = [norm_row("eager", shape=[8, n]) for n in range(1, 9)]
    a = [norm_row(), norm_row("eager"), *still, norm_row("copy", shape=[9, 9])]
    b = [norm_row(), norm_row("eager"), *still, norm_row("copy", 1.3 * 1.1 / 0.9, shape=[9, 9])]
    drift = compare.drifts(compare.pairs(a, b))[a[0].question()]
    assert compare.verdict(a[0], norm_row(p50=1.25 * 1.1 / 0.9)) == "slower"
    assert compare.verdict(a[0], norm_row(p50=1.25 * 1.1 / 0.9), drift) == "machine"
    assert compare.verdict(a[0], norm_row(p50=1.4 * 1.1 / 0.9), drift) == "slower"
    assert compare.verdict(a[0], norm_row(p50=0.9 / 1.1 / 1.4), drift) == "faster"


def test_compare_takes_no_excuse_from_our_own_code_or_another_torch() -> None:
    """What "two-steps" measures is ours; a peer of another version may have become slower by itself."""
    for who, versions in (("two-steps", {"torch": "2"}), ("eager", {"torch": "3"})):
        a = [norm_row(), norm_row(who), norm_row("copy", shape=[9, 9])]
        b = [norm_row(p50=2.0), norm_row(who, 2.0), norm_row("copy", shape=[9, 9])]
        b[1].versions = versions
        assert compare.verdict(a[0], b[0], compare.drifts(compare.pairs(a, b))[a[0].question()]) == "slower"
        assert compare.verdict(a[1], b[1]) == "slower"


def test_compare_counts_what_vanished_and_forgives_another_pace(tmp_path: Path) -> None:
    paced = [Row("loopback.all_gather_linear", "ours", shape=[8, 4, 16], params={"ratio": 1.0}) for _ in "ab"]
    for row, pace in zip(paced, (1.0, 1.3), strict=True):
        row.p20_ms, row.p50_ms, row.p80_ms = 0.95 * pace, pace, 1.05 * pace
        row.metrics = {"matmul_ms": 0.8, "wire_ms": 0.9 * pace}
    save(tmp_path / "a.jsonl", [norm_row(), norm_row("eager"), paced[0]])
    save(tmp_path / "b.jsonl", [norm_row("eager"), paced[1]])
    assert compare.run(tmp_path / "a.jsonl", tmp_path / "b.jsonl") == 1
    assert compare.run(tmp_path / "b.jsonl", tmp_path / "a.jsonl") == 0


def test_two_runs_of_one_commit_do_not_differ(capsys: pytest.CaptureFixture[str]) -> None:
    """Two recorded runs of the same code, on a machine busy with other things; and one of them with ours slowed."""
    first, second = (RUNS / f"run{i}.jsonl" for i in (1, 2))
    assert compare.run(first, second) == 0
    assert compare.run(second, first) == 0
    assert "machine" in capsys.readouterr().out  # it was busy enough to be seen in the peers
    a, b = load(first), load(second)
    both = compare.pairs(a, b)
    drift = compare.drifts(both)
    host = [(x, y) for x, y in both if x.op.startswith("host.") and x.provider == "ours"]
    assert len(host) == 12
    for x, y in host:
        assert y.p20_ms is not None and y.p50_ms is not None and y.p80_ms is not None
        y.p20_ms, y.p50_ms, y.p80_ms = 1.5 * y.p20_ms, 1.5 * y.p50_ms, 1.5 * y.p80_ms
        assert compare.verdict(x, y, drift[x.question()]) == "slower", x.label()


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


def timed_row(op: str, provider: str, shape: list[int], **options: Any) -> Row:
    row = norm_row(provider, shape=shape, **options)
    row.op = op
    return row


def rows_of_all_families() -> list[Row]:
    """Of each that has a picture, at least two."""
    paced = {"params": {"ratio": 1.0}, "ranks": 2, "metrics": {"matmul_ms": 1.0, "wire_ms": 1.5}}
    found = [norm_row(), *linear_rows(), *memory_rows()]
    for provider in ("ours", "eager", "nobody's"):
        found.append(timed_row("reduce.layer", provider, [4, 8, 32]))
        found.append(timed_row("reduce", provider, [4, 8, 32], params={}))
        found.append(timed_row("host.norm.layer", provider, [4, 64]))
        found.append(timed_row("layer.gpt", provider, [8, 1, 32, 4]))
        found.append(timed_row("attention.causal", provider, [64, 4, 4, 8], metrics={"ideal_ms": 0.5}, ranks=2))
        found.append(timed_row("moe.experts", provider, [64, 4, 2, 8, 16], metrics={"ideal_ms": 0.5}, ranks=2))
        found.append(timed_row("moe.grouped_matmul", provider, [128, 4, 8, 32], params={}))
    found.append(timed_row("layer.gpt", "matmul", [8, 1, 32, 4]))
    for chunks in (1, 2):
        cut = {**paced, "params": {"ratio": 1.0, "chunks": chunks}}
        found.append(timed_row("loopback.all_gather_linear", "ours", [8, 4, 16], **cut))
    for provider in ("ours", "matmul", "messages", "one after the other"):
        found.append(timed_row("loopback.all_gather_linear", provider, [8, 4, 16], **paced))
    return found


def test_every_family_has_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save(tmp_path / "a.jsonl", rows_of_all_families())
    assert main(["plot", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == set(plot.PICTURES)


def test_no_two_providers_share_a_colour() -> None:
    colors = [color for color, _ in (*figure_parts.STYLES.values(), *figure_parts.OTHERS.values())]
    assert len(set(colors)) == len(colors)
    assert set(suite.peers()) <= figure_parts.STYLES.keys()
    assert figure_parts.style_of("ours without a fusion") != figure_parts.style_of("ours")


def texts(figure: Any) -> list[str]:
    """What is written in a picture."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_more_than_the_ceiling_is_the_fault_of_the_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    """In the terminal, in the page and in the pictures; and nowhere else."""
    pytest.importorskip("matplotlib").use("Agg")
    rows = [norm_row(shape=[8, 32 * i]) for i in (1, 2)]
    report.timing_table(rows, "a title")
    assert "*" not in capsys.readouterr().out + "".join(tables.norm(rows)).replace("**", "")
    assert not any("*" in text for text in texts(figures.draw_norm(rows)))
    rows[1].percent = 113.3
    report.timing_table(rows, "a title")
    out = capsys.readouterr().out
    assert "113*" in out and "50*" not in out
    assert "* above 100 % of its ceiling: that ceiling was measured too low" in out
    page = "".join(tables.norm(rows))
    assert "(113\\* %)" in page and "(50 %)" in page and page.count("that ceiling was measured too low") == 1
    written = texts(figures.draw_norm(rows))
    assert written.count("*") == 1 and any("that ceiling was measured too low" in text for text in written)
    layers = [timed_row("layer.gpt", who, [8, 1, 32, 4]) for who in ("ours", "matmul")]
    layers[0].percent = 101.0
    assert any("(101* %)" in text for text in texts(figures.draw_layer(layers)))


def test_tables_of_shared_attention_and_experts() -> None:
    """The fastest first, with what a rank sends and keeps; unsharded rows are no competitors."""
    rows = []
    for op, measure in (("attention.causal", "x_ideal"), ("moe.experts", "x_floor")):
        for who, both in (("by-hand", 9.0), ("ours", 5.0), ("unsharded", 4.0), ("torch-ring", 4.5)):
            for direction, ms in (("fwd", both / 3), ("fwd+bwd", both)):
                row = norm_row(
                    who, ms, direction=direction, shape=[4096, 8, 8, 64], params={"link": "ratio:1"}, ranks=2
                )
                row.op, row.bytes = op, 3 * 2**20
                row.metrics = {measure: 1.25, "kept_bytes": 2**21}
                rows.append(row)
    for write in (tables.attention, tables.moe):
        lines = write(rows)
        assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
            "unsharded", "torch-ring", "**ours**", "by-hand"
        ]  # fmt: skip
        assert "| **ours** | 1.67 | 5 | 1.25 | 3.0 | 2.0 |  |" in lines
    lost = "".join(tables.losses(rows))
    assert lost.count("(1.11 times torch-ring)") == 4 and "unsharded" not in lost


def test_plot_leaves_out_what_it_cannot_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of another version of the benchmarks: without the figure that is drawn, or with another kind of it."""
    pytest.importorskip("matplotlib")
    memory, linear = memory_rows(), linear_rows()
    memory[0].metrics, linear[0].params = {}, {"link": "1gbit", "chunks": "two"}
    linear[1].metrics = {"matmul_ms": None, "wire_ms": "slow", "chunks": []}
    save(tmp_path / "a.jsonl", [norm_row(), norm_row("eager", shape=[8]), norm_row(params={"p": []}), *linear, *memory])
    assert main(["plot", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == {"norm", "linear", "memory"}
    memory[0].provider, linear[0].params = "ours", {"chunks": None}
    save(tmp_path / "a.jsonl", [norm_row(bytes=None), linear[0], memory[0]])
    assert main(["plot", str(tmp_path)]) == 2
    assert (
        "no norm, reduce, linear, loopback, layer, attention, moe, memory or host rows to draw"
        in capsys.readouterr().err
    )


def test_the_tables_are_what_the_committed_results_say() -> None:
    page, results = of_checkout(*tables.PAGE), of_checkout(*tables.RESULTS)
    assert page is not None and results is not None
    written = page.read_text().partition(tables.BEGIN)[2].partition(tables.END)[0].strip()
    assert written == tables.section(results).strip(), "run `python -m bench tables`"


def test_tables_of_an_installed_package_belong_to_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, "HERE", tmp_path / "site-packages" / "seqpar_kernels" / "bench")
    assert main(["tables"]) == 2
    assert "belong to a checkout and are not installed" in capsys.readouterr().err
    assert main(["tables", "--file", str(page(tmp_path))]) == 2
    assert "bench/results" in capsys.readouterr().err


def page(folder: Path) -> Path:
    path = folder / "benchmarks.md"
    path.write_text(f"before\n{tables.BEGIN}\nstale\n{tables.END}\nafter\n")
    return path


def test_tables_say_where_we_lose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "box"
    results.mkdir(parents=True)
    mine = [norm_row(p50=3.0, command="python -m bench norm --rows 8"), norm_row(p50=1.0, direction="fwd+bwd")]
    theirs = [norm_row("eager", 2.0), norm_row("eager", 1.05, direction="fwd+bwd")]
    absent = Row("norm.layer", "liger", status="absent", reason="not installed")
    wrong = Row("layer.gpt", "ours", status="wrong", reason="dx errs", time="2026-01-01T00:00:00Z")
    save(results / "a.jsonl", [*mine, *theirs, norm_row("copy", 0.5), absent, wrong, *linear_rows(), *memory_rows()])
    path = page(tmp_path)
    command = ["tables", "--file", str(path), "--results", str(results.parent)]
    assert main(command) == 0
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| layer bf16 p=0.1 fwd | 3 (50 %) | **2** | 0.5 |" in text
    assert "| layer bf16 p=0.1 fwd+bwd | **1** (50 %) | 1.05 |  |" in text
    assert "- norm: in 1 of 2 questions; layer fwd 8x32 bf16 p=0.1 (1.50 times eager)" in text
    assert "- layer.gpt: wrong, dx errs" in text
    assert "Absent here: liger (not installed)." in text
    assert "Dropout + residual + norm, 8 x 32, `python -m bench norm --rows 8` and `python -m bench norm`:" in text
    assert "| gpt2 | ours | 1 | 100 | **32.1** |" in text
    assert "measured on a GPU: no figure" in text
    assert main(command) == 0
    assert "up to date" in capsys.readouterr().out
    assert path.read_text() == text


def test_tables_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = page(tmp_path)
    before = path.read_text()
    for extra, message in (
        (["--results", str(tmp_path / "none")], "no folder of results: measure with --save"),
        (["--file", str(tmp_path / "no.md")], "cannot be read"),
    ):
        assert main(["tables", "--file", str(path), *extra]) == 2
        assert message in capsys.readouterr().err
    assert path.read_text() == before
    path.write_text("no marks")
    assert main(["tables", "--file", str(path)]) == 2
    assert "put them where the figures belong" in capsys.readouterr().err
    assert path.read_text() == "no marks"
