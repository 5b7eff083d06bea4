"""What ``bench gemm`` times: the matmul that waits for its rows, beside cuBLAS and torch's own, on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import facts
from .check import WrongResult, error_ratio
from .errors import BenchError, NotHere
from .gemm import PEERS
from .schema import Row
from .session import Session
from .timing import Runner, interleave

#: (N, K) of a rank's matmuls: gate and up together, down.
LAYERS = {"llama-8b tp2": ((14336, 4096), (4096, 7168)), "llama-70b tp8": ((7168, 8192), (8192, 3584))}
RANKS = 8
#: How much of cuBLAS's time passes until the last flag is up, where they go up one after the other.
PACE = 0.8


@dataclass(frozen=True)
class GemmCase:
    """One question: out [M, N] = x [M, K] @ weight [N, K].T, rows in :data:`RANKS` shards."""

    layer: str
    dtype: str
    m: int
    n: int
    k: int

    def row(self, provider: str) -> Row:
        itemsize = facts.DTYPES[self.dtype].itemsize
        return Row(
            op="gemm",
            provider=provider,
            direction="fwd",
            shape=[self.m, self.n, self.k],
            dtype=self.dtype,
            params={"layer": self.layer},
            clock="cuda",
            bytes=(self.m * self.k + self.n * self.k + self.m * self.n) * itemsize,
            flops=2 * self.m * self.n * self.k,
        )


class Operands:
    """What all providers multiply, and what our flags need."""

    def __init__(self, case: GemmCase) -> None:
        from seqpar_kernels.kernels.triton_gemm import rotated

        generator = torch.Generator("cuda").manual_seed(0)
        dtype = facts.DTYPES[case.dtype]
        self.x = torch.randn(case.m, case.k, device="cuda", generator=generator).to(dtype)
        self.weight = torch.randn(case.n, case.k, device="cuda", generator=generator).to(dtype)
        self.out = torch.empty(case.m, case.n, device="cuda", dtype=dtype)
        shards = [[case.m // RANKS]] * RANKS
        self.gathered = rotated(shards, 0, own_first=True)
        self.scattered = rotated(shards, 0, own_first=False)
        self.flags, self.counts, self.status = (
            torch.zeros(size, dtype=torch.int32, device="cuda") for size in (RANKS, RANKS, 1)
        )
        self.epoch = 0
        self.side = torch.cuda.Stream()


def providers(operands: Operands, step_cycles: Callable[[], int]) -> dict[str, Runner]:
    """ "ours" is the plain matmul; the others are the same kernel at its work, and torch's own that waits."""
    from seqpar_kernels.kernels.triton_gemm import gather_matmul, matmul, matmul_scatter

    o = operands
    weight_t = o.weight.t()
    signals = torch.empty(RANKS, dtype=torch.uint32, device="cuda")

    def all_up(_: int) -> Tensor:  # since the call before, or since the beginning
        return gather_matmul(o.x, o.weight, o.out, o.flags, o.gathered, o.epoch, o.status)

    def in_steps(_: int) -> Tensor:
        o.epoch += 1
        main = torch.cuda.current_stream()
        o.side.wait_stream(main)
        with torch.cuda.stream(o.side):
            for chunk in o.gathered[1:]:
                torch.cuda._sleep(step_cycles())
                o.flags[chunk.flag].fill_(o.epoch)
        found = gather_matmul(o.x, o.weight, o.out, o.flags, o.gathered, o.epoch, o.status, sm_margin=1)
        main.wait_stream(o.side)
        return found

    def scatter(_: int) -> Tensor:
        o.epoch += 1
        return matmul_scatter(o.x, o.weight, o.out, o.flags, o.scattered, o.epoch, o.counts)

    return {
        "torch.mm": lambda _: torch.mm(o.x, weight_t, out=o.out),
        "ours": lambda _: matmul(o.x, o.weight, o.out),
        "ours gathering, flags up": all_up,
        "ours gathering, flags in steps": in_steps,
        "ours scattering": scatter,
        "async-input-mm": lambda _: torch.ops.symm_mem._async_input_mm(o.x, weight_t, signals.fill_(1), 0),
    }


def cycles_per_ms() -> float:
    """Of ``torch.cuda._sleep``."""
    cycles, begin, end = 20_000_000, *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / float(begin.elapsed_time(end))


def check(run: Runner, o: Operands) -> float:
    """
    Returns:
        float: the largest error, in units of cuBLAS's in the same dtype.

    Raises:
        WrongResult: it computes something else, or not all of it.
    """
    o.out.fill_(float("nan"))
    found = run(0)
    assert isinstance(found, Tensor)
    got = found.clone()
    if int(o.status.item()):
        raise WrongResult(f"timed out on flag {int(o.status.item()) - 1}")
    ratio = error_ratio(got, o.x @ o.weight.t(), o.x.double() @ o.weight.double().t())
    if ratio > 2:
        raise WrongResult(f"errs {ratio:.1f} times as much as PyTorch in the same dtype (2 allowed)")
    return ratio


def measure(session: Session, case: GemmCase) -> None:
    """All providers at one shape, checked and then interleaved; each row says how many times cuBLAS's time it took."""
    from seqpar_kernels.kernels.triton_gemm import check_status

    operands = Operands(case)
    pace = {"cycles": 0}
    runners: dict[str, Runner] = {}
    errors: dict[str, float] = {}
    for name, run in providers(operands, lambda: pace["cycles"]).items():
        if name in PEERS and not session.wanted(name):
            continue
        try:
            errors[name] = check(run, operands)
            runners[name] = run
        except Exception as error:  # a peer may fail in any way; that is a result too
            row = session.add(case.row(name))
            row.status = "wrong" if isinstance(error, WrongResult) else "failed"
            row.reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    alone = interleave({"torch.mm": runners["torch.mm"]}, "cuda", session.effort.share(4))["torch.mm"].p50
    pace["cycles"] = int(PACE * alone / (RANKS - 1) * cycles_per_ms())
    timed = interleave(runners, "cuda", session.effort)
    check_status(operands.status)
    for name, stats in timed.items():
        row = session.add_timed(case.row(name), stats)
        row.metrics = {"x cublas": round(stats.p50 / timed["torch.mm"].p50, 3), "error": round(errors[name], 3)}
        if name.endswith("in steps"):
            row.metrics["last flag ms"] = round(PACE * alone, 4)


def cases(dtypes: Sequence[str], rows: Sequence[int]) -> Iterator[GemmCase]:
    for dtype in dtypes:
        for m in rows:
            if m % RANKS:
                raise BenchError(f"--rows {m}: expected a multiple of {RANKS}, the shards of the gather")
            for layer, sizes in LAYERS.items():
                for n, k in sizes:
                    yield GemmCase(layer, dtype, m, n, k)


def run(session: Session, planned: Sequence[GemmCase]) -> list[Row]:
    """Measure every case; returns the rows added.

    Raises:
        NotHere: the kernel cannot run here.
    """
    from seqpar_kernels.kernels.triton_gemm import unavailable

    reason = "it is measured with --device cuda" if session.device != "cuda" else unavailable(torch.device("cuda"))
    if reason is not None:
        raise NotHere(f"gemm: {reason}")
    first = len(session.rows)
    session.progress.plan(len(planned))
    for case in planned:
        session.progress.step(f"gemm {case.m}x{case.n}x{case.k} {case.dtype}")
        measure(session, case)
    return session.rows[first:]
