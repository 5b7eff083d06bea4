"""seqpar::block_attention and merge_attention as PyTorch sees them: opcheck, gradcheck, compile, strides, lse."""

from __future__ import annotations

import math

import pytest
import torch

import seqpar_kernels as sp
from seqpar_kernels import ops
from seqpar_kernels.kernels import attention_native, attention_reference
from seqpar_kernels.kernels.attention_spec import AttentionMasks, AttentionSpec

from ..kernels.attention_cases import BF16, F32, F64, SEED, Case
from ..kernels.norm_cases import poison, within  # noqa: F401

if attention_native.unavailable(torch.device("cpu")) is not None:
    pytest.skip(str(attention_native.unavailable(torch.device("cpu"))), allow_module_level=True)


def arguments(case: Case) -> tuple[object, ...]:
    return (case.q, case.k, case.v, *case.masks, *case.spec)


def documents(rows: int) -> torch.Tensor:
    return torch.arange(rows) // 3


OPTIONS = {
    "causal": dict(right=0, q_offset=2),
    "behind": dict(right=-2, left=5),
    "positions": dict(right=0, q_positions=torch.tensor([0, 1, 7, 8, 9]), k_positions=torch.arange(2, 9)),
    "documents, cap, mask": dict(
        q_documents=documents(5), k_documents=documents(7), softcap=3.0, mask=torch.arange(7) != 1
    ),
    "bias, dropout": dict(bias=torch.linspace(-1, 1, 35).view(5, 7), seed=SEED, p=0.3),
}


def leaves(case: Case) -> list[torch.Tensor]:
    found = [case.q, case.k, case.v] + ([] if case.masks.bias is None else [case.masks.bias])
    return [t.requires_grad_() for t in found]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_and_opcheck(name: str) -> None:
    options = dict(OPTIONS[name])
    if "bias" in options:
        options["bias"] = options["bias"].double().clone()
    case = Case((5, 7), (4, 2), (3, 2), F64, **options)
    seen = attention_reference.seen(case.spec, case.masks, 5, 7, case.q.device).any(-1).expand(2, 4, 5)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        masks = case.masks if len(tensors) == 3 else case.masks._replace(bias=tensors[3])
        out, lse = ops.block_attention(*tensors[:3], *masks, *case.spec)
        return torch.cat([out.flatten(), lse[seen]])  # a row that sees no key has the lse -inf

    assert torch.autograd.gradcheck(run, leaves(case))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(run(*leaves(case)).sum(), case.q, create_graph=True)
    torch.library.opcheck(torch.ops.seqpar.block_attention.default, arguments(case))
    case.masks = case.masks._replace(bias=None if case.masks.bias is None else case.masks.bias.detach())
    out, lse = (t.detach() for t in ops.block_attention(*arguments(case)))
    args = (out, torch.ones_like(lse), out, lse, True, *(t.detach() for t in (case.q, case.k, case.v)))
    torch.library.opcheck(torch.ops.seqpar.block_attention_backward.default, (*args, *case.masks, *case.spec))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradient_of_a_bias(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((1, 4, 1, 41), (2, 1, 37, 41), (37, 41), (2, 4, 1, 41)):
        bias = torch.randn(shape, dtype=F32)
        case = Case((37, 41), (4, 2), (16, 16), dtype, bias=bias, right=0, q_offset=4)
        exact = case.as_fp64()
        grads = []
        for some, kind in ((case, None), (exact, F64)):
            b = bias.to(kind or F32).requires_grad_()
            out, _ = ops.block_attention(some.q, some.k, some.v, *some.masks._replace(bias=b), *some.spec)
            grads.append(torch.autograd.grad(out, b, some.dout)[0])
        q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
        b = bias.clone().requires_grad_()
        see = attention_reference.seen(case.spec, case.masks, 37, 41, q.device)
        added = torch.where(see, b.to(dtype), -math.inf)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, added, enable_gqa=True)
        (plain,) = torch.autograd.grad(out, b, case.dout.transpose(1, 2))
        within("dbias", grads[0], grads[1], plain.double() - grads[1], F32, 16.0)


def test_compiled_without_a_break_and_strided(poison: None) -> None:  # noqa: F811
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spec = AttentionSpec(0.25, right=0, all_heads=4, all_rows=45)
        return ops.block_attention(q, k, v, *AttentionMasks(), *spec)  # type: ignore[no-any-return]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for layout in ("rows", "heads", "wide"):
        case = Case((45, 45), (4, 2), (16, 8), layout=layout)
        inputs = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        for fn in (run, compiled):
            out, lse = fn(*inputs)
            dlse = torch.ones(lse.transpose(1, 2).shape).transpose(1, 2)
            grads = torch.autograd.grad([out, lse], inputs, [case.dout, dlse])
            results.append((out.detach(), lse.detach(), *grads))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


def parts(dtype: torch.dtype, generator: torch.Generator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    outs = [torch.randn(2, 5, 3, 4, generator=generator, dtype=F64).to(dtype) for _ in range(3)]
    lses = [torch.randn(2, 3, 5, generator=generator, dtype=F64) for _ in range(3)]
    return outs, [t if dtype == F64 else t.float() for t in lses]


def test_merge_gradients() -> None:
    outs, lses = parts(F64, torch.Generator().manual_seed(0))
    lses[1][:, 0] = -math.inf
    inputs = [t.requires_grad_() for t in (*outs, lses[0], lses[2])]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sp.merge_attention(tensors[:3], [tensors[3], lses[1], tensors[4]])

    assert torch.autograd.gradcheck(run, inputs)
    torch.library.opcheck(torch.ops.seqpar.merge_attention.default, (outs, [inputs[3], lses[1], inputs[4]]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(*inputs), strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_merge_of_rows_without_keys(dtype: torch.dtype) -> None:
    """Nothing of a part with lse -inf comes through, neither forward nor backward, be it NaN."""
    outs, lses = parts(dtype, torch.Generator().manual_seed(1))
    for i in range(3):
        lses[i][0] = -math.inf
    lses[1][:] = -math.inf
    outs[1][:] = math.nan
    inputs = [t.requires_grad_() for t in (*outs, *lses)]
    out, lse = sp.merge_attention(inputs[:3], inputs[3:])
    assert not out[0].any() and (lse[0] == -math.inf).all() and torch.isfinite(out).all()
    grads = torch.autograd.grad([out, lse], inputs, [torch.ones_like(out), torch.ones_like(lse)])
    assert all(torch.isfinite(g).all() and not g[0].any() for g in grads)
    assert not grads[1].any() and not grads[4].any() and grads[0][1].all()


def test_blocks_merge_to_the_whole() -> None:
    case = Case((23, 40), (4, 2), (16, 16), F64, right=0, q_offset=17)
    whole = ops.block_attention(*arguments(case))
    found = []
    for start, stop in ((0, 13), (13, 40)):
        spec = case.spec._replace(k_offset=start)
        found.append(ops.block_attention(case.q, case.k[:, start:stop], case.v[:, start:stop], *case.masks, *spec))
    merged = sp.merge_attention(*zip(*found, strict=True))
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_messages() -> None:
    out, lse = torch.ones(1, 2, 3, 4), torch.ones(1, 3, 2)
    for message, args in (
        ("lses: expected one for each of one or more outs, got 0 outs", ([], [])),
        (r"lses\[0\]: expected \[B, H, S\] = \(1, 3, 2\), got \(1, 2, 3\)", ([out], [lse.transpose(1, 2)])),
        (r"outs\[1\]: expected torch.float32 \[B, S, H, D\] of one shape", ([out, out.double()], [lse, lse])),
    ):
        with pytest.raises(ValueError, match=message):
            sp.merge_attention(*args)
