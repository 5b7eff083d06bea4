"""The Triton matmul without a GPU: interpreted against the oracle, and compiled for the GPUs it is meant for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_gemm_cases as cases
from interpreted import Interpreted

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module", autouse=True)
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    """Started before the first test here, so that the cases run while the compiler does."""
    runner = Interpreted("triton_gemm_cases.py", tmp_path_factory.mktemp("interpreted"))
    yield runner
    runner.end()


class Variant(NamedTuple):
    """One launch. ``what``: gather, scatter or plain."""

    what: str
    dtype: torch.dtype = BF16
    m: int = 8192
    n: int = 4096
    k: int = 4096
    transposed: bool = False
    tf32: bool = False
    spilled: int = 0


def _launch(variant: Variant, sm: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    from triton_ahead_of_time import record

    from seqpar_kernels.kernels import triton_gemm as gemm

    monkeypatch.setattr(gemm, "unavailable", lambda _: None)
    monkeypatch.setattr(gemm, "_device", lambda _: ((sm // 10, sm % 10), 132))
    monkeypatch.setattr(gemm, "_tf32", lambda _: variant.tf32)
    m, n, k, dtype = variant.m, variant.n, variant.k, variant.dtype
    x, out = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
    weight = torch.empty(k, n, dtype=dtype).t() if variant.transposed else torch.empty(n, k, dtype=dtype)
    words = torch.zeros(8, dtype=torch.int32)
    chunks = gemm.rotated([[m // 8]] * 8, 3, own_first=variant.what == "gather")
    if variant.what == "gather":
        bias = torch.empty(n, dtype=dtype)
        launches = record(gemm.gather_matmul, x, weight, out, words, chunks, 1, words[:1], bias=bias)
    elif variant.what == "scatter":
        launches = record(gemm.matmul_scatter, x, weight, out, words, chunks, words[0], words)
    else:
        launches = record(gemm.matmul, x, weight, out)
    return launches[0]


COMPILED = [
    *((sm, Variant(what)) for sm in (80, 90, 100) for what in ("gather", "scatter")),
    (90, Variant("plain")),
    *((sm, Variant("gather", transposed=True)) for sm in (80, 90)),
    (90, Variant("scatter", F16, m=256, n=512)),
    (90, Variant("gather", F32, tf32=True)),
    *((sm, Variant("gather", F32)) for sm in (80, 90)),
    (90, Variant("gather", k=4095)),
    (120, Variant("gather")),
]


def _name(variant: Variant) -> str:
    flags = [name for name in ("transposed", "tf32") if getattr(variant, name)]
    return "-".join([variant.what, str(variant.dtype)[6:], f"{variant.m}x{variant.n}x{variant.k}", *flags])


@pytest.mark.parametrize(("sm", "variant"), COMPILED, ids=[f"sm{sm}-{_name(variant)}" for sm, variant in COMPILED])
def test_compiles_without_spilling_to_tensor_cores(sm: int, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton_ahead_of_time import compile_launch

    from seqpar_kernels.kernels import triton_gemm

    if not isinstance(triton_gemm.gemm_kernel, triton.runtime.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled in this process")
    binary = compile_launch(_launch(variant, sm, monkeypatch), sm)
    opcodes = {op.split(".")[0] for op in binary.sass}
    assert binary.spilled <= variant.spilled, f"{binary.spilled} bytes of stack"
    assert binary.shared <= (227 if sm in (90, 100) else 99) * 1024
    ieee, aligned = variant.dtype == F32 and not variant.tf32, variant.k % 8 == 0
    if ieee:
        assert not opcodes & {"HMMA", "HGMMA", "UTCHMMA"}, "fp32 rounded to TF32"
    else:
        assert {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[sm] in opcodes
    if sm >= 90 and aligned and not ieee:
        assert "UTMALDG" in opcodes and "LDGSTS" not in opcodes
    elif aligned:
        assert "UTMALDG" not in opcodes and binary.widths("LDG")[128] >= 2 and "LDGSTS" in opcodes
    stores = binary.widths("STG")
    assert set(stores) == {128}, stores
    # A polling thread acquires, its block waits for it, and what TMA reads is ordered behind; see the kernel.
    acquires = re.search(r"ld\.global\.sys\.acquire|atom\.global\.sys\.acquire|ld\.acquire\.sys", binary.ptx)
    assert (acquires is not None) == (variant.what == "gather")
    fences = "fence.proxy.async.global" in binary.ptx
    assert fences == (variant.what == "gather" and "UTMALDG" in opcodes)
    releases = re.search(r"atom\.global\.sys\.release\.exch|atom\.release\.sys\.global\.exch", binary.ptx)
    assert (releases is not None) == (variant.what == "scatter")


def test_the_next_tile_is_loaded_while_one_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flattened, the stages and the room to rearrange a tile in are needed at the same time."""
    from triton_ahead_of_time import compile_launch

    launch = _launch(Variant("gather"), 90, monkeypatch)
    position = [param.name for param in launch.kernel.params].index("FLATTEN")
    plain = launch._replace(args=(*launch.args[:position], False, *launch.args[position + 1 :]))
    assert compile_launch(launch, 90).shared > compile_launch(plain, 90).shared


def test_what_is_stored_is_released_after_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_ahead_of_time import compile_launch

    ptx = compile_launch(_launch(Variant("scatter"), 90, monkeypatch), 90).ptx
    counted = re.search(r"atom\.global\.gpu\.acq_rel\.add", ptx)
    assert counted is not None
    before = ptx[: counted.start()]
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert "bar.sync" in ptx[counted.start() : ptx.index("release.exch")], "the block acts on what one thread counted"


@pytest.mark.parametrize("name", cases.CASES)
def test_interpreted(interpreted: Interpreted, name: str) -> None:
    failure = interpreted.failure(name)
    assert failure is None, failure


def test_unavailable_says_why() -> None:
    from seqpar_kernels.kernels import triton_gemm

    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "TRITON_INTERPRET=1" in str(triton_gemm.unavailable(torch.device("cpu")))
        with pytest.raises(RuntimeError, match=r"matmul: Triton runs on the CPU only where TRITON_INTERPRET=1"):
            triton_gemm.matmul(torch.randn(4, 4), torch.randn(4, 4))
    assert "meta" in str(triton_gemm.unavailable(torch.device("meta")))
