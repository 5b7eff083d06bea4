"""The commands themselves at tiny sizes: that they measure, check and report; never how fast anything is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import links, norm, ranks
from bench.check import WrongResult, check_norm
from bench.cli import main
from bench.errors import BenchError
from bench.providers import eager
from bench.schema import load

BRIEF = ["--quick", "--seconds", "0.01"]


def test_norm_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "8", "--hidden", "48", "--dtype", "bf16", "--peers", "eager", "liger"]
    assert main(["norm", *BRIEF, *sizes, "--save", str(tmp_path)]) == 0
    rows = load(tmp_path)
    asked = {(r.op, r.direction, r.params["p"]) for r in rows if r.op.startswith("norm")}
    assert len(asked) == 2 * 2 * 2
    for question in asked:
        found = {r.provider: r for r in rows if (r.op, r.direction, r.params.get("p")) == question}
        assert found["ours"].status == found["eager"].status == "ok"
        assert found["liger"].status == "absent"
        assert found["liger"].reason
        assert found["ours"].p20_ms <= found["ours"].p50_ms <= found["ours"].p80_ms
        assert found["ours"].percent > 0
        assert found["ours"].metrics["error"] <= 2
    assert any(r.op == "ceiling.copy" for r in rows)
    assert all(r.versions["torch"] == torch.__version__ and r.machine and r.time for r in rows)
    out = capsys.readouterr().out
    assert "norm.layer fwd" in out
    assert "absent: liger" in out


def buffers(kind: str, p: float) -> norm.Buffers:
    return norm.make_buffers(norm.NormCase(kind, p, "fp32", 16, 64), "cpu")[0]


def no_dropout(*args: Tensor) -> tuple[Tensor, Tensor]:
    return eager("layer", 0.0, "cpu")(*args[:4], 0.0)


def wrong_gradient(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return eager("layer", p, "cpu")(x, residual + 0 * residual.detach(), weight.detach() + 0 * weight, bias, p)


@pytest.mark.parametrize(("fn", "p"), [(no_dropout, 0.5), (wrong_gradient, 0.0)])
def test_a_provider_that_is_wrong_is_found_out(fn: Callable[..., tuple[Tensor, Tensor]], p: float) -> None:
    b = buffers("layer", p)
    assert check_norm(eager("layer", p, "cpu"), "layer", p, b.inputs, b.grads) <= 2
    with pytest.raises(WrongResult):
        check_norm(fn, "layer", p, b.inputs, b.grads)


def test_bytes_are_those_of_the_tensors() -> None:
    case = norm.NormCase("rms", 0.1, "bf16", 100, 64)
    tensor = 100 * 64 * 2
    assert case.bytes("fwd") == 4 * tensor + 100 * 4
    assert case.bytes("fwd+bwd") == 9 * tensor + 2 * 100 * 4


def test_host_and_coverage_smoke(tmp_path: Path) -> None:
    assert main(["host", *BRIEF, "--save", str(tmp_path)]) == 0
    assert main(["coverage", "--dtype", "fp32", "bf16", "--save", str(tmp_path)]) == 0
    rows = load(tmp_path)
    assert {r.clock for r in rows if r.op.startswith("host")} == {"cpu"}
    native = [r for r in rows if r.op.startswith("coverage") and r.provider == "cpu"]
    assert len(native) == 6
    assert all(r.status == "ok" for r in native)
    assert all(r.reason for r in rows if r.status == "absent")


def test_linear_smoke(tmp_path: Path) -> None:
    sizes = ["--rows", "16", "--hidden", "8", "--chunks", "2", "--peers", "by-hand", "dtensor"]
    assert main(["linear", *BRIEF, *sizes, "--save", str(tmp_path)]) == 0
    rows = [r for r in load(tmp_path) if r.op.startswith("linear")]
    assert {r.status for r in rows} == {"ok"}
    assert {r.who() for r in rows} == {"ours", "ours chunks=2", "by-hand", "dtensor", "matmul"}
    own = next(r for r in rows if r.who() == "ours" and r.op.endswith("all_gather_linear") and r.direction == "fwd")
    assert own.bytes == 16 * 8 * 4 // 2
    assert own.flops == 2 * 16 * 8 * 32 // 2
    assert {"matmul_ms", "wire_ms", "x_floor", "engine", "chunks"} <= own.metrics.keys()


def test_memory_smoke(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert main(["memory", "--quick", "--save", str(tmp_path)]) == 0
    rows = {(r.op, r.provider, r.ranks): r for r in load(tmp_path)}
    plain, sharded = rows["memory.gpt2", "hugging-face", 1], rows["memory.gpt2", "ours", 2]
    assert sharded.status == "ok"
    assert 0 < sharded.bytes < plain.bytes / 2
    assert rows["memory.gpt2", "paper: TP+SP, selective", 2].metrics["sbh_over_t"] == 34


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["norm", "--peers", "nobody"], "--peers nobody: unknown; known are eager"),
        (["norm", "--seconds", "-1"], "expected more than 0"),
        (["norm", "--save", "/dev/null/folder"], "cannot be written to"),
        (["linear", "--rows", "15"], "--rows 15: expected a multiple of --ranks 2"),
        (["linear", "--ranks", "1"], "at least 2 ranks"),
        (["linear", "--link", "fast"], "expected a rate such as 1gbit"),
        (["memory", "--hidden", "100", "--heads", "3"], "expected an even multiple of --heads 3"),
    ],
)
def test_bad_input_says_what_to_do(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--quick"] if command[0] != "compare" else command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["norm", "--device", "cuda", "--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_rank_that_fails_ends_all_with_its_words() -> None:
    with pytest.raises(BenchError, match=r"rank \d of 2 failed(.|\n)*KeyError: 'op'"):
        ranks.run_ranks("bench.linear_rank:run", {}, 2)


def test_links_are_parsed() -> None:
    assert links.parse_link("1gbit").rate == 1e9
    assert links.parse_link("250mbit").rate == 250e6
    assert links.parse_link("ratio:0.5").ratio == 0.5
    for text in ("", "1", "0mbit", "ratio:0", "gbit", "1gbps"):
        with pytest.raises(BenchError, match="expected a rate"):
            links.parse_link(text)


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_links_without_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links.shutil, "which", lambda tool: None)
    with pytest.raises(BenchError, match="install iproute2"), links.Network(2):
        pass


def test_links_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = links.why_not()
    if reason is not None:
        pytest.skip(reason)
    with links.Network(2) as network:
        network.shape(1e8)
        assert network.namespace(1) in namespaces()
    assert network.namespace(1) not in namespaces()
    with pytest.raises(BenchError, match="tc"), links.Network(2) as network:
        network.shape(-1)
    assert network.namespace(1) not in namespaces()
    left = f"{links.PREFIX}-4194999-switch"  # above any process id: a run that was killed
    subprocess.run(["ip", "netns", "add", left], check=True)
    assert links.sweep_stale() == [left]
    assert left not in namespaces()
