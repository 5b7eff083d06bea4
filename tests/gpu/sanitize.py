"""Every CUDA kernel once or more, on small tensors: ``compute-sanitizer --tool memcheck python -m tests.gpu.sanitize``.

Nothing else runs on the device: inputs are made and results compared on the CPU, so that whatever the tool reports is
ours. ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` gives each tensor bounds of its own, which the tool can watch.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from seqpar_kernels.kernels import Backend, RowMap, native, reference
from seqpar_kernels.kernels.spec import NormGiven, NormKind, NormSpec, NormStores, NormTensors, NormWants

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    cols: int
    x: torch.dtype = BF16
    z: torch.dtype = BF16
    p: float = 0.1
    kind: NormKind = NormKind.LAYER
    shards: int = 1
    y: torch.dtype | None = None  # None: like x
    sums: bool = True  # gradients of vectors


# Rows enough for one instance of a kernel, columns enough for the other; a tail in the last warp.
CASES = [
    Case(rows, cols, x, z, p, NormKind(1 + i % 2), shards)
    for i, ((x, z), p, (rows, cols), shards) in enumerate(
        itertools.product(TYPES, (0.0, 0.1), [(5, 264), (300, 136)], (1, 3))
    )
]
# A row for a cluster of CTAs, where there are clusters; else for one that is full.
CASES += [Case(2, 16384, x, x, p, shards=shards) for x in (BF16, F16) for p in (0.0, 0.1) for shards in (1, 2)]
CASES += [Case(2, 8192, x, F32, p, sums=False) for x in (F32, BF16, F16) for p in (0.0, 0.1)]
CASES += [Case(2, 24576, F32, F32), Case(1, 131072)]
# Odd sizes and fp64: the generic kernels. float8 outputs. No norm at all.
CASES += [Case(7, 77, x, x, p) for x in (F64, F32, F16) for p in (0.0, 0.1)]
CASES += [Case(5, 520, y=torch.float8_e4m3fn), Case(5, 520, kind=NormKind.NONE)]
SUMS = [(3, 33, cols, dtype) for dtype in (F64, F32, BF16, F16) for cols in (264, 77)]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(ours: Tensor | None, expected: Tensor | None) -> None:
    """Not the budget of the error, which other tests keep to: that what was watched was the computation."""
    assert (ours is None) == (expected is None)
    if ours is not None and expected is not None:
        scale = float(expected.float().abs().max())
        tolerance = 0.1 if ours.dtype.itemsize == 1 else 0.02
        torch.testing.assert_close(ours.cpu().float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


def norm(case: Case, device: torch.device) -> None:
    """Forward and backward with every option that the case leaves open."""
    rows, cols, normed = case.rows, case.cols, case.kind != NormKind.NONE
    spec = NormSpec(
        case.kind, True, 1e-5, case.p, RowMap(max(1, rows // 2), rows, 3), case.x, case.z, case.y or case.x, case.x
    )
    seed = torch.tensor(2**40 + 1) if case.p else None
    x = random(case.shards, rows, cols, dtype=case.x) if case.shards > 1 else random(rows, cols, dtype=case.x)
    first, *vectors = (random(cols, dtype=case.x) + i for i in range(5))
    row_scale, residual = torch.rand(rows) + 0.5, random(rows, cols, dtype=case.z)
    y_scale = torch.tensor(2.0) if case.y else None
    tensors = NormTensors(x, residual, *(vectors if normed else [None] * 4), first, row_scale, y_scale, seed)
    grads = (*(random(rows, cols, dtype=case.x) if normed else None for _ in "12"), random(rows, cols, dtype=case.z))
    stores = NormStores(two_norms=normed)
    wants = NormWants(True, True, *[normed and case.sums] * 4, case.sums)

    def both(module: Backend, at: torch.device) -> list[Tensor | None]:
        given, moved = (tuple(None if t is None else t.to(at) for t in some) for some in (tensors, grads))
        there = NormTensors(*given)
        out = module.norm_forward(there, spec, stores, stacked=case.shards > 1)
        if case.y:
            return list(out)
        kept = (out.z if normed else None, out.statistics, there.row_scale, there.weight, there.weight2, there.seed)
        return [*out, *module.norm_backward(NormGiven(*moved, *kept), spec, wants)]

    for ours, expected in zip(both(native, device), both(reference, torch.device("cpu")), strict=True):
        close(ours, expected)


def run(device: torch.device) -> None:
    for case in CASES:
        norm(case, device)
    for count, rows, cols, dtype in SUMS:
        parts, bias = random(count, rows, cols, dtype=dtype), random(cols, dtype=dtype)
        close(native.reduce_shards(parts.to(device), bias.to(device)), reference.reduce_shards(parts, bias))


if __name__ == "__main__":
    run(torch.device("cuda"))
