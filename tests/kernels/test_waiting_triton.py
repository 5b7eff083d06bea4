"""The engine "fused" without a GPU: its order, its results under Triton's interpreter, its polling kernel compiled."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_waiting_cases as cases
from interpreted import Interpreted

from seqpar_kernels.comm.steps import Compute
from seqpar_kernels.layout import SequenceShard
from seqpar_kernels.overlap import engines, fused_gemm, planner, schedule


@pytest.fixture(scope="module", autouse=True)
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    """Started before the first test here."""
    runner = Interpreted("triton_waiting_cases.py", tmp_path_factory.mktemp("interpreted"))
    yield runner
    runner.end()


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 24, 25, 31])
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_are_visited_in_the_order_of_the_schedule(ranks: int, length: int, chunks: int) -> None:
    outer, inner = 2, 3
    for rank in range(ranks):
        shard = SequenceShard(length, ranks, rank)
        for make, buffer in (
            (schedule.gather_matmul, schedule.SHARD),
            (schedule.matmul_scatter, schedule.PARTIAL_SUMS),
        ):
            steps = make(shard, chunks)
            computed = [s for s in steps if isinstance(s, Compute) and s.stage == "matmul"]
            transfers, rows = fused_gemm.visits(steps, outer, length, inner)
            assert len(rows) == outer * len(computed)
            for i, visit in enumerate(rows):
                step, row = computed[i // outer], i % outer * length
                assert (visit.start, visit.stop) == ((row + step.start) * inner, (row + step.stop) * inner)
                if visit.flag >= 0:
                    transfer = transfers[visit.flag]
                    assert transfer.buffer == buffer and transfer.rows[2:] == (step.start, step.stop)
                    assert rank == (transfer.target if buffer == schedule.SHARD else transfer.source)
            covered = [r for visit in rows for r in range(visit.start, visit.stop)]
            assert sorted(covered) == list(range(outer * length * inner))
            own = {r for visit in rows if visit.flag < 0 for r in range(visit.start, visit.stop)}
            assert len(own) == outer * shard.size * inner
            assert len({visit.flag for visit in rows} - {-1}) == len(transfers)


@pytest.mark.parametrize("name", list(cases.CASES))
def test_interpreted(interpreted: Interpreted, name: str) -> None:
    failure = interpreted.failure(name)
    assert failure is None, failure


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_the_polling_kernel_compiles(sm: int) -> None:
    import triton
    from triton_ahead_of_time import compile_launch, record

    from seqpar_kernels.kernels import triton_gemm

    if not isinstance(triton_gemm.await_kernel, triton.runtime.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled in this process")
    words = torch.zeros(8, dtype=torch.int32)
    (launch,) = record(triton_gemm.await_flag, words, 1, 1, words[:1])
    assert re.search(r"(ld|atom)\.global\.sys\.acquire|ld\.acquire\.sys", compile_launch(launch, sm).ptx)


def test_auto_takes_it_where_the_variable_asks() -> None:
    settled = planner.Plan("p2p", 4, "the model's best")
    taken = engines.rather(engines.FUSED, settled, "auto", "")
    assert (taken.engine, taken.reason) == (
        "fused",
        "the model's best; by a matmul that waits by itself: SEQPAR_FUSED is set",
    )
    refused = engines.rather(engines.FUSED, settled, "auto", "the weight is empty")
    assert refused.engine == "p2p" and refused.reason.endswith(
        "SEQPAR_FUSED is set, but no matmul that waits by itself: the weight is empty"
    )
    assert engines.rather(engines.SYMM_MEM, taken, "auto", "") == taken
