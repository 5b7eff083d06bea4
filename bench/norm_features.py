"""``bench norm --features``: what each option of the fused norm costs, beside the bytes it must move.

``z = row_scale * dropout(x + x_bias) + residual; y = norm(z)``; eager PyTorch says the same in its own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import why_not

from . import facts
from .check import SEED, WrongResult, error_ratio, run_backward
from .providers import EPS, Absent, eager_norm
from .schema import Row
from .session import Session
from .timing import Runner, sets_to_rotate

P = 0.1
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Feature:
    """One option; what it takes beside x and residual, and what follows for the bytes."""

    kind: str = "layer"
    vectors: tuple[str, ...] = ("weight", "bias")  # [H]
    options: dict[str, Any] = field(default_factory=dict)
    row_scale: bool = False
    wide_residual: bool = False  # residual and z in fp32
    float8: bool = False
    less: int = 0  # columns less than asked for


FEATURES = {
    "x_bias": Feature(vectors=("weight", "bias", "x_bias")),
    "residual_fp32": Feature(wide_residual=True),
    "zero_centered": Feature(options={"zero_centered_weight": True}),
    "row_scale": Feature(row_scale=True),
    "two_norms": Feature(vectors=("weight", "bias", "weight2", "bias2")),
    "rms": Feature("rms", ("weight",)),
    "no_weight": Feature(vectors=()),
    "odd_hidden": Feature(less=1),
    "float8": Feature(float8=True),
}


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    rows: int
    hidden: int

    @property
    def feature(self) -> Feature:
        return FEATURES[self.name]

    def bytes(self, direction: str) -> int:
        """As :meth:`bench.norm.NormCase.bytes`; dresidual is not dx here, since something is dropped."""
        f, size = self.feature, facts.DTYPES[self.dtype].itemsize
        z_size, y_size = 4 if f.wide_residual else size, 1 if f.float8 else size
        norms = 2 if "weight2" in f.vectors else 1
        vectors_of_rows = self.rows * 4 * (2 if f.kind == "layer" else 1) + self.rows * 4 * f.row_scale
        elements = self.rows * self.hidden
        forward = elements * (size + 2 * z_size + norms * y_size) + vectors_of_rows
        if direction == "fwd":
            return forward
        return forward + elements * (norms * size + 3 * z_size + size) + vectors_of_rows

    def row(self, provider: str, direction: str, device: str) -> Row:
        return Row(
            op=f"features.{self.name}",
            provider=provider,
            direction=direction,
            shape=[self.rows, self.hidden],
            dtype=self.dtype,
            params={"p": P},
            clock="cuda" if device == "cuda" else "wall",
            bytes=self.bytes(direction),
        )


@dataclass
class Buffers:
    """Named inputs of one call, and a gradient for each output."""

    inputs: dict[str, Tensor]
    grads: tuple[Tensor, ...]

    def leaves(self) -> list[Tensor]:
        return [t for t in self.inputs.values() if t.requires_grad]

    def converted(self, dtype: torch.dtype) -> Buffers:
        """The same numbers, in ``dtype`` where they were 16-bit or residual; row scales stay fp32."""
        keep = ("row_scale", "y_scale")
        inputs = {
            k: t if k in keep else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
            for k, t in self.inputs.items()
        }
        return Buffers(inputs, tuple(g.to(dtype) for g in self.grads))


def make_buffers(case: Case, device: str) -> list[Buffers]:
    f, dtype = case.feature, facts.DTYPES[case.dtype]
    wide = torch.float32 if f.wide_residual else dtype
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    norms = 2 if "weight2" in f.vectors else 1
    read = case.rows * case.hidden * (dtype.itemsize + wide.itemsize)  # x and residual; the rest is shared
    count = sets_to_rotate(read, 2 * read + (norms - 1) * case.rows * case.hidden * dtype.itemsize, device)
    shared = {name: random(case.hidden).requires_grad_(not f.float8) for name in f.vectors}
    if f.row_scale:
        shared["row_scale"] = random(case.rows, dtype=torch.float32).abs()
    if f.float8:
        shared["y_scale"] = torch.tensor(16.0, device=device)
    found = []
    for _ in range(count):
        made = {"x": random(case.rows, case.hidden), "residual": random(case.rows, case.hidden, dtype=wide)}
        grads = [random(case.rows, case.hidden) for _ in range(norms)] + [random(case.rows, case.hidden, dtype=wide)]
        found.append(Buffers({k: t.requires_grad_(not f.float8) for k, t in made.items()} | shared, tuple(grads)))
    return found


def ours(f: Feature, backend: str, device: str) -> Call:
    reason = why_not(backend, torch.device(device))
    if reason is None and f.float8 and backend == "native" and device == "cpu":
        reason = "the CPU kernels store no float8"
    if reason is not None:
        raise Absent(reason)
    norm = sp.dropout_add_layer_norm if f.kind == "layer" else sp.dropout_add_rms_norm
    options = {"prenorm": True, "eps": EPS, "backend": backend, **f.options}

    def run(inputs: dict[str, Tensor], p: float, seed: int | None = None) -> tuple[Tensor, ...]:
        return norm(**{"weight": None, **inputs}, p=p, seed=seed, **options)

    return run


def eager(f: Feature, device: str) -> Call:
    """What a user without the fused op writes."""
    if f.float8:
        raise Absent("PyTorch's norms store no float8")

    def run(inputs: dict[str, Tensor], p: float, seed: int | None = None) -> tuple[Tensor, ...]:
        x = inputs["x"]
        z = x + inputs["x_bias"] if "x_bias" in inputs else x
        z = F.dropout(z, p) if p else z
        if f.row_scale:
            z = (z * inputs["row_scale"][:, None]).to(x.dtype)
        z = z + inputs["residual"]
        normed = z.to(x.dtype)

        weights = [(inputs.get("weight"), inputs.get("bias"))]
        weights += [(inputs["weight2"], inputs["bias2"])] if "weight2" in inputs else []
        if f.options:
            weights = [(None if w is None else 1 + w, b) for w, b in weights]
        return (*(eager_norm(f.kind, normed, w, b) for w, b in weights), z)

    return run


def check(fn: Call, case: Case, buffers: Buffers, p: float, strict: bool = True) -> float:
    """Outputs and gradients against the specification in fp64, with the same mask where one is drawn.

    Returns:
        float: the largest error, in units of what one rounding in this dtype makes of the specification.

    Raises:
        WrongResult: it is more than 2; not ``strict`` for eager, which rounds after every operation: more than 16.
    """
    allowed = 2 if strict else 16
    relative = 0.0 if strict else torch.finfo(facts.DTYPES[case.dtype]).eps  # even what is fp32 came through this
    specification = ours(case.feature, "reference", buffers.inputs["x"].device.type)

    def everything(fn: Call, b: Buffers) -> list[Tensor]:
        out = fn(b.inputs, p, SEED)
        if case.feature.float8:
            return [t.detach() for t in out]
        return [t.detach() for t in (*out, *run_backward(out, b.leaves(), b.grads))]

    same, exact = everything(specification, buffers), everything(specification, buffers.converted(torch.float64))
    worst = 0.0
    for i, (got, reference, oracle) in enumerate(zip(everything(fn, buffers), same, exact, strict=True)):
        if case.feature.float8 and i == 0:
            got, reference, oracle = got.float(), reference.float(), oracle.double()
            if (got != reference).float().mean() > 0.01:  # a tie may fall either way
                raise WrongResult("float8 outputs differ from the specification's")
            continue
        ratio = error_ratio(got, reference, oracle, relative)
        worst = max(worst, ratio)
        if ratio > allowed:
            raise WrongResult(f"output {i} errs {ratio:.1f} times as much as one rounding would ({allowed} allowed)")
    return worst


def runner(fn: Call, buffers: list[Buffers], backward: bool) -> Runner:
    def run(i: int) -> object:
        b = buffers[i % len(buffers)]
        out = fn(b.inputs, P)
        return run_backward(out, b.leaves(), b.grads) if backward else out

    return run


def measure(session: Session, case: Case) -> None:
    """Ours and eager, checked and then interleaved with a copy."""
    buffers = make_buffers(case, session.device)
    candidates: dict[str, Callable[[], Call]] = {
        "ours": lambda: ours(case.feature, "native", session.device),
    }
    if session.device == "cuda":
        candidates["ours-triton"] = lambda: ours(case.feature, "triton", session.device)
    if session.wanted("eager"):
        candidates["eager"] = lambda: eager(case.feature, session.device)
    directions = ("fwd",) if case.feature.float8 else ("fwd", "fwd+bwd")
    functions: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for name, build in candidates.items():
        try:
            fn = build()
            strict = name != "eager"
            errors[name] = check(fn, case, buffers[0], P if strict else 0.0, strict)  # eager draws its own masks
            functions[name] = fn
        except (Absent, WrongResult) as error:
            for direction in directions:
                row = session.add(case.row(name, direction, session.device))
                row.status, row.reason = "absent" if isinstance(error, Absent) else "wrong", str(error)
    if not functions:
        return
    for direction in directions:
        runners = {name: runner(fn, buffers, direction != "fwd") for name, fn in functions.items()}
        sources = [b.grads[0] for b in buffers]
        session.time_beside_copy(runners, sources, errors, lambda name: case.row(name, direction, session.device))  # noqa: B023


def cases(names: Sequence[str], dtype: str, rows: int, hidden: int) -> list[Case]:
    """Each feature at one shape."""
    return [Case(name, dtype, rows, max(1, hidden - FEATURES[name].less)) for name in names or FEATURES]


def run(session: Session, planned: Sequence[Case]) -> list[Row]:
    """Measure every case; returns the rows added."""

    def title(case: Case) -> str:
        return f"features.{case.name} {case.rows}x{case.hidden} {case.dtype}"

    return session.measured(planned, title, measure)
