"""Cases of the Triton matmul, run under TRITON_INTERPRET=1 in a process of their own; the names need no Triton.

The interpreter runs the programs of a launch one after the other, and each to its end: whoever raises flags meanwhile
is a thread of its own, and what it finds when it does tells in which order the tiles are visited.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interpreted import main, multiply_as_a_gpu_does

from tests.oracle import assert_within_budget

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")
SECONDS = 60.0
CASES: dict[str, Callable[[], None]] = {}


class Problem(NamedTuple):
    """One call of each function."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = F32
    out_dtype: torch.dtype | None = None
    transposed: bool = False  # the weight lies as [K, N]
    bias: torch.dtype | None = None
    pad: int = 0  # unused columns between rows of every matrix
    tile: tuple[int, int, int] = (16, 16, 16)
    tma: bool = False
    shards: Sequence[Sequence[int]] | None = None


def tiles(rows: int, cols: int, depth: int, *, tma: bool = False, programs: int = 2) -> None:
    """In place of the table's, on so many multiprocessors."""
    from seqpar_kernels.kernels import triton_gemm
    from seqpar_kernels.kernels.triton_gemm_config import GemmTile

    triton_gemm.gemm_tile = lambda *_: GemmTile(rows, cols, depth, 4, 1, group=2, tma=tma)
    triton_gemm._device = lambda _: ((9, 0), programs)


def inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K], weight [N, K], bias [N]."""
    generator = torch.Generator().manual_seed(problem.m * 131071 + problem.n * 257 + problem.k)

    def random(rows: int, cols: int) -> Tensor:
        whole = torch.randn(rows, cols + problem.pad, generator=generator).to(problem.dtype)
        return whole[:, :cols]

    x = random(problem.m, problem.k)
    weight = random(problem.k, problem.n).t() if problem.transposed else random(problem.n, problem.k)
    bias = None if problem.bias is None else torch.randn(problem.n, generator=generator).to(problem.bias)
    return x, weight, bias


def room(problem: Problem) -> Tensor:
    whole = torch.full((problem.m, problem.n + problem.pad), NAN, dtype=problem.out_dtype or problem.dtype)
    return whole[:, : problem.n]


def within(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, what: str) -> None:
    product = x.float() @ weight.float().t()
    plain = product.to(x.dtype) if bias is None else (product + bias.float()).to(x.dtype)
    oracle = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    # Of fp32 sums the order differs from the reference's; each rounds by the size of its terms.
    assert_within_budget(out, plain, oracle, what, magnitude=float(x.shape[1]) ** 0.5 if x.dtype == F32 else 0.0)


def words(count: int, value: int = 0) -> Tensor:
    return torch.full((count,), value, dtype=torch.int32)


def check(problem: Problem) -> None:
    """Plain, with flags that are up already, and telling: the same result, every element written, nothing beside it."""
    from seqpar_kernels.kernels import triton_gemm as gemm

    tiles(*problem.tile, tma=problem.tma)
    x, weight, bias = inputs(problem)
    shards = problem.shards or [[problem.m]]
    count = sum(len(shard) for shard in shards)
    found = []
    for rank in range(len(shards)):
        out, status = room(problem), words(1)
        chunks = gemm.rotated(shards, rank, own_first=True)
        got = gemm.gather_matmul(x, weight, out, words(count, 7), chunks, 7, status, bias=bias)
        assert got is out and not status.any()
        found.append(out)
        out, flags, counts = room(problem), words(count), words(count)
        chunks = gemm.rotated(shards, rank, own_first=False)
        gemm.matmul_scatter(x, weight, out, flags, chunks, 7, counts, bias=bias)
        raised = {c.flag for c in chunks if c.flag >= 0 and c.stop > c.start}
        assert flags.tolist() == [7 if i in raised else 0 for i in range(count)], flags
        assert not counts.any(), counts
        found.append(out)
    found.append(gemm.matmul(x, weight, room(problem), bias=bias))
    for out in found:
        within(out, x, weight, bias, str(problem))
        assert torch.equal(out, found[0])
        if problem.pad:
            assert out._base is not None and out._base[:, problem.n :].isnan().all()


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


for _name, _problem in {
    "one element": Problem(1, 1, 1, bias=F32),
    "one tile f32": Problem(16, 16, 16),
    "one row bf16": Problem(1, 67, 40, BF16, bias=BF16),
    "prime sizes f32": Problem(37, 29, 53, bias=F32),
    "prime sizes bf16, transposed": Problem(53, 31, 41, BF16, transposed=True, bias=F32),
    "prime sizes f16, padded rows": Problem(41, 23, 67, F16, pad=3, bias=F16),
    "K within a tile": Problem(20, 40, 7, F16, transposed=True, pad=2),
    "bf16 into f32": Problem(33, 48, 64, BF16, out_dtype=F32),
    "tma bf16": Problem(40, 72, 64, BF16, tma=True, bias=BF16),
    "tma f16, transposed, tails everywhere": Problem(37, 56, 40, F16, transposed=True, tma=True),
    "tma f32, padded rows": Problem(35, 20, 36, pad=4, tma=True, bias=F32),
    "shards, one chunk each": Problem(64, 40, 32, BF16, shards=[[16], [16], [16], [16]]),
    "uneven shards, uneven chunks": Problem(107, 37, 19, shards=[[14, 13], [14, 13], [14, 13], [13, 13]], bias=F32),
    "uneven shards by tma": Problem(71, 40, 24, F16, tma=True, shards=[[12, 12], [12, 12], [12, 11]], bias=F16),
    "chunks of one row, empty chunks": Problem(5, 33, 16, F16, shards=[[1, 1], [1, 0], [2, 0]]),
    "tall tiles, wide tiles": Problem(67, 50, 40, F16, tile=(32, 16, 8), shards=[[34], [33]]),
}.items():
    CASES[_name] = lambda problem=_problem: check(problem)


class Arrivals:
    """Brings the rows of each chunk and then raises its flag, in a thread, when ``ready`` says so."""

    def __init__(self, x: Tensor, source: Tensor, flags: Tensor, epoch: int, chunks: Sequence[Any], ready: Any) -> None:
        self.failure: str | None = None

        def bring() -> None:
            for i, chunk in enumerate(chunks):
                if chunk.flag >= 0:
                    if not ready(i):
                        self.failure = f"{chunk}: those before it were not finished within {SECONDS} s"
                    x[chunk.start : chunk.stop] = source[chunk.start : chunk.stop]
                    flags[chunk.flag] = epoch

        self.thread = threading.Thread(target=bring, daemon=True)
        self.thread.start()

    def check(self) -> None:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        assert self.failure is None, self.failure


SHARDS = [[20, 17], [19, 18], [18, 18]]
WAITS = Problem(110, 40, 24, F16, shards=SHARDS)


def run_waiting(epochs: Sequence[tuple[int, int | Tensor]], *, tma: bool, programs: int, flags: Tensor) -> None:
    """Calls with the same flags; before each, all rows but the own are NaN again. (value, as it is passed) an epoch."""
    from seqpar_kernels.kernels import triton_gemm as gemm

    tiles(16, 16, 8, tma=tma, programs=programs)
    source, weight, _ = inputs(WAITS)
    chunks = gemm.rotated(SHARDS, 1, own_first=True)
    x = torch.full_like(source, NAN)
    for value, epoch in epochs:
        x.fill_(NAN)
        x[chunks[0].start : chunks[0].stop] = source[chunks[0].start : chunks[0].stop]
        out, status = room(WAITS), words(1)

        def ready(i: int, out: Tensor = out) -> bool:
            """The chunks before it are computed (with one program: all of them), it and those behind it are not."""
            if programs > 1:
                return True
            deadline = time.monotonic() + SECONDS
            while any(out[c.start : c.stop].isnan().any() for c in chunks[:i]):
                if time.monotonic() > deadline:
                    return False
                time.sleep(1e-3)
            return all(bool(out[c.start : c.stop].isnan().all()) for c in chunks[i:])

        arrivals = Arrivals(x, source, flags, value, chunks, ready)
        gemm.gather_matmul(x, weight, out, flags, chunks, epoch, status, timeout=10.0)
        arrivals.check()
        gemm.check_status(status)
        within(out, source, weight, None, f"epoch {value}")


@case("waits for each chunk, own shard first, peers in rotated order")
def _waits() -> None:
    for tma in (False, True):
        run_waiting([(1, 1)], tma=tma, programs=1, flags=words(6))


@case("waits on several programs")
def _waits_on_several() -> None:
    run_waiting([(1, 1)], tma=False, programs=3, flags=words(6))


@case("epochs: flags are never reset, and wrap around")
def _epochs() -> None:
    run_waiting([(1, 1), (2, 2), (5, 5)], tma=False, programs=1, flags=words(6))
    last = 2**31 - 1
    epochs = [(epoch, epoch) for epoch in (last, -last - 1, 3 - last)]
    run_waiting(epochs, tma=False, programs=1, flags=words(6, last - 1))


@case("an epoch that is a tensor")
def _epoch_tensor() -> None:
    epoch = words(1)
    run_waiting([(1, epoch.add_(1).clone()), (2, words(1, 2)[0])], tma=False, programs=1, flags=words(6))


@case("a flag that is never raised")
def _timeout() -> None:
    from seqpar_kernels.kernels import triton_gemm as gemm

    x, weight, _ = inputs(WAITS)
    chunks = gemm.rotated(SHARDS, 1, own_first=True)
    for programs in (1, 2):
        tiles(16, 16, 8, programs=programs)
        flags, status, out = words(6, 4), words(1), room(WAITS)
        late = chunks[2]
        flags[late.flag] = 3
        gemm.gather_matmul(x, weight, out, flags, chunks, 4, status, timeout=1e-4)
        assert status.item() == late.flag + 1
        for c in chunks[:2]:
            assert not out[c.start : c.stop].isnan().any()
        for c in chunks[2:]:
            assert out[c.start : c.stop].isnan().all(), "computed from rows that had not arrived"
        with pytest.raises(RuntimeError, match=f"flag {late.flag} "):
            gemm.check_status(status)


@contextmanager
def watching(words: Tensor, seen: Callable[[int, int, int], None]) -> Iterator[None]:
    """``seen(index, value, program)`` before each atomic that changes an element of ``words``."""
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_atomic_rmw

    def rmw(self: Any, op: Any, ptr: Any, value: Any, *args: Any) -> Any:
        index = (int(ptr.data.item()) - words.data_ptr()) // 4
        if 0 <= index < len(words):
            seen(index, int(value.data.item()), self.grid_idx[0])
        return original(self, op, ptr, value, *args)

    interpreter.InterpreterBuilder.create_atomic_rmw = rmw
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_atomic_rmw = original


@case("a flag is raised when the last tile of its chunk is stored, not before")
def _raises() -> None:
    from seqpar_kernels.kernels import triton_gemm as gemm

    x, weight, _ = inputs(WAITS)
    chunks = gemm.rotated(SHARDS, 2, own_first=False)
    flags, counts = words(6), words(6)
    for epoch, programs in ((1, 1), (2, 1), (3, 2), (4, 5)):
        tiles(16, 16, 8, programs=programs)
        out, raised = room(WAITS), []

        def seen(flag: int, value: int, _: int, out: Tensor = out, raised: list[int] = raised) -> None:
            raised.append(flag)
            chunk = next(c for c in chunks if c.flag == flag)
            assert value == epoch  # noqa: B023 (called before the loop goes on)
            assert not out[chunk.start : chunk.stop].isnan().any(), f"flag {flag} before its rows"
            if programs == 1:  # noqa: B023
                later = chunks[chunks.index(chunk) + 1]
                assert out[later.start : later.stop].isnan().all(), f"flag {flag} after the rows of another"

        with watching(flags, seen):
            gemm.matmul_scatter(x, weight, out, flags, chunks, epoch, counts)
        assert raised == [c.flag for c in chunks if c.flag >= 0]
        assert flags.tolist() == [epoch] * 4 + [0] * 2, flags
        assert not counts.any()
        within(out, x, weight, None, f"{programs} programs")


@case("tiles are dealt evenly, across chunks")
def _dealt() -> None:
    from seqpar_kernels.kernels.triton_gemm import Chunk, matmul_scatter

    tiles(16, 16, 16, programs=4)
    problem = Problem(5 * 16, 48, 16, F16)  # three tiles a chunk, for four programs
    x, weight, _ = inputs(problem)
    flags, counts, done = words(5), words(5), [0] * 4

    def seen(flag: int, value: int, program: int) -> None:
        done[program] += value

    with watching(counts, seen):
        chunks = tuple(Chunk(16 * i, 16 * i + 16, i) for i in range(5))
        matmul_scatter(x, weight, room(problem), flags, chunks, 1, counts)
    assert sorted(done) == [3, 4, 4, 4], done


@case("chunks of a batch share flags")
def _batch() -> None:
    from seqpar_kernels.kernels.triton_gemm import Chunk, check_status, gather_matmul, matmul_scatter

    tiles(16, 16, 8, programs=1)
    problem = Problem(2 * 40, 24, 16, F16)  # two sequences of 40 rows, each in halves
    x, weight, _ = inputs(problem)
    chunks = (Chunk(0, 20), Chunk(40, 60), Chunk(20, 40, 0), Chunk(60, 80, 0))
    out, flags, counts, status = room(problem), words(1), words(1), words(1)
    unwritten = []
    with watching(flags, lambda *_: unwritten.append(bool(out.isnan().any()))):
        matmul_scatter(x, weight, out, flags, chunks, 1, counts)
    assert unwritten == [False]
    assert flags.item() == 1 and not counts.any()
    within(out, x, weight, None, "scatter")
    out = gather_matmul(x, weight, room(problem), flags, chunks, 2, status, timeout=1e-4)
    assert status.item() == 1
    assert [bool(out[c.start : c.stop].isnan().all()) for c in chunks] == [False, False, True, True]
    gather_matmul(x, weight, out, flags, chunks, 1, status.zero_())
    check_status(status)
    within(out, x, weight, None, "gather")


@case("no rows")
def _no_rows() -> None:
    from seqpar_kernels.kernels import triton_gemm as gemm

    weight, flags = torch.randn(3, 8), words(2)
    out = gemm.matmul_scatter(torch.empty(0, 8), weight, torch.empty(0, 3), flags, (), 1, words(2))
    assert out.shape == (0, 3) and not flags.any()
    assert gemm.matmul(torch.empty(0, 8), weight).shape == (0, 3)


@case("wrong arguments are refused")
def _refused() -> None:
    from seqpar_kernels.kernels import triton_gemm as gemm

    tiles(16, 16, 16)
    good: dict[str, Any] = dict(
        x=torch.randn(8, 16), weight=torch.randn(4, 16), out=torch.empty(8, 4), flags=words(2),
        chunks=(gemm.Chunk(0, 8, 1),), epoch=1, status=words(1),
    )  # fmt: skip
    gemm.gather_matmul(**good | {"flags": words(2, 1)})
    row = gemm.Chunk
    for change, message in (
        ({"weight": torch.randn(4, 15)}, r"weight: expected [N, K]"),
        ({"weight": torch.randn(4, 16).half()}, "weight: expected torch.float32 as x, got torch.float16"),
        ({"weight": torch.randn(8, 32)[::2, ::2]}, "weight: expected one contiguous dimension"),
        ({"weight": torch.randn(0, 16), "out": torch.empty(8, 0)}, "weight: expected [N, K]"),
        ({"x": torch.randn(16, 8).t()}, "x: expected contiguous rows"),
        ({"x": torch.randn(8, 16).double()}, "x: expected bfloat16, float16 or float32, got torch.float64"),
        ({"out": torch.empty(8, 5)}, "out: expected (8, 4), got (8, 5)"),
        ({"out": torch.empty(4, 8).t()}, "out: expected contiguous rows"),
        ({"out": torch.empty(8, 4, device="meta")}, "out: expected a tensor on cpu as x, got one on meta"),
        ({"bias": torch.randn(5)}, "bias: expected (4,), got (5,)"),
        ({"bias": torch.arange(4)}, "bias: expected bfloat16, float16 or float32, got torch.int64"),
        ({"flags": torch.zeros(2)}, "flags: expected contiguous int32 elements on cpu"),
        ({"status": torch.zeros(1, dtype=torch.int64)}, "status: expected contiguous int32"),
        ({"epoch": torch.zeros(1)}, "epoch: expected contiguous int32"),
        ({"chunks": (row(0, 8, 2),)}, "chunks: expected flags from -1 to 1, got [2]"),
        ({"chunks": (row(0, 4), row(5, 8))}, "chunks: expected every row of x once, got rows 5..8 after row 4"),
        ({"chunks": (row(4, 8), row(0, 5))}, "chunks: expected every row of x once, got rows 4..8 after row 5"),
        ({"chunks": (row(0, 7),)}, "chunks: expected all 8 rows of x, got 7"),
        ({"timeout": 0.0}, "timeout: expected more than 0 seconds, got 0.0"),
        ({"sm_margin": 2}, "sm_margin: expected 0 to 1 multiprocessors, got 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            gemm.gather_matmul(**good | change)
    scatter = {name: value for name, value in good.items() if name != "status"}
    with pytest.raises(ValueError, match="counts: expected an element for each of the 2 flags, got 1"):
        gemm.matmul_scatter(**scatter, counts=words(1))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    multiply_as_a_gpu_does()
    main(CASES)
