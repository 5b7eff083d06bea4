"""The Triton grouped matmul without a GPU: interpreted against the oracle, and compiled for the GPUs it is for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_grouped_cases as cases
from interpreted import Interpreted

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module", autouse=True)
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    """Started before the first test here, so that the cases run while the compiler does."""
    runner = Interpreted("triton_grouped_cases.py", tmp_path_factory.mktemp("interpreted"))
    yield runner
    runner.end()


class Variant(NamedTuple):
    """One launch. ``what``: forward, dgrad or wgrad, of runs of ``rows`` rows."""

    what: str
    dtype: torch.dtype = BF16
    rows: int = 512
    n: int = 2048
    k: int = 1024
    tf32: bool = False


def _launch(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> Any:
    from triton_ahead_of_time import record

    from seqpar_kernels.kernels import triton_grouped as grouped

    monkeypatch.setattr(grouped, "_precision", lambda _: "tf32" if variant.tf32 else "ieee")
    n, k, dtype, counts = variant.n, variant.k, variant.dtype, [variant.rows] * 4
    x, dy = torch.empty(sum(counts), k, dtype=dtype), torch.empty(sum(counts), n, dtype=dtype)
    weight, bias = torch.empty(4, n, k, dtype=dtype), torch.empty(4, n, dtype=dtype)
    if variant.what == "forward":
        return record(grouped.grouped_matmul, x, weight, counts, bias)[0]
    if variant.what == "dgrad":
        return record(grouped.grouped_matmul, dy, weight.transpose(1, 2), counts)[0]
    return record(grouped.grouped_weight_gradient, dy, x, counts, weight)[0]


WHATS = ("forward", "dgrad", "wgrad")
COMPILED = [
    *((sm, Variant(what)) for sm in (80, 90, 100) for what in WHATS),
    *((sm, Variant("forward", F16, rows=20)) for sm in (80, 90)),
    *((90, Variant(what, F32)) for what in WHATS),
    *((90, Variant(what, F32, tf32=True)) for what in WHATS),
    (80, Variant("wgrad", F32)),
    (90, Variant("forward", k=1021)),
]


def _name(sm: int, variant: Variant) -> str:
    sizes = f"{variant.rows}x{variant.n}x{variant.k}"
    return "-".join([f"sm{sm}", variant.what, str(variant.dtype)[6:], sizes, *(["tf32"] if variant.tf32 else [])])


@pytest.mark.parametrize(("sm", "variant"), COMPILED, ids=[_name(*one) for one in COMPILED])
def test_compiles_without_spilling_to_tensor_cores(sm: int, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton_ahead_of_time import compile_launch

    from seqpar_kernels.kernels import triton_grouped

    if not isinstance(triton_grouped.rows_kernel, triton.runtime.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled in this process")
    binary = compile_launch(_launch(variant, monkeypatch), sm)
    opcodes = {op.split(".")[0] for op in binary.sass}
    assert binary.spilled == 0, f"{binary.spilled} bytes of stack"
    assert binary.shared <= (227 if sm in (90, 100) else 99) * 1024
    if variant.dtype == F32 and not variant.tf32:
        assert not opcodes & {"HMMA", "HGMMA", "UTCHMMA"}, "fp32 rounded to TF32"
    else:
        assert opcodes & {"HMMA", "HGMMA", "UTCHMMA"}, opcodes
    if variant.k % 8 == 0:  # loads overlap with the matmuls
        assert "LDGSTS" in opcodes
        # Tensor cores want both operands of TF32 along the rows that are summed over: loaded element by element.
        turned = variant.what == "wgrad" and variant.tf32
        assert turned or binary.widths("LDG").get(128, 0) >= 2, binary.widths("LDG")


@pytest.mark.parametrize("name", cases.CASES)
def test_interpreted(interpreted: Interpreted, name: str) -> None:
    failure = interpreted.failure(name)
    assert failure is None, failure


def test_what_the_kernels_take() -> None:
    from seqpar_kernels.kernels.triton_grouped import takes

    x, weight = torch.empty(5, 6), torch.empty(2, 4, 6)
    assert takes(weight, x) and takes(weight.transpose(1, 2), x)
    assert not takes(weight, x.bfloat16()) and not takes(weight.double(), x.double())
    assert not takes(weight[:, ::2, ::2], x) and not takes(weight, x.t())
