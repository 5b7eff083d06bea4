"""What a GPU machine is for: the tests marked gpu, then the benchmarks, each step on its own clock.

    python .ci/gpu.py [--out DIR] [--figures] [--seconds N] [--only STEP ...] [--build-only] [pytest's arguments]

Uses this interpreter's own torch when it sees a GPU, and then needs no network (wheels of what is missing, such as
pytest or pybind11, may lie in .whl/); otherwise makes .venv. ``--figures`` measures the published shapes in place of
tests and a quick look. Whatever a step has found by the time it ends, fails or is stopped is in DIR: results.json (the
machine, every step, every test's verdict), rows.jsonl (of the benchmarks), ncu.csv (counters of the kernels, where
Nsight Compute is to be had) and log.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "site"  # where carried wheels are unpacked
NEEDED = {"pytest": 7, "pybind11": 2, "setuptools": 0}  # and the oldest major version that will do
MOST_TOLD = 30  # of what did not pass, at the end of the output
GRACE_SECONDS = 15.0  # between being asked to end and being ended


@dataclass(frozen=True)
class Step:
    """A module to run, and the seconds it may take.

    ``beside``: the step that it runs along with, since neither measures anything. ``at_once``: tests side by side, each
    of which may take ``each`` seconds.
    """

    name: str
    command: list[str]
    limit: float
    beside: str = ""
    at_once: int = 1
    each: float = 100.0

    @property
    def is_bench(self) -> bool:
        return self.command[0] == "bench"


def suite(name: str, limit: float, marks: str, *paths: str, beside: str = "", **more: Any) -> Step:
    return Step(name, ["pytest", *(f"tests/{path}" for path in paths), "-m", marks], limit, beside, **more)


def bench(name: str, limit: float, *more: str, beside: str = "", of: str = "") -> Step:
    return Step(name, ["bench", of or name, "--device", "cuda", *more], limit, beside)


#: First of all: without it nothing else can run.
BUILD = Step("build", ["build"], 280.0)

#: What Nsight Compute reads of each kernel that figures are claimed of; our kernels by their names, torch's not.
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
NCU_KERNELS = (
    "^(forward_kernel|backward_kernel|reduce_partials_kernel|reduce_vectors_kernel|generic_forward_kernel|"
    "generic_backward_kernel|norm_forward_kernel|norm_forward_chunked_kernel|norm_backward_kernel|"
    "norm_backward_chunked_kernel|sum_partials_kernel|reduce_shards_kernel|gemm_kernel|attention_forward_kernel|"
    "attention_queries_kernel|attention_keys_kernel)"
)
#: Those of tests/ops run on either device. Its other files have what only the CPU's environment has.
KERNEL_TESTS = (
    "gpu/test_device.py",
    "gpu/test_gemm.py",
    "gpu/test_grouped.py",
    "gpu/test_layer.py",
    "gpu/test_ops.py",
    "ops/test_norm.py",
    "ops/test_decompositions.py",
    "gpu/test_attention.py",
)
HIDDEN = ("2048", "4096", "8192", "16384")
#: In the order in which they are worth having, should time run out.
QUICK = [
    suite("tests", 200.0, "gpu and not alone", *KERNEL_TESTS, at_once=8),
    suite(
        "ranks", 200.0, "gpu and not alone", "gpu/test_transports.py", "gpu/test_ranks.py", beside="tests", at_once=3
    ),
    suite("sanitizer", 200.0, "gpu and not alone", "gpu/test_sanitizer.py", beside="tests", each=190.0),
    bench("coverage", 150.0, "--dtype", "bf16", "fp32", beside="tests"),
    bench("linear", 150.0, "--quick", "--dtype", "bf16", "--chunks", "2", beside="tests"),
    suite("tests alone", 90.0, "gpu and alone", "gpu"),
    bench("norm", 130.0, "--quick", "--rows", "8192", "--hidden", "4096", "16384", "--kind", "rms"),
    bench("reduce", 40.0, "--quick", "--dtype", "bf16", "--rows", "2048", "--hidden", "8192", "--p", "0.1"),
    bench("gemm", 60.0, "--quick"),
    bench("moe", 40.0, "--quick", "--dtype", "bf16", "fp32"),
    bench("loopback", 100.0, "--quick", "--chunks", "2"),
    bench("layer", 100.0, "--quick", "--size", "llama-8b", "--virtual-ranks", "8"),
    bench("attention", 60.0, "--quick", "--virtual-ranks", "2", "--kv-heads", "8"),
    Step("ncu", ["ncu", "tests.gpu.profile"], 60.0),
    bench("host", 60.0, "--quick"),
]

#: What the issues and README quote, at full length: a run of its own.
FIGURES = [
    bench("norm", 200.0, "--seconds", "0.15", "--dtype", "bf16", "--rows", "16384", "--p", "0.1"),
    bench("layer", 170.0, "--seconds", "0.4", "--size", "llama-8b", "gpt3-13b", "--virtual-ranks", "4", "8"),
    bench("gemm", 50.0, "--seconds", "0.2"),
    bench("reduce", 50.0, "--seconds", "0.1", "--dtype", "bf16"),
    bench("loopback", 110.0, "--seconds", "0.2", "--chunks", "1", "2", "4"),
    bench("attention", 110.0, "--seconds", "0.2", "--seq", "16384", "--kv-heads", "8", "--virtual-ranks", "2", "8"),
    bench(
        "attention, window",
        60.0,
        *("--quick", "--seq", "16384", "--kv-heads", "8", "--window", "1024", "--virtual-ranks", "4"),
        of="attention",
    ),
    bench("norm, p 0", 80.0, "--quick", "--rows", "16384", "--hidden", *HIDDEN, "--p", "0", "--kind", "rms", of="norm"),
    Step("ncu", ["ncu", "tests.gpu.profile"], 60.0),
    # Processes that take turns on one device: which of them are right, not how well they overlap.
    bench("linear", 60.0, "--quick", "--dtype", "bf16", "--chunks", "2"),
    bench("norm of 512 rows", 40.0, "--quick", "--dtype", "bf16", "--rows", "512", "--hidden", "4096", of="norm"),
]


def sees_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def use_venv() -> None:
    """Starts over inside .venv, once; not at all where no driver says that there is a GPU."""
    has_driver = shutil.which("nvidia-smi") or any(Path("/dev").glob("nvidia*"))
    if not has_driver or Path(sys.prefix) == ROOT / ".venv":
        sys.exit("make gpu: no GPU to test on: torch sees no CUDA device (`make test` runs what needs none)")
    subprocess.run(["make", ".venv/dev.stamp"], cwd=ROOT, check=True)
    python = str(ROOT / ".venv" / "bin" / "python")
    os.execv(python, [python, __file__, *sys.argv[1:]])


def major_version(distribution: str) -> int:
    try:
        return int(importlib.metadata.version(distribution).split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return -1


def environment() -> dict[str, str]:
    """For the processes started here: the checkout and the carried wheels first, and this interpreter's own tools."""
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    if wheels:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
        sys.path.insert(0, str(SITE))
    missing = [f"{name} >= {oldest}" for name, oldest in NEEDED.items() if major_version(name) < oldest]
    if missing:
        sys.exit(f"make gpu: {sys.executable} lacks {', '.join(missing)}: install them, or put their wheels in .whl/")
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    tools = [str(SITE / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join(tools),
        "PYTHONUNBUFFERED": "1",
    }


def build() -> None:
    """The extension beside its sources, for this machine's device alone unless SEQPAR_CUDA_ARCHS says otherwise.

    By CMake, without setuptools: a machine's own may be too old for pyproject.toml.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    given = {"SEQPAR_CUDA_ARCHS": f"{major}{minor}{'a' if major >= 9 else ''}-real"}
    given["SEQPAR_JOBS"] = str(len(os.sched_getaffinity(0)))  # memory of a small virtual machine grows as it is used
    os.environ.update({**given, **os.environ, "SEQPAR_REQUIRE_CUDA": "1"})
    spec = importlib.util.spec_from_file_location("seqpar_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    built = setup.cmake_build(ROOT / "build" / "gpu")
    shutil.copy2(built, ROOT.joinpath(*setup.EXTENSION.split(".")[:-1]) / built.name)


def pytest_command(step: Step, report: Path, more: list[str]) -> list[str]:
    """With pytest-xdist where it is to be had: a test that kills its process, or is killed, is then one failure."""
    import torch

    paths, marks = step.command[1:-2], step.command[-1]
    marks = f"({marks}) or multigpu" if torch.cuda.device_count() > 1 else f"({marks}) and not multigpu"
    command = [sys.executable, "-m", "pytest", *paths, "-m", marks, f"--junitxml={report}", "-v", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(step.at_once), "--dist", "worksteal", "--max-worker-restart", "20"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(step.each)]
    return [*command, *more]


def ncu_command(module: str, report: Path) -> list[str] | None:
    """``module`` under Nsight Compute, which leaves the clocks as they are; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    elsewhere = sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)
    ncu = shutil.which("ncu", path=os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin", *elsewhere]))
    if ncu is None:
        return None
    options = ["--clock-control", "none", "--target-processes", "all", "--csv", "--page", "details"]
    for section in NCU_SECTIONS:
        options += ["--section", section]
    options += ["--kernel-name", f"regex:{NCU_KERNELS}", "--log-file", str(report)]
    return [ncu, *options, sys.executable, "-m", module]


def verdicts(report: Path) -> dict[str, Any]:
    """How many tests passed, failed, were skipped; which; and why, in the first line of what each said."""
    cases: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        told = {child.tag: (child.get("message") or "").partition("\n")[0] for child in case}
        verdict = "failed" if told.keys() & {"failure", "error"} else "skipped" if "skipped" in told else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        cases[verdict][name] = next((told[tag] for tag in ("failure", "error", "skipped") if tag in told), "")
    return _counted(cases)


def verdicts_told(log: str) -> dict[str, Any]:
    """The same from what ``pytest -v`` had said when it was stopped; without reasons."""
    cases: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}}
    either_way = r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)|^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)"
    for first, name, other, last in re.findall(either_way, log, re.MULTILINE):
        verdict = (first or last).lower().replace("error", "failed")
        cases[verdict][name or other] = ""
    return _counted(cases)


def _counted(cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    counts = {f"{verdict}_count": len(names) for verdict, names in cases.items()}
    return {**counts, **cases, "passed": list(cases["passed"])}


class Process:
    """One step under way: its output goes to a file of its own, its processes are a group that ends with it."""

    def __init__(self, step: Step, command: list[str], env: dict[str, str], folder: Path, limit: float):
        self.step, self.limit, self.began = step, limit, time.monotonic()
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def end(self) -> tuple[int, str]:
        """Waits, until the limit at most; the exit status, and what had to be done to it."""
        note = ""
        try:
            self._process.wait(max(0.0, self.began + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            note = f"stopped after {self.limit:.0f} s"
            # Benchmarks then save what they have, and pytest reports on what it has run.
            os.kill(self._process.pid, signal.SIGTERM if self.step.is_bench else signal.SIGINT)
            try:
                self._process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                note += ", by force"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever it has left running
        return self._process.wait(), note


class Run:
    """All steps, and what is written of them."""

    def __init__(self, out: Path, seconds: float, env: dict[str, str], more: list[str]):
        self.out, self.env, self.more = out, env, more
        self.deadline = time.monotonic() + seconds
        self.results: dict[str, Any] = {"machine": machine(), "steps": {}}
        self.rows: list[str] = []
        for name in ("results.json", "rows.jsonl", "log.txt", "ncu.csv"):
            (out / name).unlink(missing_ok=True)

    def go(self, steps: list[Step]) -> None:
        with tempfile.TemporaryDirectory(prefix="seqpar-gpu-") as temporary:
            for step in steps:
                if step.beside:
                    continue
                group = [step, *(other for other in steps if other.beside == step.name)]
                under_way = [self._start(one, Path(temporary) / one.name.replace(" ", "-")) for one in group]
                for process, folder in filter(None, under_way):
                    self._finish(process, folder)

    def _start(self, step: Step, folder: Path) -> tuple[Process, Path] | None:
        left = self.deadline - time.monotonic() - GRACE_SECONDS
        if left < 10:
            self._note(step.name, {"status": None, "note": "not run: out of time"})
            return None
        folder.mkdir()
        if step.is_bench:
            command = [sys.executable, "-m", *step.command, "--save", str(folder)]
        elif step is BUILD:
            command = [sys.executable, __file__, "--build-only"]
        elif step.command[0] == "ncu":
            profiled = ncu_command(step.command[1], self.out / "ncu.csv")
            if profiled is None:
                self._note(step.name, {"status": 0, "note": "not run: no ncu on PATH, in CUDA_HOME or /opt/nvidia"})
                return None
            command = profiled
        else:
            command = pytest_command(step, folder / "tests.xml", self.more)
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        return Process(step, command, self.env, folder, min(step.limit, left)), folder

    def _finish(self, process: Process, folder: Path) -> None:
        status, note = process.end()
        found: dict[str, Any] = {
            "status": status,
            "seconds": round(time.monotonic() - process.began, 1),
            "command": " ".join(process.step.command),
        }
        found |= {"note": note} if note else {}
        text, report = process.log.read_text(errors="replace"), folder / "tests.xml"
        if process.step.command[0] == "pytest":
            found |= verdicts(report) if report.is_file() else verdicts_told(text)
        new = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
        if process.step.beside:
            new = list(map(untimed, new))
        self.rows += new
        found |= {"rows": len(new)} if process.step.is_bench else {}
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n==== {process.step.name} ====\n{text}")
        if status:
            print("\n".join(text.splitlines()[-40:]), flush=True)
        self._note(process.step.name, found)

    def _note(self, name: str, found: dict[str, Any]) -> None:
        self.results["steps"][name] = found
        replace(self.out / "results.json", json.dumps(self.results, indent=1) + "\n")
        replace(self.out / "rows.jsonl", "".join(line + "\n" for line in self.rows))

    def failed(self) -> bool:
        return any(found["status"] != 0 for found in self.results["steps"].values())

    def summary(self, out: IO[str]) -> None:
        """Whatever did not pass, with the reason; figures in short; a line a step: a reader may get the end alone."""
        told = []
        for found in self.results["steps"].values():
            for verdict in ("failed", "skipped"):
                for test, reason in found.get(verdict, {}).items():
                    told.append(f"{verdict}: {test.removeprefix('tests.')}: {reason[:160]}")
        for row in map(json.loads, self.rows):
            if row["status"] in ("wrong", "failed"):
                told.append(f"{row['status']}: {row['op']} {row['provider']} {row['shape']}: {row['reason'][:160]}")
        told[MOST_TOLD:] = [f"and {len(told) - MOST_TOLD} more: results.json"] if len(told) > MOST_TOLD else []
        for line in (*told, *digest(self.rows)):
            print(line, file=out)
        for name, found in self.results["steps"].items():
            counts = [f"{found[f'{v}_count']} {v}" for v in ("passed", "failed", "skipped") if f"{v}_count" in found]
            more = [*counts, *([f"{found['rows']} rows"] if "rows" in found else []), found.get("note", "")]
            state = "ok" if found["status"] == 0 else f"status {found['status']}"
            print(f"{name:<16} {state:<12} {found.get('seconds', 0):>6} s  {', '.join(filter(None, more))}", file=out)


def untimed(line: str) -> str:
    """A row of a step that had the device not to itself: what it says of function, not its times."""
    row = json.loads(line)
    times = ("p20_ms", "p50_ms", "p80_ms", "percent")
    return json.dumps(
        {**row, **{name: None for name in times if name in row}, **({"samples": 0} if "samples" in row else {})}
    )


def digest(rows: list[str]) -> list[str]:
    """A line for each question that ours has answered: its times, percents of the ceiling, and the fastest other."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.schema import parse_row

    answered = [row for row in (parse_row(line, "rows.jsonl") for line in rows) if row.p50_ms is not None]
    lines = []
    for question in dict.fromkeys(row.question() for row in answered):
        asked = sorted((row for row in answered if row.question() == question), key=lambda row: row.p50_ms)
        own = [row for row in asked if row.provider.startswith("ours")]
        if not own:
            continue
        told = [f"{r.who()} {r.p50_ms:.4g} ms" + (f" ({r.percent:.0f} %)" if r.percent else "") for r in own]
        told += [f"{r.who()} {r.p50_ms:.4g}" for r in asked if r not in own and r.provider not in ("copy", "matmul")][
            :1
        ]
        lines.append(f"{own[0].label()}: {', '.join(told)}")
    return lines


def replace(path: Path, text: str) -> None:
    """All of it or what was there before."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


def machine() -> dict[str, Any]:
    import torch

    def said(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    names = ("driver_version", "compute_mode", "mig.mode.current", "clocks.max.sm", "clocks.max.memory", "memory.total")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        # A copy of a checkout may belong to somebody else, or have no history at all.
        "commit": os.environ.get("SEQPAR_COMMIT") or said("git", "-c", "safe.directory=*", "rev-parse", "HEAD"),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "smi": {name: said("nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader") for name in names},
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "nvcc": ((said("nvcc", "--version") or "").splitlines() or [None])[-1],
    }


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_out", help="default: gpu_out")
    parser.add_argument(
        "--figures", action="store_true", help="the published shapes in place of tests and a quick look"
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="of all steps together (default: 470; figures: 570)"
    )
    parser.add_argument("--build-only", action="store_true", help="build the extension for this machine, here")
    parser.add_argument("--only", nargs="+", default=None, metavar="STEP", help="these steps alone")
    args, more = parser.parse_known_args(arguments)
    known = [step.name for step in (FIGURES if args.figures else QUICK)]
    for name in args.only or ():
        if name not in known:
            parser.error(f"--only {name}: expected some of {', '.join(known)}")
    args.seconds = args.seconds if args.seconds is not None else 570.0 if args.figures else 470.0
    return args, more


def main() -> int:
    args, more = parse(sys.argv[1:])
    if not sees_gpu():
        use_venv()
    if args.build_only:
        build()
        return 0
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    env = environment()
    os.environ.update(env)
    steps = [s for s in (FIGURES if args.figures else QUICK) if args.only is None or s.name in args.only]
    if args.only is not None:  # what they would run beside may not be among them
        steps = [Step(s.name, s.command, s.limit) for s in steps]
    run = Run(args.out, args.seconds - (time.monotonic() - began), env, more)
    run.go([BUILD])
    if not run.failed():
        run.go(steps)
    print(f"\nresults in {args.out}")
    run.summary(sys.stdout)
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
