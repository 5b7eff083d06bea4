"""What ``bench coverage`` runs: every op on every backend in every dtype; outputs and gradients checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import BACKENDS, why_not

from . import facts
from .check import WrongResult, error_ratio
from .report import table
from .schema import Row
from .session import Session

ROWS, HIDDEN, P, SEED = 6, 40, 0.25, 7
Call = Callable[[list[Tensor]], list[Tensor]]
SIGNS = {"ok": "yes", "wrong": "WRONG", "absent": "-", "failed": "FAILED"}


def _fused(op: str, backend: str) -> tuple[Call, list[tuple[int, ...]]]:
    """The call and the shapes of its inputs."""
    matrix, vector = (ROWS, HIDDEN), (HIDDEN,)
    common: dict[str, Any] = {"p": P, "seed": SEED, "backend": backend}
    if op == "dropout_add":
        return lambda t: [sp.dropout_add(*t, **common)], [matrix, matrix]
    if op == "dropout_add_rms_norm":
        return lambda t: list(sp.dropout_add_rms_norm(*t, prenorm=True, **common)), [matrix, matrix, vector]
    return lambda t: list(sp.dropout_add_layer_norm(*t, prenorm=True, **common)), [matrix, matrix, vector, vector]


def _linear(op: str, backend: str) -> tuple[Call, list[tuple[int, ...]]]:
    fn = F.linear if backend == "reference" else partial(getattr(sp, op), group=None)
    return lambda t: [fn(*t)], [(1, ROWS, HIDDEN), (16, HIDDEN), (16,)]


def _linear_norm(op: str, backend: str) -> tuple[Call, list[tuple[int, ...]]]:
    def run(t: list[Tensor]) -> list[Tensor]:
        x, weight, bias, residual, norm_weight, norm_bias = t
        if backend == "reference":
            options: dict[str, Any] = {"x_bias": bias, "prenorm": True, "p": P, "seed": SEED, "backend": backend}
            return list(sp.dropout_add_layer_norm(F.linear(x, weight), residual, norm_weight, norm_bias, **options))
        named = {"residual": residual, "norm_weight": norm_weight, "norm_bias": norm_bias}
        return list(getattr(sp, op)(x, weight, bias, **named, p=P, seed=SEED, group=None))

    return run, [(1, ROWS, HIDDEN), (16, HIDDEN), (16,), (1, ROWS, 16), (16,), (16,)]


def evaluate(call: Call, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Outputs, then gradients. The same numbers whatever the dtype: they are bf16's."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(device, dtype)

    inputs = [random(*shape).requires_grad_() for shape in shapes]
    outs = call(inputs)
    grads = torch.autograd.grad(outs, inputs, [random(*out.shape) for out in outs])
    return [*(out.detach() for out in outs), *grads]


def run(session: Session, dtypes: list[str]) -> list[Row]:
    """Every combination; returns the rows added."""
    first = len(session.rows)
    device = torch.device(session.device)
    fused = ["dropout_add", "dropout_add_layer_norm", "dropout_add_rms_norm"]
    backends = [name for name in BACKENDS if name != "native"]  # native is cpu or cuda
    plans = [(op, backend, partial(_fused, op)) for op in fused for backend in backends]
    plans += [(op, "torch", partial(_linear, op)) for op in ("all_gather_linear", "linear_reduce_scatter")]
    op = "linear_reduce_scatter_dropout_add_norm"
    plans.append((op, "native", partial(_linear_norm, op)))
    session.progress.plan(len(plans))
    for op, backend, make in plans:
        session.progress.step(f"coverage {op} {backend}")
        reason = None if backend == "torch" else why_not(backend, device)
        for dtype in dtypes:
            row = Row(op=f"coverage.{op}", provider=backend, direction="fwd+bwd", shape=[ROWS, HIDDEN], dtype=dtype)
            session.add(row)
            if reason is not None:
                row.status, row.reason = "absent", reason
                continue
            oracle_call, shapes = make("reference")
            try:
                got = evaluate(make(backend)[0], shapes, facts.DTYPES[dtype], session.device)
                reference = evaluate(oracle_call, shapes, facts.DTYPES[dtype], session.device)
                oracle = evaluate(oracle_call, shapes, torch.float64, session.device)
                row.metrics["error"] = round(max(map(error_ratio, got, reference, oracle)), 3)
                if row.metrics["error"] > 2:
                    row.status, row.reason = "wrong", f"errs {row.metrics['error']} times as much as the reference"
            except WrongResult as error:
                row.status, row.reason = "wrong", str(error)
            except Exception as error:
                row.status = "absent" if isinstance(error, ValueError | NotImplementedError) else "failed"  # refused
                row.reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return session.rows[first:]


def show(rows: list[Row]) -> None:
    """A matrix: one line an op and backend, one column a dtype."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    lines = []
    for op, backend in dict.fromkeys((row.op, row.provider) for row in rows):
        cells = {row.dtype: row for row in rows if (row.op, row.provider) == (op, backend)}
        reason = next((row.reason for row in cells.values() if row.reason), "")
        signs = [SIGNS[cells[dtype].status] if dtype in cells else "" for dtype in dtypes]
        lines.append([op.removeprefix("coverage."), backend, *signs, reason])
    table(f"what runs on {rows[0].device} here, checked in fp64", ["op", "backend", *dtypes, "why not"], lines, left=2)
