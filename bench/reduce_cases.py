"""What ``bench reduce`` times: the end of a reduce-scatter, alone and with dropout + residual + norm in the same pass.

The kernels themselves, without ranks: partial results lie in memory as they do when the last message is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from seqpar_kernels.kernels import NormKind, NormSpec, NormTensors, RowMap, select, why_not

from . import facts
from .check import WrongResult, error_ratio
from .providers import Absent
from .schema import Row
from .session import Session
from .timing import sets_to_rotate

EPS, SEED = 1e-5, 7
BACKENDS = {"cpu": {"": "native"}, "cuda": {"": "cuda", "-triton": "triton"}}  # suffix of "ours" -> backend


@dataclass(frozen=True)
class ReduceCase:
    """One question. ``fused``: the norm follows."""

    fused: bool
    shards: int
    p: float
    dtype: str
    rows: int
    hidden: int

    def bytes(self) -> int:
        """Every shard read once; the sum written, or residual read, z, y and two statistics a row written."""
        tensor = self.rows * self.hidden * facts.DTYPES[self.dtype].itemsize
        return self.shards * tensor + (3 * tensor + 8 * self.rows if self.fused else tensor)

    def row(self, provider: str, device: str) -> Row:
        return Row(
            op="reduce.layer" if self.fused else "reduce",
            provider=provider,
            direction="fwd",
            shape=[self.shards, self.rows, self.hidden],
            dtype=self.dtype,
            params={"p": self.p} if self.fused else {},
            clock="cuda" if device == "cuda" else "wall",
            bytes=self.bytes(),
        )


@dataclass
class Buffers:
    parts: Tensor  # [shards, rows, hidden]
    residual: Tensor
    weight: Tensor
    bias: Tensor
    seed: Tensor


Call = Callable[[Buffers], list[Tensor]]


def make_buffers(case: ReduceCase, device: str) -> list[Buffers]:
    tensor = case.rows * case.hidden * facts.DTYPES[case.dtype].itemsize
    count = sets_to_rotate(case.shards * tensor, (case.shards + 1) * tensor, device)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(facts.DTYPES[case.dtype])

    seed = torch.tensor(SEED, device=device)
    sizes = ((case.shards, case.rows, case.hidden), (case.rows, case.hidden), (case.hidden,), (case.hidden,))
    return [Buffers(*(random(*size) for size in sizes), seed) for _ in range(count)]


def kernels(case: ReduceCase, backend: str, device: str, steps: int, dtype: torch.dtype | None = None) -> Call:
    """Ours in one step or in two, the sum being written and read in between."""
    module = select(backend, torch.device(device))
    dtype = dtype or facts.DTYPES[case.dtype]
    spec = NormSpec(NormKind.LAYER, False, EPS, case.p, RowMap(case.rows, 0, 0), dtype, dtype, dtype, dtype)

    def run(b: Buffers) -> list[Tensor]:
        if not case.fused:
            return [module.reduce_shards(b.parts, None)]
        x = b.parts if steps == 1 else module.reduce_shards(b.parts, None)
        seed = b.seed if case.p else None
        given = NormTensors(x, b.residual, b.weight, b.bias, seed=seed)
        out = module.norm_forward(given, spec, stacked=steps == 1)
        return [out.y, out.z]

    return run


def eager(case: ReduceCase) -> Call:
    """What one writes in PyTorch: ``sum`` accumulates in fp32."""

    def run(b: Buffers) -> list[Tensor]:
        x = b.parts.sum(0)
        if not case.fused:
            return [x]
        z = (F.dropout(x, case.p) if case.p else x) + b.residual
        return [F.layer_norm(z, z.shape[-1:], b.weight, b.bias, EPS), z]

    return run


def check(case: ReduceCase, call: Call, device: str, b: Buffers) -> float:
    """The error against fp64, in units of that of the two steps of the reference.

    Raises:
        WrongResult: it is more than 2.
    """
    wide = Buffers(*(t.double() for t in (b.parts, b.residual, b.weight, b.bias)), b.seed)
    oracle = kernels(case, "reference", device, 1, torch.float64)(wide)
    reference = kernels(case, "reference", device, 2)(b)
    found = max(map(error_ratio, call(b), reference, oracle))
    if found > 2:
        raise WrongResult(f"errs {found:.1f} times as much as the reference (2 allowed)")
    return found


def candidates(case: ReduceCase, session: Session) -> dict[str, Callable[[ReduceCase], Call]]:
    """Who may run; each is built for a case, since eager is checked without dropout."""
    device = session.device
    found: dict[str, Callable[[ReduceCase], Call]] = {}

    def own(backend: str, steps: int) -> Callable[[ReduceCase], Call]:
        def build(case: ReduceCase) -> Call:
            reason = why_not(backend, torch.device(device))
            if reason is not None:
                raise Absent(reason)
            return kernels(case, backend, device, steps)

        return build

    for suffix, backend in BACKENDS[device].items():
        found["ours" + suffix] = own(backend, 1)
        if case.fused:
            found["two-steps" + suffix] = own(backend, 2)
    if session.wanted("eager"):
        found["eager"] = eager
    return found


def measure(session: Session, case: ReduceCase) -> None:
    """Everybody checked, then interleaved."""
    device = session.device
    buffers = make_buffers(case, device)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for name, build in candidates(case, session).items():
        checked = replace(case, p=0.0) if name == "eager" else case  # eager draws masks of its own
        try:
            errors[name] = check(checked, build(checked), device, buffers[0])
            calls[name] = build(case)
        except (Absent, WrongResult) as found:
            row = session.add(case.row(name, device))
            row.status, row.reason = "absent" if isinstance(found, Absent) else "wrong", str(found)
    if not calls:
        return
    runners = {name: lambda i, call=call: call(buffers[i % len(buffers)]) for name, call in calls.items()}
    session.time_beside_copy(runners, [b.residual for b in buffers], errors, lambda name: case.row(name, device))


def cases(
    shards: Sequence[int], ps: Sequence[float], dtypes: Sequence[str], rows: Sequence[int], hidden: Sequence[int]
) -> Iterator[ReduceCase]:
    for dtype in dtypes:
        for n_rows in rows:
            for n_hidden in hidden:
                for count in shards:
                    yield ReduceCase(False, count, 0.0, dtype, n_rows, n_hidden)
                    for p in ps:
                        yield ReduceCase(True, count, p, dtype, n_rows, n_hidden)


def run(session: Session, planned: Sequence[ReduceCase]) -> list[Row]:
    """Measure every case; returns the rows added."""

    def title(case: ReduceCase) -> str:
        what = "reduce + norm" if case.fused else "reduce"
        return f"{what} {case.shards}x{case.rows}x{case.hidden} {case.dtype} p={case.p}"

    return session.measured(planned, title, measure)
