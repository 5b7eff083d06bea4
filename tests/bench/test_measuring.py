"""The commands themselves at tiny sizes: that they measure, check and report; never how fast anything is."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cli, links, loopback_cases, norm_cases, norm_features, ranks
from bench.check import WrongResult, check_norm
from bench.cli import main
from bench.errors import BenchError, NotHere
from bench.providers import eager
from bench.schema import load
from bench.session import Session
from seqpar_kernels.nn.transformer import FUSIONS

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


def test_features_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option is right and has its own floor; what no CPU kernel does is said."""
    sizes = ["--rows", "8", "--hidden", "48", "--dtype", "bf16"]
    assert main(["norm", "--features", *BRIEF, *sizes, "--save", str(tmp_path)]) == 0
    rows = {(r.op.removeprefix("features."), r.provider, r.direction): r for r in load(tmp_path)}
    assert {name for name, *_ in rows} == {*norm_features.FEATURES, "ceiling.copy", "ceiling.read"}
    assert rows["float8", "ours", "fwd"].reason == "the CPU kernels store no float8"
    timed = [r for (name, *_), r in rows.items() if name != "float8" and not name.startswith("ceiling")]
    assert all(r.status == "ok" and r.percent > 0 for r in timed), [r.reason for r in timed]
    assert all(r.metrics["error"] <= 2 for r in timed if r.provider == "ours")
    elements, statistics = 8 * 48, 8 * 8
    for name, forward, both in (("x_bias", 8, 18), ("residual_fp32", 12, 28), ("two_norms", 10, 22)):
        assert rows[name, "ours", "fwd"].bytes == forward * elements + statistics
        assert rows[name, "ours", "fwd+bwd"].bytes == both * elements + 2 * statistics
    assert rows["odd_hidden", "ours", "fwd"].shape == [8, 47]
    assert main(["norm", "--features", "nothing", *BRIEF]) == 2
    assert "--features nothing: unknown; known are x_bias" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in norm_features.FEATURES if name != "float8"])
def test_an_option_done_wrong_is_found_out(name: str) -> None:
    case = norm_features.Case(name, "fp32", 16, 64)
    feature, buffers = case.feature, norm_features.make_buffers(case, "cpu")[0]
    fn = norm_features.eager(feature, "cpu")

    def off(inputs: dict[str, Tensor], p: float, seed: int | None) -> tuple[Tensor, ...]:
        *ys, z = fn(inputs, p, seed)
        return (*(y * 1.01 for y in ys), z)

    assert norm_features.check(fn, case, buffers, 0.0, strict=False) < 16
    with pytest.raises(WrongResult):
        norm_features.check(off, case, buffers, 0.0, strict=False)


def test_reduce_smoke(tmp_path: Path) -> None:
    sizes = ["--rows", "8", "--hidden", "48", "--shards", "3", "--dtype", "bf16", "--p", "0.1"]
    assert main(["reduce", *BRIEF, *sizes, "--save", str(tmp_path)]) == 0
    rows = {(r.op, r.provider): r for r in load(tmp_path) if r.op.startswith("reduce")}
    assert set(rows) == {
        *(("reduce", w) for w in ("ours", "eager", "copy")),
        *(("reduce.layer", w) for w in ("ours", "two-steps", "eager", "copy")),
    }
    assert all(r.status == "ok" and r.percent > 0 for r in rows.values())
    tensor = 8 * 48 * 2
    assert rows["reduce", "ours"].bytes == 4 * tensor and rows["reduce.layer", "ours"].bytes == 6 * tensor + 64


def buffers(kind: str, p: float) -> norm_cases.Buffers:
    return norm_cases.make_buffers(norm_cases.NormCase(kind, p, "fp32", 16, 64), "cpu")[0]


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


def test_peers_may_sum_plainly_and_ours_may_not() -> None:
    """A weight gradient off by a few fp32 roundings."""
    b = norm_cases.make_buffers(norm_cases.NormCase("layer", 0.0, "fp32", 4096, 8), "cpu")[0]
    b.grads[0].copy_(torch.ones_like(b.grads[0]))  # dbias is 4096 everywhere: one rounding is 5e-4

    def off(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> tuple[Tensor, Tensor]:
        y, z = eager("layer", p, "cpu")(x, residual, weight, bias, p)
        return y + 4e-3 / 4096 * (bias - bias.detach()), z

    with pytest.raises(WrongResult, match="dbias"):
        check_norm(off, "layer", 0.0, b.inputs, b.grads)
    assert check_norm(off, "layer", 0.0, b.inputs, b.grads, strict=False) > 2


def test_bytes_are_those_of_the_tensors() -> None:
    case = norm_cases.NormCase("rms", 0.1, "bf16", 100, 64)
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
    assert {r.who() for r in rows} == {"ours", "ours chunks=2", "ours-kept", "by-hand", "dtensor", "matmul"}
    own = next(r for r in rows if r.who() == "ours" and r.op.endswith("all_gather_linear") and r.direction == "fwd")
    assert own.bytes == 16 * 8 * 4 // 2
    assert own.flops == 2 * 16 * 8 * 32 // 2
    assert {"matmul_ms", "wire_ms", "x_floor", "x_by_hand", "engine", "chunks"} <= own.metrics.keys()


def test_linear_below_the_size_floor(tmp_path: Path) -> None:
    sizes = ["--hidden", "8", "--op", "all_gather_linear", "--chunks", "--peers", "by-hand"]
    assert main(["linear", *BRIEF, *sizes, "--save", str(tmp_path)]) == 0
    rows = [r for r in load(tmp_path) if r.op.startswith("linear") and r.who() == "ours"]
    small = [r for r in rows if r.params["link"] == "loopback, small"]
    assert len(small) == len(rows) / 2 == 2
    for row in small:
        assert row.shape == [64, 128, 512] and row.metrics["engine"] == "single" and row.metrics["x_by_hand"] > 0


def test_loopback_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--rows", "16", "--hidden", "24", "--inner", "32", "--chunks", "2", "--ranks", "4"]
    assert main(["loopback", *BRIEF, *sizes, "--save", str(tmp_path)]) == 0
    rows = [r for r in load(tmp_path) if r.op.startswith("loopback")]
    assert {(r.op, r.direction) for r in rows} == {
        (f"loopback.{op}", direction)
        for op in ("all_gather_linear", "linear_reduce_scatter")
        for direction in ("fwd", "fwd+bwd")
    }
    for r in rows:
        assert r.status == "ok", r.reason
        if r.provider == "ours":
            assert r.percent > 0 and r.metrics["error"] <= 2 and "hidden" in r.metrics
    assert {r.params.get("chunks") for r in rows} == {None, 2}

    on_ranks = loopback_cases.on_ranks
    monkeypatch.setattr(
        loopback_cases, "on_ranks", lambda *args: lambda group: [t * 1.5 for t in on_ranks(*args)(group)]
    )
    assert main(["loopback", *BRIEF, *sizes, "--op", "linear_reduce_scatter", "--save", str(tmp_path / "wrong")]) == 1


def test_layer_smoke(tmp_path: Path) -> None:
    sizes = ["--rows", "8", "--hidden", "32", "--heads", "4", "--peers", "eager", "by-hand", "dtensor", "megatron"]
    assert main(["layer", *BRIEF, *sizes, "--save", str(tmp_path)]) == 0
    rows = [r for r in load(tmp_path) if r.op.startswith("layer.")]
    for kind in ("gpt", "llama"):
        for t, peers in ((1, {"eager"}), (2, {"by-hand", "dtensor"})):
            found = {r.provider for r in rows if (r.op, r.ranks, r.status) == (f"layer.{kind}", t, "ok")}
            fusions = {f"ours without {name}" for name in FUSIONS}
            assert found == {"matmul", "ours", *fusions, *peers}
    absent = [r for r in rows if r.provider == "megatron"]
    assert absent and all(r.status == "absent" and r.reason for r in absent)
    own = next(r for r in rows if r.who() == "ours" and r.direction == "fwd" and r.ranks == 2 and r.op == "layer.gpt")
    assert own.flops == (2 * 8 * 12 * 32 * 32 + 2 * 8 * 8 * 32) // 2
    assert own.metrics["error"] <= 2


def test_memory_smoke(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert main(["memory", "--quick", "--save", str(tmp_path)]) == 0
    rows = {(r.op, r.provider, r.ranks): r for r in load(tmp_path)}
    plain, sharded = rows["memory.gpt2", "hugging-face", 1], rows["memory.gpt2", "ours", 2]
    assert sharded.status == "ok"
    assert 0 < sharded.bytes < plain.bytes / 2
    assert rows["memory.gpt_layer", "paper: TP+SP, selective", 2].metrics["sbh_over_t"] == 34
    for kind in ("gpt", "llama"):
        for t in (1, 2):
            kept = {who: row for (op, who, count), row in rows.items() if (op, count) == (f"memory.{kind}_layer", t)}
            assert {row.status for row in kept.values()} == {"ok"}
            ours = [row.bytes for who, row in kept.items() if who.startswith("ours")]
            assert len(ours) == 6
            assert ours == sorted(ours, reverse=True)
    # What is small beside 20 is less so at this size: 64 tokens, 128 features, heads of 64.
    assert rows["memory.gpt_layer", "ours + recompute_activation", 2].metrics["sbh_over_t"] < 20.75
    assert 34 <= rows["memory.gpt_layer", "TP+SP as Megatron", 2].metrics["sbh_over_t"] < 34.5


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["norm", "--peers", "nobody"], "--peers nobody: unknown; known are eager"),
        *(
            ([name, "--peers", "nobody"], "--peers nobody: unknown")
            for name in ("host", "memory", "coverage", "loopback")
        ),
        (["all", "--peers", "nobody"], "--peers nobody: unknown"),
        (["all", "--ranks", "3"], "expected an even multiple of --heads 3"),
        (["all", "--ranks", "1"], "at least 2 ranks"),
        (["norm", "--seconds", "-1"], "expected more than 0"),
        (["norm", "--save", "/dev/null/folder"], "cannot be written to"),
        (["linear", "--rows", "15"], "--rows 15: expected a multiple of --ranks 2"),
        (["linear", "--ranks", "1"], "at least 2 ranks"),
        (["linear", "--link", "fast"], "expected a rate such as 1gbit"),
        (["gemm"], "gemm: it is measured with --device cuda"),
        (["gemm", "--rows", "12"], "--rows 12: expected a multiple of 8"),
        (["memory", "--hidden", "100", "--heads", "3"], "expected an even multiple of --heads 3"),
        (["memory", "--hidden", "128", "--heads", "8", "--ranks", "3"], "--heads 8: expected a multiple of --ranks 3"),
        (["memory", "--rows", "63"], "--rows 63: expected a multiple of --ranks 2"),
        (["layer", "--peers", "nobody"], "--peers nobody: unknown; known are eager"),
        (["layer", "--hidden", "100", "--heads", "3"], "expected an even multiple of --heads 3"),
        (["layer", "--heads", "4", "--ranks", "3", "--hidden", "64"], "--heads 4: expected a multiple of --ranks 3"),
        (["layer", "--rows", "129"], "--rows 129: expected a multiple of --ranks 2"),
    ],
)
def test_bad_input_says_what_to_do(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--quick"] if command[0] != "compare" else command) == 2
    assert message in capsys.readouterr().err


def test_bad_input_of_all_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli.COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, name, lambda args, session: pytest.fail("measured"))
    for extra in (["--peers", "nobody"], ["--ranks", "3"]):
        assert main(["all", "--quick", *extra]) == 2


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NotHere("no such device"), "absent", "no such device"),
        (BenchError("rank 1 of 2 failed"), "failed", "rank 1 of 2 failed"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_all_goes_on_after_what_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str
) -> None:
    """Only what this machine cannot do is absent; anything else is a failure, and the exit status says so."""
    done = []

    def fail(args: argparse.Namespace, session: Session) -> None:
        raise error

    for name in cli.COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, name, lambda args, session: done.append(args.command))
    monkeypatch.setitem(cli.COMMANDS, "memory", fail)
    assert main(["all", "--quick", "--save", str(tmp_path)]) == (0 if status == "absent" else 1)
    assert done == [name for name in cli.COMMANDS if name != "memory"]
    (row,) = load(tmp_path)
    assert (row.op, row.provider, row.status, row.reason) == ("memory", "ours", status, reason)


def test_what_this_machine_cannot_do_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ["--quick", "--seconds", "0.01"]
    for command in (["gemm", *quick], ["memory", *quick]):
        args = cli.build_parser().parse_args(command)
        session = cli.make_session(args)
        session.device = "cpu" if command[0] == "gemm" else "cuda"
        with pytest.raises(NotHere):
            cli.COMMANDS[command[0]](args, session)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotHere):
        Session("norm", "cuda")
    monkeypatch.setattr(links.shutil, "which", lambda tool: None)
    with pytest.raises(NotHere), links.Network(2):
        pass


def test_all_peers_are_listed_with_the_reason(tmp_path: Path) -> None:
    """Everybody a reader may look for is either measured or absent for a reason."""
    assert main(["norm", *BRIEF, "--rows", "8", "--hidden", "16", "--p", "0", "--dtype", "fp32", "--kind", "rms",
                 "--save", str(tmp_path)]) == 0  # fmt: skip
    assert main(["linear", *BRIEF, "--rows", "16", "--hidden", "8", "--chunks", "--save", str(tmp_path)]) == 0
    rows = load(tmp_path)
    for op, peers in (
        ("norm.rms", {"eager", "compile", "flash-attn", "liger", "quack"}),
        ("linear.all_gather_linear", {"by-hand", "dtensor", "megatron", "symm-mem", "deepspeed"}),
    ):
        found = {row.provider: row for row in rows if row.op == op}
        assert peers <= found.keys()
        assert all(row.status == "ok" or (row.status == "absent" and row.reason) for row in found.values()), found
    assert "no CPU kernels" in next(row.reason for row in rows if row.provider == "symm-mem")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["norm", "--device", "cuda", "--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_rank_that_fails_ends_all_with_its_words() -> None:
    with pytest.raises(BenchError, match=r"rank \d of 2 failed(.|\n)*KeyError: 'op'"):
        ranks.run_ranks(".linear_rank:run", {}, 2)


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


class FakeKernel:
    """``subprocess.run`` for ``ip`` and ``tc``: the namespaces there are; Ctrl-C in the calls of chosen numbers."""

    def __init__(self, *interrupted: int, lacks: str = "nothing") -> None:
        self.interrupted, self.lacks = interrupted, lacks
        self.calls, self.namespaces = 0, set[str]()

    def run(self, command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        deletes = list(command[1:3]) == ["netns", "del"]
        if self.calls in self.interrupted and deletes:
            raise KeyboardInterrupt  # before it took effect
        if deletes:
            self.namespaces.discard(command[3])
        elif list(command[1:3]) == ["netns", "add"]:
            self.namespaces.add(command[3])
        if self.calls in self.interrupted:
            raise KeyboardInterrupt  # after
        return subprocess.CompletedProcess(command, int(self.lacks in command), "", "Unknown device type")


def install(monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel) -> list[Callable[[], None]]:
    """Returns what is to be called at exit."""
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(links.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(links.subprocess, "run", kernel.run)
    monkeypatch.setattr(links.atexit, "register", at_exit.append)
    monkeypatch.setattr(links.atexit, "unregister", at_exit.remove)
    return at_exit


def test_links_interrupted_anywhere_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in any one call, and a second one while the first is cleaned up after."""
    whole = FakeKernel()
    install(monkeypatch, whole)
    with links.Network(2):
        assert len(whole.namespaces) == 3
    assert whole.namespaces == set()
    for first in range(1, whole.calls + 1):
        for second in range(first, whole.calls + 2):
            left = _left_by(monkeypatch, first, second)
            swept_by_the_next_run = {name for name in left if name.endswith("-probe")}
            assert left == swept_by_the_next_run, (first, second)
    assert _left_by(monkeypatch, 1) == set()  # in `ip netns add` of the probe


def _left_by(monkeypatch: pytest.MonkeyPatch, *interrupted: int) -> set[str]:
    kernel = FakeKernel(*interrupted)
    at_exit = install(monkeypatch, kernel)
    with contextlib.suppress(KeyboardInterrupt), links.Network(2):
        pass
    kernel.interrupted = ()
    for call in list(at_exit):
        call()
    return kernel.namespaces


@pytest.mark.parametrize(("lacks", "module"), [("tbf", "sch_tbf"), ("veth", "veth"), ("bridge", "bridge")])
def test_links_say_which_kernel_module_is_missing(monkeypatch: pytest.MonkeyPatch, lacks: str, module: str) -> None:
    kernel = FakeKernel(lacks=lacks)
    install(monkeypatch, kernel)
    with pytest.raises(NotHere, match=rf"Unknown device type.*modprobe {module}"), links.Network(2):
        pass
    assert kernel.namespaces == set()


def test_interrupted_links_are_removed_too(tmp_path: Path) -> None:
    """Ctrl-C while ranks run inside the namespaces: none of them stays, and no file is half written."""
    reason = links.why_not()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "bench", "linear", "--quick", "--seconds", "60", "--rows", "64", "--hidden", "32",
               "--link", "10mbit", "--save", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stderr is not None
    mark = f"{links.PREFIX}-{process.pid}-"
    for line in process.stderr:  # the ranks are up when they report what they do
        if "check" in line:
            break
    assert mark in namespaces()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "bench: interrupted" in said
    assert mark not in namespaces()
    assert list(tmp_path.iterdir()) == []  # nothing was measured, nothing half written
