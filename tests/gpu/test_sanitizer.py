"""compute-sanitizer over every CUDA kernel (:mod:`.sanitize`); skipped, with the reason, where it is not to be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seqpar_kernels.kernels import why_not

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards",
    "initcheck": "ERROR SUMMARY: 0 errors",
    "synccheck": "ERROR SUMMARY: 0 errors",
}


def find_sanitizer() -> str | None:
    """On PATH, or where toolkits put it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All tools side by side: each spends its time on the CPU."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("no compute-sanitizer here: neither on PATH nor in CUDA_HOME or /usr/local/cuda")
    reason = why_not("cuda", torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    command = [sanitizer, "--error-exitcode", "9", "--target-processes", "all", "--print-limit", "20"]
    script = [sys.executable, "-m", "tests.gpu.sanitize"]
    started = {
        tool: subprocess.Popen(
            [*command, "--tool", tool, *script],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for tool in TOOLS
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_kernel_is_clean(tool: str, running: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = running[tool].communicate(timeout=180)
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or its driver (Device not supported)")
    assert running[tool].returncode == 0 and TOOLS[tool] in output, output[-4000:]
