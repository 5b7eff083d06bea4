"""``python -m seqpar_kernels`` and the table of backends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqpar_kernels
from seqpar_kernels.__main__ import report
from seqpar_kernels.kernels import BACKENDS, select, why_not


def test_report_gives_a_reason_for_every_no() -> None:
    text = report()
    for line in text.splitlines():
        if " no" in line and ":" in line:
            assert line.split(": ", 1)[1].strip(), line
    assert "CPU kernels        yes" in text
    ran = subprocess.run([sys.executable, "-m", "seqpar_kernels"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().splitlines()[0] == text.splitlines()[0]


def test_a_source_tree_that_was_not_built_says_so(tmp_path: Path) -> None:
    """It imports: backend "reference" runs. Whoever asks for the kernels is told what is missing and what to do."""
    package = Path(seqpar_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "seqpar_kernels", ignore=shutil.ignore_patterns("_native*.so", "__pycache__"))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = """
import torch, seqpar_kernels
x, weight = torch.ones(2, 8), torch.ones(8)
print(seqpar_kernels.dropout_add_rms_norm(x, x, weight, backend="reference").numel())
print(seqpar_kernels.__file__)
seqpar_kernels.dropout_add_rms_norm(x, x, weight)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.split() == ["16", str(tmp_path / "seqpar_kernels" / "__init__.py")]
    report = subprocess.run(
        [sys.executable, "-m", "seqpar_kernels"], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    missing = f"there is no seqpar_kernels.kernels._native in {tmp_path / 'seqpar_kernels' / 'kernels'}"
    for said in (done.stderr, report.stdout):
        assert missing in said and "run pip install -e . in their folder, or pip install ." in said


def test_selection() -> None:
    cpu = torch.device("cpu")
    assert select(None, cpu) is select("native", cpu) is select("cpu", cpu)
    assert why_not("cuda", cpu) and why_not("reference", cpu) is None
    with pytest.raises(ValueError, match="backend: expected one of"):
        select("x", cpu)
    with pytest.raises(RuntimeError, match="no fused kernel can run on meta"):
        select(None, torch.device("meta"))
    assert set(BACKENDS) == {"native", "cpu", "cuda", "triton", "reference"}
