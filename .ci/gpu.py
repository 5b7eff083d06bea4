"""What a GPU machine is for: the tests marked gpu, then the benchmarks, in one results file: gpu_out/results.json.

Uses this interpreter's own torch when it sees a GPU, and then needs no network (wheels of what is missing, such as
pytest or pybind11, may lie in .whl/); otherwise makes .venv. Arguments are passed on to pytest.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "gpu_out"
SITE = ROOT / "build" / "site"  # where carried wheels are unpacked
NEEDED = {"pytest": 7, "pybind11": 2, "setuptools": 77}  # and the oldest major version that will do


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
    """For the processes started here: the checkout and the carried wheels first."""
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    if wheels:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
        sys.path.insert(0, str(SITE))
    missing = [f"{name} >= {oldest}" for name, oldest in NEEDED.items() if major_version(name) < oldest]
    if missing:
        sys.exit(f"make gpu: {sys.executable} lacks {', '.join(missing)}: install them, or put their wheels in .whl/")
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([str(SITE / "bin"), os.environ.get("PATH", "")]),
    }


def build(env: dict[str, str]) -> None:
    """The extension beside its sources, for this machine's device alone unless SEQPAR_CUDA_ARCHS says otherwise."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major >= 9 else ''}-real"
    env = {"SEQPAR_CUDA_ARCHS": arch, "SEQPAR_REQUIRE_CUDA": "1", **env}
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT, env=env, check=True)


def run_tests(env: dict[str, str]) -> dict[str, Any]:
    import torch

    marks = "gpu or multigpu" if torch.cuda.device_count() > 1 else "gpu and not multigpu"
    report = OUT / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests", "-m", marks, f"--junitxml={report}", *sys.argv[1:]]
    status = subprocess.run(command, cwd=ROOT, env=env).returncode
    if not report.is_file():
        return {"status": status}
    found = verdicts(report)
    report.unlink()
    return {"status": status, **found}


def verdicts(report: Path) -> dict[str, Any]:
    """How many tests passed, failed, were skipped; which; and why, in the first line of what each said."""
    cases: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        told = {child.tag: (child.get("message") or "").partition("\n")[0] for child in case}
        verdict = "failed" if told.keys() & {"failure", "error"} else "skipped" if "skipped" in told else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        cases[verdict][name] = next((told[tag] for tag in ("failure", "error", "skipped") if tag in told), "")
    counts = {f"{verdict}_count": len(names) for verdict, names in cases.items()}
    return {**counts, **cases, "passed": list(cases["passed"])}


def run_benchmarks(env: dict[str, str]) -> dict[str, Any]:
    """``python -m bench all --device cuda --quick``; its rows, one dictionary each."""
    folder = OUT / "bench"
    command = [sys.executable, "-m", "bench", "all", "--device", "cuda", "--quick", "--save", str(folder)]
    status = subprocess.run(command, cwd=ROOT, env=env).returncode
    rows = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return {"status": status, "rows": rows}


def machine() -> dict[str, Any]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main() -> int:
    if not sees_gpu():
        use_venv()
    shutil.rmtree(OUT, ignore_errors=True)  # of another run: one results file and one of rows is all there will be
    OUT.mkdir()
    env = environment()
    build(env)
    results: dict[str, Any] = {"machine": machine()}
    for name, stage in (("tests", run_tests), ("benchmarks", run_benchmarks)):
        start = time.monotonic()
        results[name] = {**stage(env), "seconds": round(time.monotonic() - start)}
    (OUT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"results: {(OUT / 'results.json').relative_to(ROOT)}")
    return 1 if results["tests"]["status"] or results["benchmarks"]["status"] else 0


if __name__ == "__main__":
    sys.exit(main())
