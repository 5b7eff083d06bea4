"""The long-context example: twice the sequence on two ranks, in about the memory that one takes for half of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_long_context.py"
LENGTH = 2048


def run(ranks: int, length: int, out: Path) -> list[dict[str, Any]]:
    # Small blocks come from the operating system and go back to it, so that the resident set is what is held.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXAMPLE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*(launch if ranks > 1 else [sys.executable]), str(EXAMPLE), "--length", str(length), "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.timeout(900)  # starts five processes, one after the other
def test_twice_the_sequence_in_the_memory_of_one(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of the resident set is Linux's")
    (half,), (whole,) = (run(1, n, tmp_path / str(n)) for n in (LENGTH, 2 * LENGTH))
    shared = run(2, 2 * LENGTH, tmp_path / "shared")
    for rank in shared:
        assert rank["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert rank["peak_mib"] <= 1.25 * half["peak_mib"] < 0.8 * whole["peak_mib"]
