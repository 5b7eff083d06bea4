"""The Triton kernels without a GPU: interpreted against the oracle, and compiled for the GPUs they are meant for."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import triton_norm_cases as cases  # noqa: E402
from interpreted import Interpreted  # noqa: E402

from seqpar_kernels.kernels import NormGiven, NormKind, NormSpec, NormStores, NormTensors, NormWants, RowMap  # noqa: E402

F32, BF16, F16, E4M3 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    """Started before the first test here, so that the cases run while the compiler does."""
    runner = Interpreted("triton_norm_cases.py", tmp_path_factory.mktemp("interpreted"))
    yield runner
    runner.end()


class Variant(NamedTuple):
    """One launch as training makes it. ``what``: forward, backward, partials or shards."""

    what: str
    cols: int
    kind: NormKind = NormKind.LAYER
    dtype: torch.dtype = BF16
    z_dtype: torch.dtype | None = None
    p: float | None = 0.1
    on: str = "residual weight bias"
    y_dtype: torch.dtype | None = None
    shards: int = 1
    registers: int = 128  # at most, for the resident warps the table counts on
    spilled: int = 0


def _launch(variant: Variant) -> Any:
    from triton_ahead_of_time import record

    from seqpar_kernels.kernels import triton_norm

    rows, cols, dtype = 64, variant.cols, variant.dtype
    z_dtype = variant.z_dtype or dtype
    on = variant.on.split()
    spec = NormSpec(
        variant.kind, False, 1e-5, variant.p or 0.0, RowMap(rows, 0, 0), dtype, z_dtype, variant.y_dtype or dtype, dtype
    )
    seed = None if variant.p is None else torch.tensor(1)

    def matrix(of: torch.dtype, wanted: bool = True) -> torch.Tensor | None:
        return torch.empty(rows, cols, dtype=of) if wanted else None

    def vector(name: str) -> torch.Tensor | None:
        return torch.empty(cols, dtype=dtype) if name in on else None

    if variant.what == "shards":
        return record(triton_norm.reduce_shards, torch.empty(4, rows, cols, dtype=dtype), vector("bias"))[0]
    if variant.what == "forward":
        x = torch.empty(variant.shards, rows, cols, dtype=dtype) if variant.shards > 1 else matrix(dtype)
        vectors = {name: vector(name) for name in ("weight", "bias", "weight2", "bias2", "x_bias")}
        y_scale = torch.ones(1) if variant.y_dtype == E4M3 else None
        tensors = NormTensors(x, matrix(z_dtype, "residual" in on), **vectors, y_scale=y_scale, seed=seed)
        stores = NormStores(two_norms="norm2" in on)
        return record(triton_norm.norm_forward, tensors, spec, stores, stacked=variant.shards > 1)[0]
    grads = (matrix(dtype), matrix(dtype, "norm2" in on), matrix(z_dtype, "dz" in on))
    kept = (matrix(z_dtype), torch.empty(1 + (variant.kind == NormKind.LAYER), rows))
    given = NormGiven(*grads, *kept, None, vector("weight"), vector("weight2"), seed)
    wants = NormWants(True, "residual" in on, *(name[1:] in on for name in cases.VECTORS))
    launches = record(triton_norm.norm_backward, given, spec, wants)
    return launches[0 if variant.what == "backward" else 1]


RMS = NormKind.RMS
TWO_NORMS = "x_bias residual weight bias norm2 weight2 bias2"
EVERYTHING = TWO_NORMS + " dz"
SMS = (80, 90, 100)
COMPILED: list[tuple[int, Variant]] = [
    *((sm, Variant("forward", 4096, registers=64)) for sm in SMS),
    *((sm, Variant("backward", 4096, on="x_bias residual weight bias dz")) for sm in SMS),
    (90, Variant("forward", 4096, dtype=F32, registers=80)),
    (80, Variant("backward", 4096, dtype=F32, on="residual weight bias dz")),
    (100, Variant("forward", 8192, RMS, z_dtype=F32, p=None, on="residual weight", registers=80)),
    (100, Variant("backward", 8192, RMS, p=None, on="residual weight dz")),
    (90, Variant("backward", 1024, RMS, dtype=F16, z_dtype=F32, on="residual weight dz")),
    (90, Variant("backward", 4096, on=EVERYTHING)),
    # A thread of the longest held row has 64 registers for 32 elements: what is spilled is spilled once a row.
    (90, Variant("forward", 32768, RMS, on="residual weight", registers=64, spilled=8)),  # triton 3.6; 3.9: none
    (90, Variant("forward", 32768, registers=64, spilled=16)),
    (90, Variant("forward", 32768, on=TWO_NORMS, registers=64, spilled=104)),
    (100, Variant("forward", 65536, registers=128)),
    (90, Variant("backward", 16384, on="residual weight bias dz", registers=255)),
    (90, Variant("forward", 8192, RMS, dtype=F16, y_dtype=E4M3, on="residual weight")),
    *((sm, Variant("forward", 4096, on="x_bias residual weight bias", shards=4)) for sm in SMS),
    (90, Variant("forward", 8192, RMS, z_dtype=F32, on="residual weight", shards=8)),
    (90, Variant("partials", 4096)),
    (80, Variant("shards", 4096, registers=64)),
]


def _name(variant: Variant) -> str:
    dtypes = [str(t).removeprefix("torch.") for t in (variant.dtype, variant.z_dtype, variant.y_dtype) if t is not None]
    extras = "" if variant.on == Variant._field_defaults["on"] else "-" + variant.on.replace(" ", "+")
    dropout = "" if variant.p is None else "-dropout"
    extras += f"-{variant.shards}shards" if variant.shards > 1 else ""
    return f"{variant.what}-{variant.kind.name.lower()}-{variant.cols}-{'-'.join(dtypes)}{dropout}{extras}"


@pytest.mark.parametrize(("sm", "variant"), COMPILED, ids=[f"sm{sm}-{_name(variant)}" for sm, variant in COMPILED])
def test_compiles_without_spilling_to_wide_accesses(sm: int, variant: Variant) -> None:
    import triton
    from triton_ahead_of_time import compile_launch

    from seqpar_kernels.kernels import triton_norm

    if not isinstance(triton_norm.norm_forward_kernel, triton.runtime.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled in this process")
    binary = compile_launch(_launch(variant), sm)
    assert binary.spilled <= variant.spilled, f"{binary.spilled} bytes of stack"
    assert binary.registers <= variant.registers
    assert binary.shared <= 99 * 1024, f"{binary.shared} bytes of shared memory"
    loads, stores = binary.widths("LDG"), binary.widths("STG")
    assert loads[128] >= (1 if variant.what == "partials" else 2), loads
    if variant.what != "partials":
        narrow = sum(stores.values()) - stores[128]
        assert narrow <= 2, f"{stores}: mean and rstd are all that one thread stores alone"


@pytest.mark.parametrize("name", cases.CASES)
def test_interpreted(interpreted: Interpreted, name: str) -> None:
    failure = interpreted.failure(name)
    assert failure is None, failure


def test_unavailable_says_why() -> None:
    from seqpar_kernels.kernels import triton_norm

    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "TRITON_INTERPRET=1" in str(triton_norm.unavailable(torch.device("cpu")))
    assert "meta" in str(triton_norm.unavailable(torch.device("meta")))
