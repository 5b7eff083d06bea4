"""Triton's interpreter as users have it: backend="triton" rounds bfloat16 as a GPU, nothing else is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")
ROOT = Path(__file__).resolve().parents[2]


def _python(code: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


ROUNDED = """
import torch, seqpar_kernels as sp
from triton.runtime import interpreter
before = interpreter._convert_float
torch.manual_seed(0)
x, residual, w = torch.randn(6, 96).bfloat16(), torch.randn(6, 96).bfloat16(), torch.randn(96).bfloat16()
exact = x.double() + residual.double()
z = sp.dropout_add(x, residual, backend="triton")
assert torch.equal(z, exact.bfloat16()), (z - exact.bfloat16()).abs().max()  # to the nearest, ties to even
assert torch.equal(z, sp.dropout_add(x, residual, backend="reference"))
results = []
for backend in ("triton", "reference"):
    leaves = [t.clone().requires_grad_() for t in (x, residual, w)]
    y = sp.dropout_add_rms_norm(*leaves, p=0.1, seed=3, backend=backend)
    y.float().square().sum().backward()
    results.append((y, *(t.grad for t in leaves)))
for ours, theirs in zip(*results, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)
    assert (ours == theirs).float().mean() > 0.9  # truncation agrees in half of the elements
assert interpreter._convert_float is before, "other kernels of the process are none of our business"
print("rounded")
"""

UNKNOWN = """
from triton.runtime import interpreter
del interpreter._convert_float  # another version of Triton
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from seqpar_kernels.kernels import triton_norm
print([str(w.message) for w in caught if "bfloat16" in str(w.message)])
from seqpar_kernels.__main__ import report
print(report())
"""


def test_bf16_is_rounded_for_users() -> None:
    assert "rounded" in _python(ROUNDED)


def test_a_triton_that_cannot_be_made_to_says_so() -> None:
    said = _python(UNKNOWN)
    assert "bfloat16 results of backend='triton' differ on CPU" in said
    assert "interpreted; bfloat16 is truncated, not rounded as on a GPU" in said


def test_the_report_says_what_is_interpreted() -> None:
    assert "yes: interpreted, rounding as a GPU does" in _python(
        "from seqpar_kernels.__main__ import report; print(report())"
    )
