"""Cases of the engine "fused" over virtual ranks, run under TRITON_INTERPRET=1 in a process of their own.

The interpreter keeps what it runs in globals: the launches of the ranks take turns.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interpreted import main
from triton_gemm_cases import multiply_as_a_gpu_does, tiles

CASES: dict[str, Callable[[], None]] = {}
TURN = threading.Lock()


def integers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose matmuls are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(
    g: dist.ProcessGroup, outer: int, length: int, inner: int, chunks: int, engine: str, dtype: torch.dtype
) -> Any:
    """Column- and row-parallel of [outer, S, inner, 6], forward and backward."""
    import seqpar_kernels as sp

    t, rank = g.size(), g.rank()
    x = integers(1, outer, length, inner, 6, dtype=dtype).tensor_split(t, 1)[rank].requires_grad_()
    up = integers(2, 4 * t, 6, dtype=dtype).tensor_split(t)[rank].requires_grad_()
    side = integers(3, 3 * t, 6, dtype=dtype).tensor_split(t)[rank]
    bias = integers(4, 4 * t, dtype=dtype).tensor_split(t)[rank]
    down = integers(5, 4 * t, 5, dtype=dtype).tensor_split(t)[rank].t().requires_grad_()
    common: dict[str, Any] = {"group": g, "seq_dim": 1, "chunks": chunks, "engine": engine}
    h, beside = sp.all_gather_linear(x, [up, side], [bias, None], seq_len=length, **common)
    y = sp.linear_reduce_scatter(h, down, **common)
    grads = torch.autograd.grad(y, [x, up, down], integers(6, *y.shape, dtype=dtype))
    return [t.detach() for t in (h, beside, y, *grads)]


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(run: Callable[[], None]) -> Callable[[], None]:
        CASES[name] = run
        return run

    return add


def compared(ranks: int, *sizes: Any) -> None:
    from seqpar_kernels.comm.loopback import Loopback

    with Loopback(ranks) as loopback:
        *sizes, dtype = sizes
        expected = loopback.run(layer, *sizes, "p2p", dtype)
        got = loopback.run(layer, *sizes, "fused", dtype)
    for rank, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert torch.equal(a, b), f"rank {rank}, result {i}"


# ranks, then outer, S, inner, chunks
SIZES = [(2, 1, 40, 1, 2), (3, 1, 13, 3, 3), (2, 3, 21, 1, 2), (4, 2, 5, 2, 1), (2, 1, 1, 1, 1)]
for dtype in (torch.float32, torch.bfloat16):
    for sizes in SIZES:
        name = "{} ranks, outer {}, S {}, inner {}, {} chunks, ".format(*sizes) + str(dtype)[6:]
        CASES[name] = functools.partial(compared, *sizes, dtype)


def column(g: dist.ProcessGroup) -> Tensor:
    import seqpar_kernels as sp

    x, w = integers(1, 8, 16, dtype=torch.float32), integers(2, 4, 16, dtype=torch.float32)
    return sp.all_gather_linear(x, w, group=g, seq_dim=0, chunks=2, engine="fused")


def row(g: dist.ProcessGroup) -> Tensor:
    import seqpar_kernels as sp

    x, w = integers(1, 16, 16, dtype=torch.float32), integers(2, 4, 16, dtype=torch.float32)
    return sp.linear_reduce_scatter(x, w, group=g, seq_dim=0, chunks=2, engine="fused")


@case("a chunk whose flag stays down is an error")
def _forgotten() -> None:
    """All other cases would pass without any flag if the matmul did not wait, or its end were not looked at."""
    from seqpar_kernels.comm.loopback import Loopback
    from seqpar_kernels.kernels import triton_gemm
    from seqpar_kernels.overlap import fused_gemm

    up, polls = fused_gemm._Flags.up, triton_gemm._POLLS_PER_SECOND
    triton_gemm._POLLS_PER_SECOND = 50
    fused_gemm._Flags.up = lambda self, flag: up(self, flag) if flag == 0 else None  # type: ignore[method-assign]
    try:
        with Loopback(2, timeout=2.0) as loopback:
            assert all("a chunk did not come in time" in str(e) for e in loopback.outcomes(column))
    finally:
        triton_gemm._POLLS_PER_SECOND = polls
        fused_gemm._Flags.up = up  # type: ignore[method-assign]


@case("one launch an op, a poll for each chunk that leaves")
def _launches() -> None:
    from seqpar_kernels.comm.loopback import Loopback
    from seqpar_kernels.kernels import triton_gemm as gemm

    counts: dict[str, int] = {}
    originals = {name: getattr(gemm, name) for name in ("gather_matmul", "matmul_scatter", "await_flag")}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **options)

        return call

    for name in originals:
        setattr(gemm, name, counted(name))
    try:
        with Loopback(2) as loopback:
            loopback.run(column)
            assert counts == {"gather_matmul": 2}
            loopback.run(row)
            assert counts == {"gather_matmul": 2, "matmul_scatter": 2, "await_flag": 4}
    finally:
        for name, original in originals.items():
            setattr(gemm, name, original)


@case("what it cannot multiply is refused on every rank")
def _refused() -> None:
    from seqpar_kernels import set_max_workspace_bytes
    from seqpar_kernels.comm.loopback import Loopback, RankErrors

    with Loopback(2) as loopback:
        with pytest.raises(RankErrors, match=r"engine: 'fused' cannot run here: it multiplies .* not torch\.float64"):
            loopback.run(layer, 1, 4, 1, 1, "fused", torch.float64)
        set_max_workspace_bytes(1 << 20)
        try:
            with pytest.raises(RankErrors, match="it holds all rows at once, and max_workspace_bytes is set"):
                loopback.run(layer, 1, 4, 1, 1, "fused", torch.float32)
        finally:
            set_max_workspace_bytes(None)


def take_turns() -> None:
    from seqpar_kernels.kernels import triton_gemm as gemm

    for name in ("gather_matmul", "matmul_scatter", "await_flag"):

        def call(*args: Any, original: Callable[..., Any] = getattr(gemm, name), **options: Any) -> Any:
            with TURN:
                return original(*args, **options)

        setattr(gemm, name, call)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    multiply_as_a_gpu_does()
    tiles(16, 16, 16)
    take_turns()
    main(CASES)
