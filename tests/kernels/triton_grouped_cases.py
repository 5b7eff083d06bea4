"""Cases of the Triton grouped matmul, run under TRITON_INTERPRET=1 in a process of their own; names need no Triton."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interpreted import main, multiply_as_a_gpu_does

from tests.oracle import assert_within_budget

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")
#: Rows of each run: around a tile of 16 rows, none, one.
COUNTS = {"ragged": [5, 0, 37, 1, 16, 33], "none at all": [0, 0, 0], "one run": [23], "last has none": [16, 32, 0]}
CASES: dict[str, Callable[[], None]] = {}


def small_tiles() -> None:
    """In place of the table's: several blocks of everything."""
    from seqpar_kernels.kernels import triton_grouped
    from seqpar_kernels.kernels.triton_gemm_config import GemmTile

    triton_grouped._tile = lambda *_: GemmTile(16, 16, 16, 4, 1)


def matrix(rows: int, cols: int, dtype: torch.dtype, pad: int) -> Tensor:
    """Of random numbers; what lies between its rows is NaN."""
    whole = torch.full((rows, cols + pad), NAN, dtype=dtype)
    whole[:, :cols] = torch.randn(rows, cols).to(dtype)
    return whole[:, :cols]


def weights(experts: int, n: int, k: int, dtype: torch.dtype, pad: int, transposed: bool) -> Tensor:
    shape = (k, n) if transposed else (n, k)
    whole = torch.stack([torch.full((shape[0], shape[1] + pad), NAN, dtype=dtype) for _ in range(experts)])
    whole[:, :, : shape[1]] = (torch.randn(experts, *shape) * k**-0.5).to(dtype)
    inside = whole[:, :, : shape[1]]
    return inside.transpose(1, 2) if transposed else inside


def by_run(counts: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(counts) for t in tensors), strict=True))


def check(counts: list[int], n: int, k: int, dtype: torch.dtype, pad: int, transposed: bool) -> None:
    """Forward with and without bias, dgrad and wgrad: in budget, every element written, nothing beside it."""
    from seqpar_kernels.kernels import triton_grouped as grouped

    torch.manual_seed(sum(counts) + n + k)
    rows, experts = sum(counts), len(counts)
    x, dy = matrix(rows, k, dtype, pad), matrix(rows, n, dtype, pad)
    weight, bias = weights(experts, n, k, dtype, pad, transposed), torch.randn(experts, n).to(dtype)
    assert grouped.takes(weight, x, dy, bias)

    def products(wide: torch.dtype, source: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        runs = zip(source.to(wide).split(counts), w.to(wide), strict=True)
        return torch.cat([run @ one.t() + (0 if b is None else b[e].to(wide)) for e, (run, one) in enumerate(runs)])

    for what, source, w, b in (
        ("out", x, weight, None),
        ("out with bias", x, weight, bias),
        ("dx", dy, weight.transpose(1, 2), None),
    ):
        room = torch.full((rows, w.shape[1] + 3), NAN, dtype=dtype)
        got = grouped.grouped_matmul(source, w, counts, b, out=room[:, : w.shape[1]])
        assert got.data_ptr() == room.data_ptr() and room[:, w.shape[1] :].isnan().all()
        reference, oracle = products(F32, source, w, b).to(dtype), products(torch.float64, source, w, b)
        magnitude = float(w.shape[2]) ** 0.5 if dtype == F32 else 0.0  # fp32 sums: in another order
        assert_within_budget(got, reference, oracle, what, magnitude)
        assert torch.equal(got, grouped.grouped_matmul(source, w, counts, b))
    dw = grouped.grouped_weight_gradient(dy, x, counts, weight)
    assert dw.stride() == torch.empty_like(weight).stride()

    def gradients(wide: torch.dtype) -> Tensor:
        return torch.stack([d.to(wide).t() @ r.to(wide) for d, r in by_run(counts, dy, x)])

    magnitude = float(max(counts)) ** 0.5 if dtype == F32 else 0.0
    assert_within_budget(dw, gradients(F32).to(dtype), gradients(torch.float64), "dw", magnitude)


def case(name: str, *args: object) -> None:
    def run() -> None:
        small_tiles()
        check(*args)  # type: ignore[arg-type]

    CASES[name] = run


for label, counts in COUNTS.items():
    case(f"{label}, bf16", counts, 40, 24, BF16, 0, False)
    case(f"{label}, fp32, other way round", counts, 24, 40, F32, 0, True)
case("rows not aligned, fp16", COUNTS["ragged"], 33, 19, F16, 5, False)
case("rows not aligned, bf16, other way round", COUNTS["ragged"], 17, 35, BF16, 1, True)
case("one column, one feature", COUNTS["ragged"], 1, 1, F32, 0, False)


def production_tiles(dtype: torch.dtype) -> None:
    """The table's own tiles on runs that fill the large one, and on short ones."""
    for counts in ([140, 0, 150], [7, 3]):
        check(counts, 72, 136, dtype, 0, False)


for dtype in (BF16, F32):
    CASES[f"the table's tiles, {str(dtype)[6:]}"] = partial(production_tiles, dtype)
# Before the others put small tiles in their place.
CASES = dict(sorted(CASES.items(), key=lambda item: not item[0].startswith("the table's")))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    multiply_as_a_gpu_does()
    main(CASES)
