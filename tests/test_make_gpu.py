"""What ``make gpu`` runs (.ci/gpu.py), as far as it can be seen without a GPU."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("seqpar_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "seqpar_gpu", module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available() or any(Path("/dev").glob("nvidia*")), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}  # no nvidia-smi
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode != 0
    assert "make gpu: no GPU to test on: torch sees no CUDA device" in done.stderr


SUITE = """import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_absent(): pytest.skip('no such tool here')
"""


def test_results_name_what_failed_and_why_others_were_skipped(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    suite, report = tmp_path / "tests" / "test_three.py", tmp_path / "tests.xml"
    suite.write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-v", "-c", "/dev/null", f"--junitxml={report}", "tests/test_three.py"]
    done = subprocess.run([*command, f"--rootdir={tmp_path}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    found = gpu.verdicts(report)
    assert [found[f"{verdict}_count"] for verdict in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert found["passed"] == ["tests.test_three::test_good"]
    assert found["failed"] == {"tests.test_three::test_bad": "assert 1 == 2"}
    assert found["skipped"] == {"tests.test_three::test_absent": "no such tool here"}
    told = gpu.verdicts_told(done.stdout)  # what is left of a run that had to be killed
    assert told["passed"] == ["tests/test_three.py::test_good"]
    assert list(told["failed"]) == ["tests/test_three.py::test_bad"]
    assert gpu.verdicts_told("[gw0] [ 50%] PASSED tests/a.py::test_x \n")["passed"] == ["tests/a.py::test_x"]


BENCH = """import json, pathlib, signal, sys, time
what, folder = sys.argv[1], pathlib.Path(sys.argv[-1])
row = {"op": what, "provider": "ours", "shape": [], "p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0, "samples": 9}
row |= {"status": "wrong" if what == "bad" else "ok", "reason": "so"}
(folder / "rows.jsonl").write_text(json.dumps(row) + "\\n")
print("ran", what)
if what == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)
sys.exit(what == "bad")
"""


def test_a_step_that_hangs_or_fails_takes_nothing_from_the_others(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()  # else an editable install's own bench/ is found first
    (tmp_path / "bench" / "__main__.py").write_text(BENCH)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_three.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "machine", lambda: {"devices": ["none"]})
    steps = [
        gpu.suite("tests", 60.0, "not alone", "test_three.py"),
        gpu.bench("good", 60.0, beside="tests"),
        gpu.bench("hangs", 2.0),
        gpu.bench("bad", 60.0),
    ]
    run = gpu.Run(tmp_path, 120.0, os.environ | {"PYTHONUNBUFFERED": "1"}, [])
    run.go(steps)
    found = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: found[name]["status"] for name in found} == {"tests": 1, "good": 0, "hangs": -9, "bad": 1}
    assert found["hangs"]["note"] == "stopped after 2 s, by force"
    assert (found["tests"]["passed_count"], found["tests"]["failed_count"]) == (1, 1)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    # Times that were taken beside other work are none.
    assert [(row["op"], row["p50_ms"]) for row in rows] == [("good", None), ("hangs", 1.0), ("bad", 1.0)]
    assert "ran hangs" in (tmp_path / "log.txt").read_text()
    told = io.StringIO()
    run.summary(told)
    assert "failed: test_three::test_bad: assert 1 == 2" in told.getvalue()
    assert "wrong: bad ours []: so" in told.getvalue()
    assert run.failed()
    monkeypatch.setattr(gpu, "MOST_TOLD", 1)
    short = io.StringIO()
    run.summary(short)
    assert "and 2 more: results.json" in short.getvalue() and "wrong: bad" not in short.getvalue()
    assert short.getvalue().splitlines()[-1].startswith("bad ")

    late = gpu.Run(tmp_path, 1.0, dict(os.environ), [])
    late.go(steps[3:])
    assert json.loads((tmp_path / "results.json").read_text())["steps"]["bad"]["note"] == "not run: out of time"
    assert late.failed()


@pytest.mark.skipif(torch.cuda.is_available() or any(Path("/dev").glob("nvidia*")), reason="there it would build")
def test_a_build_that_fails_is_in_the_results(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is run then, and why is told. It fails here for want of a GPU."""
    monkeypatch.setattr(gpu, "machine", dict)
    monkeypatch.setattr(gpu, "sees_gpu", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr(os, "environ", os.environ.copy())  # it sets variables for whatever it starts
    os.environ["PATH"] = str(tmp_path)
    assert gpu.main() == 1
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert list(steps) == ["build"] and steps["build"]["status"] == 1
    assert "no GPU to test on" in (tmp_path / "log.txt").read_text()


def test_the_extension_is_built_where_the_package_looks_for_it(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere it would be ignored, and every test of a CUDA kernel skipped."""
    from seqpar_kernels.kernels import native

    build = "from pathlib import Path\ndef cmake_build(folder):\n    (Path(__file__).parent / '_native.so').touch()\n"
    names = (ROOT / "setup.py").read_text().partition("EXTENSION = ")[2].splitlines()[0]
    (tmp_path / "setup.py").write_text(f"{build}    return Path(__file__).parent / '_native.so'\nEXTENSION = {names}\n")
    place = Path(native.__file__).relative_to(ROOT).parent
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu.build()
    assert [file.name for file in (tmp_path / place).iterdir()] == ["_native.so"]


def test_figures_in_short(gpu: ModuleType) -> None:
    common = {"op": "norm.rms", "direction": "fwd", "shape": [8, 4], "dtype": "bf16", "params": {"p": 0.1}}
    times = {"ours": 1.0, "ours-triton": 2.0, "copy": 0.5, "eager": 4.0, "compile": 3.0}
    rows = [
        json.dumps({**common, "provider": name, "p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "percent": 92.4})
        for name, ms in times.items()
    ]
    rows.append(json.dumps({**common, "provider": "liger", "status": "absent", "reason": "not installed"}))
    (line,) = gpu.digest(rows)
    assert line == "norm.rms fwd 8x4 bf16 p=0.1: ours 1 ms (92 %), ours-triton 2 ms (92 %), compile 3"


def test_counters_are_read_where_there_is_a_profiler(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for ncu writes what it was told to its log file."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setattr(gpu, "machine", dict)
    step = next(step for step in gpu.QUICK if step.name == "ncu")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    run = gpu.Run(tmp_path, 60.0, dict(os.environ), [])
    run.go([step])
    assert "no ncu on PATH" in run.results["steps"]["ncu"]["note"] and not run.failed()
    ncu = tmp_path / "ncu"
    write = "open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(str(sys.argv))"
    ncu.write_text(f"#!{sys.executable}\nimport sys\n{write}\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    run.go([step])
    told = (tmp_path / "ncu.csv").read_text()
    assert "'--clock-control', 'none'" in told and told.endswith("'-m', 'tests.gpu.profile']")
    assert not run.failed()


def test_what_is_profiled_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gpu import profile

    profile.norms("native", torch.device("cpu"), [(5, 64)])
    profile.sums("native", torch.device("cpu"), (3, 5, 64))
    profile.attention(torch.device("cpu"), (5, 4, 2, 16))


def test_profiled_attention_kernels_are_those_that_there_are(gpu: ModuleType) -> None:
    """By the names that Triton gives them, which are those of the functions."""
    there = set()
    for path in (ROOT / "seqpar_kernels" / "kernels").glob("triton_attention*.py"):
        there |= set(re.findall(r"^def (attention_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert len(there) == 3 and all(re.match(gpu.NCU_KERNELS, name) for name in there)


def test_every_file_of_gpu_tests_is_in_a_step(gpu: ModuleType) -> None:
    paths = {part for step in gpu.QUICK for part in step.command if part.startswith("tests/")} - {"tests/gpu"}
    assert {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")} <= paths
    assert all((ROOT / path).is_file() for path in paths)


def test_benchmarks_know_what_they_are_told(gpu: ModuleType) -> None:
    from bench.cli import COMMANDS, build_parser

    for step in [*gpu.QUICK, *gpu.FIGURES]:
        if step.is_bench:
            assert build_parser().parse_args(step.command[1:]).command in COMMANDS


def test_steps_fit_the_time_and_the_files(gpu: ModuleType) -> None:
    """Each limit is for a step that hangs; together with what they run beside, one of them may."""
    for args, steps in ((gpu.parse([])[0], gpu.QUICK), (gpu.parse(["--figures"])[0], gpu.FIGURES)):
        assert args.seconds <= 580
        assert all(step.limit < args.seconds / 2 or args.figures for step in steps)
        names = [step.name for step in steps]
        assert len(names) == len(set(names)) and {s.beside for s in steps} <= {"", *names}


def test_arguments_that_are_not_ours_are_pytests(gpu: ModuleType) -> None:
    args, more = gpu.parse(["--only", "tests", "--out", "x", "-k", "masks", "--lf"])
    assert (args.only, str(args.out), more) == (["tests"], "x", ["-k", "masks", "--lf"])
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "nothing"])
