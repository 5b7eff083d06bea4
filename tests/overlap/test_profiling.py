"""What a trace shows: every wait, matmul and sum under a name that says whom and what for."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.layout import SequenceShard
from seqpar_kernels.overlap import profiling
from seqpar_kernels.overlap.schedule import matmul_scatter

from ..world import World


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def trace_case() -> list[str]:
    """Names with our prefix in the exported trace of a layer's forward and backward."""
    x = torch.randn(1, 8, 6, requires_grad=True)
    w = torch.randn(3, 6, requires_grad=True)
    with torch.profiler.profile() as trace:
        y = sp.all_gather_linear(x, w, group=group(), chunks=2)
        sp.linear_reduce_scatter(y, w.t(), group=group(), chunks=2).sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    ours = [e for e in events if str(e.get("name")).startswith("seqpar::") and e.get("ph") == "X"]
    return [e["name"] for e in sorted(ours, key=lambda e: e["ts"])]


def test_a_profile_names_every_step(world2: World) -> None:
    for rank, names in enumerate(world2.run(trace_case)):
        other = 1 - rank
        gather = [name.partition(": ")[2] for name in names if name.startswith("seqpar::all_gather_linear: ")]
        start = 8 * other
        assert gather == [
            f"send chunk 0 of rank {rank} to rank {other}, expect chunk 0 of rank {other} from rank {other}",
            f"send chunk 1 of rank {rank} to rank {other}, expect chunk 1 of rank {other} from rank {other}",
            f"matmul rows {8 * rank}..{8 * rank + 8}",
            f"wait for chunk 0 of rank {other} from rank {other}",
            f"matmul rows {start}..{start + 5}",
            f"wait for chunk 1 of rank {other} from rank {other}",
            f"matmul rows {start + 5}..{start + 8}",
        ]
        scatter = [name.partition(": ")[2] for name in names if name.startswith("seqpar::linear_reduce_scatter: ")]
        assert f"wait for partial sums for chunk 1 of rank {rank} from rank {other}" in scatter
        assert scatter[-1] == "sum 2 partial results"
        for op, what in (("linear_reduce_scatter", "wgrad"), ("all_gather_linear", "dgrad")):
            assert any(name.startswith(f"seqpar::{op} backward: {what} rows") for name in names), names


def test_nobody_traces_nobody_pays() -> None:
    steps = matmul_scatter(SequenceShard(8, 2, 0), 2)
    assert not profiling.listening()
    assert profiling.traced("op", steps) is steps


def test_nvtx_ranges_open_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a step fails."""
    open_ranges: list[str] = []
    seen: list[str] = []
    nvtx: Any = torch.cuda.nvtx
    monkeypatch.setattr(profiling, "_nvtx", True)
    monkeypatch.setattr(nvtx, "range_push", lambda text: (open_ranges.append(text), seen.append(text)))
    monkeypatch.setattr(nvtx, "range_pop", open_ranges.pop)
    steps = matmul_scatter(SequenceShard(8, 2, 0), 1)
    for step in profiling.traced("op", steps):
        assert open_ranges == [f"seqpar::op: {profiling.describe(step)}"]
    assert not open_ranges and len(seen) == len(steps)

    def failing() -> None:
        for _ in profiling.traced("op", steps):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        failing()
    assert not open_ranges
