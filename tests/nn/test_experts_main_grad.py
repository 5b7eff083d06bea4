"""Gradients of experts added to a float32 main_grad over micro-batches, on ranks, against sums in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp

from ..functional.groups import on_ranks
from ..functional.moe_problem import BF16, F32, F64, Problem
from ..world import World


def inputs(problem: Problem, group: dist.ProcessGroup | None, way: str, scale: float) -> tuple[Tensor, ...]:
    """x, index, weights and dout of this rank; x is scaled."""
    mine = [problem.mine(n, t, group, way) for n, t in (*problem.tensors.items(), ("dout", problem.dout))]
    named = dict(zip((*problem.tensors, "dout"), mine, strict=True))
    return named["x"] * scale, problem.mine("index", problem.index, group, way), named["weights"], named["dout"]


def accumulation_case(group: dist.ProcessGroup, way: str, dtype: torch.dtype, transposed: bool) -> None:
    """Three micro-batches whose sizes differ, all forwards before the first backward; some experts get no token."""
    problem = Problem((13, 0, 29, 7)[: group.size()], dtype=dtype, choose="first", experts=7, biases=True)
    t = {n: problem.mine(n, v, group, way).clone() for n, v in problem.tensors.items()}
    wide = F64 if dtype == F64 else F32
    stored = {n: (t[n].transpose(1, 2).contiguous() if transposed else t[n]).requires_grad_() for n in ("w1", "w2")}
    main = {n: torch.ones_like(w, dtype=wide, requires_grad=False) for n, w in stored.items()}  # not zeros: it is added

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if transposed else tensor

    scales = [4.0**-i for i in range(3)]
    outs, exact = [], {n: torch.zeros(t[n].shape, dtype=F64) for n in stored}
    plain = {n: torch.zeros(t[n].shape, dtype=dtype) for n in stored}
    biases = [t["b1"].requires_grad_(), t["b2"].requires_grad_()]
    for scale in scales:
        x, index, weights, dout = inputs(problem, group, way, scale)
        args = (x, index, weights, laid_out(stored["w1"]), laid_out(stored["w2"]), *biases)
        options: dict[str, Any] = dict(group=group, num_experts=problem.experts, experts=way, chunks=2)
        outs.append((sp.moe_mlp(*args, **options, main_grad=[laid_out(main["w1"]), laid_out(main["w2"])]), dout))
        same = sp.moe_mlp(*args, **options)
        for n, grad in zip(stored, torch.autograd.grad(same, list(stored.values()), dout), strict=True):
            plain[n] += laid_out(grad)
        whole = Problem(problem.tokens, dtype=dtype, choose="first", experts=7, biases=True)
        whole.tensors["x"] = whole.tensors["x"] * scale
        oracle = whole.plain(F64)
        for n in stored:
            exact[n] += problem.mine(n, oracle[n], group, way)
    for out, dout in outs:
        out.backward(dout)
    for n, weight in stored.items():
        assert weight.grad is None
        got = laid_out(main[n]).double() - 1
        scale = float(exact[n].abs().max()) if exact[n].numel() else 0.0
        error, others = ((value.double() - exact[n]).abs().max() if scale else 0.0 for value in (got, plain[n]))
        assert error <= 2 * others + 16 * torch.finfo(wide).eps * max(scale, 1.0), (n, error, others)
    assert all(bias.grad is not None for bias in biases)


@pytest.mark.parametrize(("dtype", "transposed"), [(BF16, False), (F32, True), (F64, False)])
@pytest.mark.parametrize("way", ["ep", "tp"])
def test_three_micro_batches(world4: World, way: str, dtype: torch.dtype, transposed: bool) -> None:
    world4.run(on_ranks, accumulation_case, way, dtype, transposed)


def module_case(group: dist.ProcessGroup) -> None:
    """The option of the module, with the flag and the placeholder that Megatron's hooks look for."""
    for transposed in (False, True):
        torch.manual_seed(3)
        into, plain = (sp.Experts(6, 8, 12, group=group, bias=True, transposed=transposed) for _ in range(2))
        plain.load_state_dict(into.state_dict())
        into.accumulate_into_main_grad = True
        weights, index = torch.randn(5, 6).softmax(-1).topk(2)
        x = torch.randn(5, 8)
        with pytest.raises(ValueError, match=r"accumulate_into_main_grad: expected gate_up_proj\.main_grad"):
            into(x, index, weights)
        found = []
        for weight in (into.gate_up_proj, into.down_proj):
            weight.main_grad = torch.zeros_like(weight)
            weight.grad_added_to_main_grad = False
            weight.register_post_accumulate_grad_hook(lambda w, found=found: found.append(w.grad_added_to_main_grad))
        for _ in range(2):
            for module in (into, plain):
                module(x, index, weights).square().sum().backward()
        assert found == [True] * 4
        for name, param in plain.named_parameters():
            other = into.get_parameter(name)
            torch.testing.assert_close(other.main_grad if hasattr(other, "main_grad") else other.grad, param.grad)
        with torch.no_grad():
            into(x, index, weights)
        into.down_proj.requires_grad_(False)
        before = into.down_proj.main_grad.clone()
        into(x, index, weights).sum().backward()
        assert torch.equal(into.down_proj.main_grad, before)


def test_module(world4: World) -> None:
    world4.run(on_ranks, module_case)


def test_refused() -> None:
    weights, index = torch.randn(5, 6).softmax(-1).topk(2)
    experts = sp.Experts(6, 8, 12)
    first, second = experts.gate_up_proj, experts.down_proj
    right = torch.zeros_like(first), torch.zeros_like(second)
    wrong: list[tuple[str, Any]] = [
        (r"main_grad\[1\]: expected torch.float32", (right[0], right[1].double())),
        (r"main_grad\[0\]: expected torch.float32", (right[1], None)),
        ("main_grad: expected two", (right[0],)),
        ("main_grad: expected two", right[0]),
    ]
    for text, main_grad in wrong:
        with pytest.raises(ValueError, match=text):
            sp.moe_mlp(torch.randn(5, 8), index, weights, first, second, group=None, main_grad=main_grad)

    def run(x: Tensor) -> Tensor:
        return sp.moe_mlp(x, index, weights, first, second, group=None, main_grad=right).sum()

    with pytest.raises(Exception, match=r"main_grad\[0\]: not possible under torch\.compile"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(torch.randn(5, 8))


def test_opcheck() -> None:
    problem = Problem((9,), dtype=F64, biases=True)
    t = problem.tensors
    scalars = sp.ops.MoeScalars(problem.experts, "ep", None, None, "", "silu", True, False, 1.0, None, 0.0)
    experts = (t["w1"], t["b1"], t["w2"], t["b2"])
    _, *received = sp.ops.moe_mlp(t["x"], problem.index, t["weights"], *experts, *scalars)
    into = [torch.zeros_like(t["w1"]), None]
    args = (problem.dout, t["x"], problem.index, t["weights"], *experts, *received, [True] * 6, *scalars, into)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.seqpar.moe_mlp_backward_into.default, args, test_utils=utilities)
