"""What ``bench norm`` times: the fused norm and its peers at each shape, each provider checked first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import facts
from .check import WrongResult, check_norm, run_backward
from .providers import OURS, PEERS, Absent, NormFunction
from .schema import Row
from .session import Session
from .timing import Runner, sets_to_rotate


@dataclass(frozen=True)
class NormCase:
    """One question."""

    kind: str
    p: float
    dtype: str
    rows: int
    hidden: int

    def tensor_bytes(self) -> int:
        return self.rows * self.hidden * facts.DTYPES[self.dtype].itemsize

    def bytes(self, direction: str) -> int:
        """What anybody must move: each input read once, each output written once; [hidden] vectors are negligible.

        Forward: x, residual in; z, y out. Backward: dy, dz, z in; dx out, and with dropout dresidual, which otherwise
        is dx. Statistics are 4 bytes a row each.
        """
        statistics = self.rows * 4 * (2 if self.kind == "layer" else 1)
        forward = 4 * self.tensor_bytes() + statistics
        if direction == "fwd":
            return forward
        return forward + (5 if self.p else 4) * self.tensor_bytes() + statistics

    def row(self, provider: str, direction: str, device: str) -> Row:
        return Row(
            op=f"norm.{self.kind}",
            provider=provider,
            direction=direction,
            shape=[self.rows, self.hidden],
            dtype=self.dtype,
            params={"p": self.p},
            clock="cuda" if device == "cuda" else "wall",
            bytes=self.bytes(direction),
        )


@dataclass
class Buffers:
    """Inputs and gradients of one call; as many of them rotate as exceed the cache with x and residual alone."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    grads: tuple[Tensor, Tensor]


def make_buffers(case: NormCase, device: str) -> list[Buffers]:
    count = sets_to_rotate(2 * case.tensor_bytes(), 4 * case.tensor_bytes(), device)
    generator = torch.Generator(device).manual_seed(0)
    dtype = facts.DTYPES[case.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    weight, bias = (random(case.hidden).requires_grad_() for _ in range(2))
    found = []
    for _ in range(count):
        x, residual, dy, dz = (random(case.rows, case.hidden) for _ in range(4))
        inputs = (x.requires_grad_(), residual.requires_grad_(), weight, bias if case.kind == "layer" else None)
        found.append(Buffers(inputs, (dy, dz)))
    return found


def forward_runner(fn: NormFunction, case: NormCase, buffers: list[Buffers]) -> Runner:
    """A training forward: gradients are wanted, statistics are kept."""
    return lambda i: fn(*buffers[i % len(buffers)].inputs, case.p)


def both_runner(fn: NormFunction, case: NormCase, buffers: list[Buffers]) -> Runner:
    def run(i: int) -> object:
        b = buffers[i % len(buffers)]
        return run_backward(fn(*b.inputs, case.p), b.inputs, b.grads)

    return run


def measure(session: Session, case: NormCase) -> None:
    """All providers at one shape, checked and then interleaved."""
    buffers = make_buffers(case, session.device)
    functions: dict[str, NormFunction] = {}
    errors: dict[str, float] = {}
    candidates = {**OURS[session.device], **{k: v for k, v in PEERS.items() if session.wanted(k)}}
    for name, build in candidates.items():
        status, reason = "", ""
        try:
            functions[name] = build(case.kind, case.p, session.device)
            first, strict = buffers[0], name in OURS[session.device]
            errors[name] = check_norm(functions[name], case.kind, case.p, first.inputs, first.grads, strict)
        except Absent as error:
            status, reason = "absent", str(error)
        except WrongResult as error:
            status, reason = "wrong", str(error)
        except Exception as error:  # a peer may fail in any way; that is a result too
            status, reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if status:
            functions.pop(name, None)
            for direction in ("fwd", "fwd+bwd"):
                row = session.add(case.row(name, direction, session.device))
                row.status, row.reason = status, reason
    for direction, make in (("fwd", forward_runner), ("fwd+bwd", both_runner)):
        runners = {name: make(fn, case, buffers) for name, fn in functions.items()}
        sources = [b.grads[0] for b in buffers]
        session.time_beside_copy(runners, sources, errors, lambda name: case.row(name, direction, session.device))  # noqa: B023


def cases(
    kinds: Sequence[str], ps: Sequence[float], dtypes: Sequence[str], rows: Sequence[int], hidden: Sequence[int]
) -> Iterator[NormCase]:
    for dtype in dtypes:
        for n_rows in rows:
            for n_hidden in hidden:
                for kind in kinds:
                    for p in ps:
                        yield NormCase(kind, p, dtype, n_rows, n_hidden)


def run(session: Session, planned: Sequence[NormCase]) -> list[Row]:
    """Measure every case; returns the rows added."""

    def title(case: NormCase) -> str:
        return f"norm.{case.kind} {case.rows}x{case.hidden} {case.dtype} p={case.p}"

    return session.measured(planned, title, measure)
