"""``python -m seqpar_kernels`` and the table of backends."""

import subprocess
import sys

import pytest
import torch

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


def test_selection() -> None:
    cpu = torch.device("cpu")
    assert select(None, cpu) is select("native", cpu) is select("cpu", cpu)
    assert why_not("cuda", cpu) and why_not("reference", cpu) is None
    with pytest.raises(ValueError, match="backend: expected one of"):
        select("x", cpu)
    with pytest.raises(RuntimeError, match="no fused kernel can run on meta"):
        select(None, torch.device("meta"))
    assert set(BACKENDS) == {"native", "cpu", "cuda", "triton", "reference"}
