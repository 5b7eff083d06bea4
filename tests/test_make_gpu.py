"""What ``make gpu`` runs (.ci/gpu.py), as far as it can be seen without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available() or any(Path("/dev").glob("nvidia*")), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}  # no nvidia-smi
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode != 0
    assert "make gpu: no GPU to test on: torch sees no CUDA device" in done.stderr


def test_results_name_what_failed_and_why_others_were_skipped(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("seqpar_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    suite = tmp_path / "test_three.py"
    suite.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_absent(): pytest.skip('no such tool here')\n"
    )
    report = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", f"--junitxml={report}", str(suite)]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 1
    found = gpu.verdicts(report)
    assert [found[f"{verdict}_count"] for verdict in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert found["passed"] == ["test_three::test_good"]
    assert found["failed"] == {"test_three::test_bad": "assert 1 == 2"}
    assert found["skipped"] == {"test_three::test_absent": "no such tool here"}
