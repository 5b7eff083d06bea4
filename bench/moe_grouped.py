"""Grouped matmuls on one rank, as ``bench moe`` times them: ours beside ``torch._grouped_mm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import facts, moe
from .check import WrongResult, error_ratio
from .moe_providers import MoeCase
from .schema import Row
from .session import Session
from .timing import Runner, interleave, sets_to_rotate

#: y of x, and with a gradient of y those of x and weight: each in a list.
Call = Callable[[Tensor, Tensor, Tensor, list[int], bool], list[Tensor]]
TORCH = moe.PEERS[-1]


def ours(x: Tensor, weight: Tensor, dy: Tensor, counts: list[int], both: bool) -> list[Tensor]:
    from seqpar_kernels.kernels.grouped_matmul import grouped_matmul, grouped_weight_gradient

    y = grouped_matmul(x, weight, counts)
    if not both:
        return [y]
    return [y, grouped_matmul(dy, weight.transpose(1, 2), counts), grouped_weight_gradient(dy, x, counts, weight)]


def torchs(x: Tensor, weight: Tensor, dy: Tensor, counts: list[int], both: bool) -> list[Tensor]:
    ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
    if not both:
        return [torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)]
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = torch._grouped_mm(leaves[0], leaves[1].transpose(1, 2), offs=ends)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


PROVIDERS: dict[str, Call] = {"ours": ours, TORCH: torchs}


class Operands:
    """Pairs [P, H], sorted by expert, and the experts' gates and ups [E, 2 * I, H]: an expert's first matmul."""

    def __init__(self, case: MoeCase, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        pairs, e, h, n = case.tokens * case.top_k, case.experts, case.hidden, 2 * case.inner
        chosen = torch.randn(case.tokens, e, generator=generator).topk(case.top_k).indices
        self.counts: list[int] = chosen.flatten().bincount(minlength=e).tolist()
        shapes = (pairs, h), (e, n, h), (pairs, n)
        self.x, self.weight, self.dy = (
            (torch.randn(shape, generator=generator) * (h**-0.5 if len(shape) == 3 else 1)).to(device, dtype)
            for shape in shapes
        )

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        """y, dx and dweight, one matmul an expert."""
        runs = zip(self.x.split(self.counts), self.weight.unbind(), self.dy.split(self.counts), strict=True)
        wide = [[t.to(dtype) for t in run] for run in runs]
        ys, dxs, dws = zip(*((x @ w.t(), dy @ w, dy.t() @ x) for x, w, dy in wide), strict=True)
        return [torch.cat(ys), torch.cat(dxs), torch.stack(dws)]


def run(session: Session, planned: Sequence[MoeCase], dtypes: Sequence[str]) -> list[Row]:
    """Measure every case in every dtype; returns the rows added."""
    first = len(session.rows)
    session.progress.plan(len(planned) * len(dtypes))
    for case in planned:
        for dtype in dtypes:
            session.progress.step(f"moe grouped matmul {case.experts}x{case.top_k} {dtype}")
            measure(session, case, dtype)
    return session.rows[first:]


def measure(session: Session, case: MoeCase, dtype: str) -> None:
    """Rows of one case: each right provider in the same rounds, on one thread of a CPU, as ranks have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _measure(session, case, dtype)
    finally:
        torch.set_num_threads(threads)


def _measure(session: Session, case: MoeCase, dtype: str) -> None:
    operands = Operands(case, facts.DTYPES[dtype], session.device)
    truth, reference = operands.expected(torch.float64), operands.expected(operands.x.dtype)

    def new_row(provider: str, direction: str) -> Row:
        shape = [case.tokens * case.top_k, case.experts, case.hidden, 2 * case.inner]
        times = 1 if direction == "fwd" else 3
        flops = 2 * times * shape[0] * shape[2] * shape[3]
        clock = "cuda" if session.device == "cuda" else "wall"
        return Row(
            op="moe.grouped_matmul",
            provider=provider,
            direction=direction,
            shape=shape,
            dtype=dtype,
            clock=clock,
            flops=flops,
        )

    errors: dict[str, float] = {}
    for name, call in PROVIDERS.items():
        if name != "ours" and not session.wanted(name):
            continue
        try:
            errors[name] = check(call, operands, truth, reference)
        except Exception as error:
            wrong = isinstance(error, WrongResult)
            for direction in ("fwd", "fwd+bwd"):
                row = session.add(new_row(name, direction))
                row.status = "wrong" if wrong else "failed" if name == "ours" else "absent"
                row.reason = str(error).splitlines()[0] if wrong else f"{type(error).__name__}: {error}"[:300]
    del truth, reference
    sets = rotated(operands, session.device)
    for direction, both in (("fwd", False), ("fwd+bwd", True)):
        runners: dict[str, Runner] = {
            name: lambda i, call=PROVIDERS[name], both=both: call(*sets[i % len(sets)], operands.counts, both)  # type: ignore[misc]
            for name in errors
        }
        timed = interleave(runners, session.device, session.effort)
        for name, stats in timed.items():
            row = new_row(name, direction)
            row.metrics["error"] = round(errors[name], 3)
            session.add_timed(row, stats)


def rotated(operands: Operands, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As many sets of operands as leave none in the cache."""
    tensors = operands.x, operands.weight, operands.dy
    size = sum(t.nbytes for t in tensors)
    count = sets_to_rotate(size, 3 * size, device)
    return [tensors, *((tensors[0].clone(), tensors[1].clone(), tensors[2].clone()) for _ in range(count - 1))]


def check(call: Call, operands: Operands, truth: list[Tensor], reference: list[Tensor]) -> float:
    """The largest error, in units of one matmul an expert in the same dtype.

    Raises:
        WrongResult: more than two of them.
    """
    worst = 0.0
    got = call(operands.x, operands.weight, operands.dy, operands.counts, True)
    for name, mine, ref, want in zip(("y", "dx", "dweight"), got, reference, truth, strict=True):
        ratio = error_ratio(mine, ref, want)
        worst = max(worst, ratio)
        if ratio > 2:
            raise WrongResult(f"{name} errs {ratio:.1f} times as much as one matmul an expert (2 allowed)")
    return worst
