"""The registry: each name is a file that has what a command needs, and --help needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bench
from bench import (
    attention,
    attention_providers,
    cli,
    errors,
    gemm,
    layer,
    layer_loopback,
    layer_providers,
    linear,
    linear_rank,
    moe,
    moe_grouped,
    moe_providers,
    norm,
    providers,
    report,
    suite,
)

FOLDER = Path(bench.__file__).parent


@pytest.mark.parametrize("name", [*suite.BENCHMARKS, *suite.TOOLS])
def test_a_command_is_one_file(name: str) -> None:
    module = suite.module_of(name)
    assert Path(module.__file__) == FOLDER / f"{name}.py"
    assert module.TEXT and module.add_options and module.run_command


def test_the_command_line_knows_no_benchmark_by_name() -> None:
    text = (FOLDER / "cli.py").read_text()
    assert [name for name in (*suite.BENCHMARKS, *suite.TOOLS) if f'"{name}"' in text] == []
    assert tuple(cli.COMMANDS) == suite.BENCHMARKS


def test_help_imports_neither_torch_nor_what_an_extra_brings() -> None:
    code = "import sys; from bench import cli; cli.build_parser(); cli.check_peers(['eager']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    assert {"torch", "rich", "matplotlib", "transformers", "seqpar_kernels"}.isdisjoint(done.stdout.split())


def test_peers_are_those_that_are_timed() -> None:
    """The names stand in files that import no torch, apart from what runs them."""
    assert tuple(providers.PEERS) == norm.PEERS
    assert tuple(linear_rank.PEERS) == linear.PEERS
    assert tuple(attention_providers.PEERS) == attention.PEERS
    assert set(layer.PEERS) == {*layer_providers.SINGLE, *layer_providers.PEERS}
    assert (*moe_providers.PEERS, moe_grouped.TORCH) == moe.PEERS
    everybody = {*norm.PEERS, *linear.PEERS, *layer.PEERS, *gemm.PEERS, *attention.PEERS, *moe.PEERS}
    assert everybody == set(suite.peers())
    assert tuple(layer_loopback.SIZES) == layer.SIZES


def test_soak_is_a_command_and_a_module() -> None:
    args = cli.build_parser().parse_args(["soak", "kills", "--rounds", "8"])
    assert (args.what, args.ranks, args.steps, args.rounds, args.patience) == ("kills", 3, 5000, 8, 1.0)
    command = [sys.executable, "-m", "bench.soak", "dance"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 2 and "invalid choice: 'dance'" in done.stderr


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = errors.importlib.util.find_spec
    gone = {"transformers", "rich", "matplotlib"}
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name in gone else find_spec(name))
    for command, said in (
        (["guards", "--quick"], "guards needs transformers: pip install 'seqpar-kernels[hf]'"),
        (["coverage", "--models"], "coverage --models needs transformers: pip install 'seqpar-kernels[hf]'"),
        (
            ["plot", str(FOLDER / "results" / "epyc-2core")],
            "plot needs matplotlib: pip install 'seqpar-kernels[bench]'",
        ),
    ):
        assert cli.main(command) == 2
        assert said in capsys.readouterr().err
    report.has_rich.cache_clear()
    for figure in "34":
        report.table("title", ["a", "b"], [["1", figure]])
    shown = capsys.readouterr()
    assert "1  3" in shown.out and shown.err.count("tables are plain text: rich is not installed: pip install") == 1
    report.has_rich.cache_clear()
