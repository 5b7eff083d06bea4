"""Whoever computes something else is listed as wrong, and not timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import seqpar_kernels as sp
from bench import host_calls, reduce_cases
from bench.check import WrongResult
from bench.reduce_cases import Buffers, ReduceCase
from bench.schema import Row
from bench.session import Session
from bench.timing import Effort

BRIEF = Effort(seconds=0.001, warmup=0.001, least=2, most=2)


def reduced(case: ReduceCase) -> dict[str, Row]:
    session = Session("reduce", effort=BRIEF, quick=True)
    session._copy_rate = 1e9
    reduce_cases.measure(session, case)
    return {row.provider: row for row in session.rows}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("fused", "p"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_reduce_eager_is_checked(fused: bool, p: float, dtype: str) -> None:
    rows = reduced(ReduceCase(fused, 3, p, dtype, 16, 48))
    assert {row.status for row in rows.values()} == {"ok"}
    assert 0 < rows["eager"].metrics["error"] <= 2


@pytest.mark.parametrize("name", ["ours", "eager"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("spoil", [lambda t: t * 1.2, lambda t: t / 0, lambda t: t[:-1]], ids=["off", "inf", "shape"])
def test_reduce_done_wrong(
    name: str, p: float, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = {"ours": "kernels", "eager": "eager"}[name]
    right = getattr(reduce_cases, make)

    def wrong(case: ReduceCase, *args: object) -> Callable[[Buffers], list[Tensor]]:
        call = right(case, *args)
        return call if "reference" in args else lambda b: [spoil(t) for t in call(b)]

    monkeypatch.setattr(reduce_cases, make, wrong)
    rows = reduced(ReduceCase(True, 3, p, "bf16", 16, 48))
    assert rows[name].status == "wrong" and rows[name].reason and rows[name].p50_ms is None
    assert rows["eager" if name == "ours" else "ours"].status == "ok"


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):  # type: ignore[no-untyped-def,override]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        return 1.01 * dy


@pytest.mark.parametrize(("spoil", "what"), [(lambda y: y * 1.01, "y errs"), (_WrongBackward.apply, "dx errs")])
def test_host_linears_done_wrong(spoil: Callable[[Tensor], Tensor], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sp.all_gather_linear
    monkeypatch.setattr(sp, "all_gather_linear", lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    session = Session("host", effort=BRIEF, quick=True)
    rows = [row for row in host_calls.run(session) if row.op == "host.linear.all_gather_linear"]
    wrong = [row for row in rows if row.provider == "ours"]
    assert len(wrong) == 1 and wrong[0].status == "wrong" and what in wrong[0].reason
    assert {row.status for row in rows if row.provider == "eager"} == {"ok"}
    host_calls.show(session.rows)


def test_host_linears_are_right() -> None:
    inputs = torch.randn(1, 4, 8), torch.randn(6, 8), torch.randn(6)
    assert host_calls.check_linear(torch.nn.functional.linear, inputs, torch.randn(1, 4, 6)) <= 1
    with pytest.raises(WrongResult, match="dbias"):
        host_calls.check_linear(
            lambda x, w, b: torch.nn.functional.linear(x, w, b.detach()) + 0 * b, inputs, torch.randn(1, 4, 6)
        )
