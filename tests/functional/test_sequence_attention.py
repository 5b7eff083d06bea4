"""sequence_parallel_attention on 1, 2, 3 and 4 ranks against the unsharded fp64 run, every mask on every engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqpar_kernels as sp
from seqpar_kernels import ops
from seqpar_kernels.kernels import attention_native
from seqpar_kernels.ops.sequence_attention import Scalars

from ..kernels.norm_cases import poison  # noqa: F401
from ..world import World
from .attention_cases import CASES, ENGINES, ends
from .attention_problem import BF16, F32, F64, NAMES, Problem
from .groups import on_ranks

if attention_native.unavailable(torch.device("cpu")) is not None:
    pytest.skip(str(attention_native.unavailable(torch.device("cpu"))), allow_module_level=True)


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str) -> None:
    CASES[name]().check(None)
    CASES[name]().check(None, with_lse=True)


def masks_case(group: dist.ProcessGroup, names: list[str]) -> None:
    for name in names:
        problem = CASES[name]()
        for i, asked in enumerate(ENGINES[group.size()]):
            problem.check(group, with_lse=i % 2 == 0, **asked)


@pytest.mark.parametrize("first", range(0, len(CASES), 5))
def test_masks_on_ranks(world4: World, first: int) -> None:
    world4.run(on_ranks, masks_case, list(CASES)[first : first + 5])


def equal(one: dict[str, Tensor], other: dict[str, Tensor], names: tuple[str, ...] = NAMES) -> bool:
    return all(torch.equal(one[name], other[name]) for name in names if name in one)


def bits_case(group: dist.ProcessGroup) -> None:
    """Ulysses gives the bits of one rank, the gathered engine those of out and dq; a ring's depend on no cut."""
    problems = [
        Problem((67, 67), heads=(8, 4), dtype=dtype, is_causal=True, layout=layout, dropout_p=p, sinks=p > 0)
        for dtype, layout, p in ((F32, "zigzag", 0.0), (BF16, "contiguous", 0.2), (F32, "contiguous", 0.0))
    ]
    for problem in problems:
        one = problem.sharded(None)
        mine = {n: problem.shard(t, 2 if n == "lse" else 1, group) if t.dim() > 1 else t for n, t in one.items()}
        rows = ("out", "lse", "dq", "dk", "dv")
        assert equal(problem.sharded(group, engine="ulysses"), mine, rows)
        assert equal(problem.sharded(group, engine="all_gather"), mine, rows[:3])
        ring = problem.sharded(group, engine="ring", save_kv=True)
        for asked in (dict(chunks=2), dict(chunks=5, save_kv=True), dict(save_kv=False)):
            assert equal(problem.sharded(group, engine="ring", **asked), ring)
        sp.set_max_workspace_bytes(16 * 3 * 8 * 4 * 24 * 2)
        try:
            assert equal(problem.sharded(group, engine="ring"), ring)
            assert equal(problem.sharded(group, engine="ring", save_kv=False), ring)
        finally:
            sp.set_max_workspace_bytes(None)


def strides_case(group: dist.ProcessGroup) -> None:
    """[B, H, S, D] in memory, gradients of any strides: the same numbers."""
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    dout = torch.randn(2, 4, 6, 8)
    found = []
    for engine in ("ring", "ulysses"):
        for laid_out in (lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2).contiguous()):
            inputs = [laid_out(t).detach().requires_grad_() for t in (q, k, v)]
            out = sp.sequence_parallel_attention(*inputs, group=group, is_causal=True, engine=engine)
            found.append([out.detach(), *torch.autograd.grad(out, inputs, laid_out(dout))])
    for first, second in (found[:2], found[2:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def checkpoint_case(group: dist.ProcessGroup) -> None:
    """Recomputed in the backward, seeds drawn again: the same bits."""
    for asked in (dict(layout="zigzag", engine="ring"), dict(layout="zigzag"), dict(engine="ulysses")):
        whole = [torch.randn(1, 19, heads, 8) for heads in (4, 4, 4)]
        found = []
        for again in (False, True):
            q, k, v = (
                sp.shard_sequence(t, group, 1, layout=asked.get("layout", "contiguous")).requires_grad_() for t in whole
            )

            def attend(q: Tensor, k: Tensor, v: Tensor, asked: dict[str, Any] = asked) -> Tensor:
                return sp.sequence_parallel_attention(  # type: ignore[return-value]
                    q * 1.5, k, v, group=group, is_causal=True, dropout_p=0.1, seq_len=19, **asked
                )

            torch.manual_seed(3)
            out = checkpoint(attend, q, k, v, use_reentrant=False) if again else attend(q, k, v)
            found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def compile_case(group: dist.ProcessGroup) -> None:
    """One op forward, one backward, whatever the engine."""
    engines = [dict(engine="ring", save_kv=True), dict(engine="ulysses"), dict(ring_degree=1, return_lse=True)]
    if group.size() == 4:
        engines.append(dict(engine="all_gather", save_kv=True, ulysses_degree=2))
    for asked in engines:
        inputs = [torch.randn(1, 5, 4, 8, requires_grad=True) for _ in range(3)]
        inputs.append(torch.randn(4, requires_grad=True))
        graphs: list[str] = []
        torch._dynamo.reset()  # one function for all cases of all groups: too many to be compiled again for each

        def attend(*tensors: Tensor, asked: dict[str, Any] = asked) -> Any:
            return sp.sequence_parallel_attention(*tensors[:3], sinks=tensors[3], group=group, is_causal=True, **asked)

        def seen(graph: torch.fx.GraphModule, _: object, graphs: list[str] = graphs) -> Any:
            graphs += [str(n.target) for n in graph.graph.nodes if "seqpar" in str(n.target)]
            return graph

        from torch._dynamo.backends.common import aot_autograd

        run = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen))
        results = []
        for fn in (attend, run):
            outs = fn(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            results.append([*outs, *torch.autograd.grad([o.sum() for o in outs], inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert graphs == ["seqpar.sequence_attention.default", "seqpar.sequence_attention_backward.default"]


def no_gradient_case(group: dist.ProcessGroup) -> None:
    """Without gradients nothing is kept, and a rank that wants some of them only gets these."""
    q, k, v = (torch.randn(1, 4, 4, 8) for _ in range(3))
    with torch.no_grad():
        plain = sp.sequence_parallel_attention(q, k, v, group=group)
    found = sp.sequence_parallel_attention(q.requires_grad_(), k, v, group=group)
    assert torch.equal(plain, found)
    found.sum().backward()
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize(
    "case",
    [bits_case, strides_case, checkpoint_case, compile_case, no_gradient_case],
    ids=lambda case: case.__name__,
)
def test_on_ranks(world4: World, case: object) -> None:
    world4.run(on_ranks, case)


def errors_case(group: dist.ProcessGroup) -> None:
    t, rank = group.size(), group.rank()
    q, k = torch.ones(1, 4, 4, 8), torch.ones(1, 4, 2, 8)
    wrong: list[tuple[str, dict[str, Any]]] = [
        (f"ulysses_degree: expected a divisor of the {t} ranks", dict(ulysses_degree=5)),
        ("ulysses_degree: expected .* with engine='ulysses'", dict(engine="ulysses", ulysses_degree=1)),
        ("engine: expected one of 'auto', 'ulysses', 'ring', 'all_gather', got 'ringg'", dict(engine="ringg")),
        ("cu_seqlens: expected ascending ends of documents from 0", dict(cu_seqlens=ends(0, 3))),
        (r"attn_bias: expected what can be broadcast to \(1, 4, 4, ", dict(attn_bias=torch.ones(4, 5))),
        (r"window_size: expected \(left, right\)", dict(window_size=3)),
        (r"sinks: expected \(4,\), one for each query head", dict(sinks=torch.ones(2))),
        ("q: rank . of . holds 4 rows, but its shard of seq_len=3", dict(seq_len=3)),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            sp.sequence_parallel_attention(q, k, k, group=group, **options)
    with pytest.raises(ValueError, match="engine: expected no more ranks to share heads than there are query heads, 1"):
        sp.sequence_parallel_attention(q[:, :, :1], k[:, :, :1], k[:, :, :1], group=group, engine="ulysses")
    dist.barrier(group)
    # Documents of a rank's own would send keys that nobody expects.
    documents = ends(0, 2 + rank, 4 * t)
    with pytest.raises(RuntimeError, match="disagree"):
        sp.sequence_parallel_attention(q, k, k, group=group, cu_seqlens=documents, engine="ring")
    dist.barrier(group)
    # One rank refuses: the others hear of it before anything is sent.
    error, message = (ValueError, "k: expected") if rank == 1 else (RuntimeError, "rank 1 refused its arguments.* k: ")
    with pytest.raises(error, match=message):
        sp.sequence_parallel_attention(q, k[..., : 8 - (rank == 1)], k, group=group)
    dist.barrier(group)
    sp.sequence_parallel_attention(q, k, k, group=group)


def test_errors_on_every_rank(world4: World) -> None:
    world4.run(on_ranks, errors_case)


def accuracy_case(group: dist.ProcessGroup) -> dict[str, float]:
    """Errors against fp64 by those of PyTorch's SDPA in bf16, the worst of ring and Ulysses."""
    problem = Problem((256, 256), heads=(4, 2), dims=(32, 32), dtype=BF16, batch=1, is_causal=True, layout="zigzag")
    exact, plain = problem.plain(F64), problem.plain(BF16)
    worst: dict[str, float] = {}
    for engine in ("ring", "ulysses"):
        got = problem.sharded(group, engine=engine)
        for name in ("out", "dq", "dk", "dv"):
            true = problem.shard(exact[name], 1, group)
            mine = (got[name].double() - true).square().sum()
            theirs = (problem.shard(plain[name], 1, group).double() - true).square().sum()
            both = sp.reduce_from_tensor_parallel(torch.stack([mine, theirs]), group)
            worst[name] = max(worst.get(name, 0.0), math.sqrt(float(both[0] / both[1])))
    return worst


def test_no_less_accurate_than_sdpa(world4: World) -> None:
    for results in world4.run(on_ranks, accuracy_case):
        for worst in results.values():
            assert max(worst.values()) <= 1.0, worst


GRADCHECKED = [
    dict(is_causal=True, window_size=(2, 0)),
    dict(softcap=2.0, cu_seqlens=ends(0, 2, 5)),
    dict(dropout_p=0.3, seed=5),
]


@pytest.mark.parametrize("options", GRADCHECKED, ids=str)
def test_gradcheck_and_opcheck(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, sinks, bias = torch.randn(1, 5, 2, 3, dtype=F64), torch.randn(2, dtype=F64), torch.randn(2, 5, 5, dtype=F64)
    k, v = torch.randn(1, 5, 1, 3, dtype=F64), torch.randn(1, 5, 1, 2, dtype=F64)
    inputs = [t.requires_grad_() for t in (q, k, v, sinks, bias)]

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return sp.sequence_parallel_attention(  # type: ignore[return-value]
            *tensors[:3], group=None, sinks=tensors[3], attn_bias=tensors[4], return_lse=True, **options
        )

    assert torch.autograd.gradcheck(attend, inputs)
    scalars = Scalars(5, 5, 0.5, 0.0, None, 0, 0.0, "contiguous", "auto", None, None, None, None, True, False, "")
    args = (q, k, v, sinks, bias[None], None, options.get("cu_seqlens"), None)
    torch.library.opcheck(ops.sequence_attention.overload, (*args, *scalars))
    with torch.no_grad():
        out, lse, *_, kept = ops.sequence_attention(*args, *scalars)
        given = (torch.ones_like(out), torch.ones_like(lse), out, lse, q, k, v, kept, 1, True, True)
        detached = (*given, *(t if t is None else t.detach() for t in args[3:]), *scalars)
        detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in detached)
    torch.library.opcheck(torch.ops.seqpar.sequence_attention_backward.default, detached)


def test_every_number_is_written(poison: None) -> None:  # noqa: F811
    for name in ("zigzag, causal", "few rows, zigzag", "documents, sinks", "bias of one head"):
        CASES[name]().check(None, with_lse=True)


def test_autocast() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 8, requires_grad=True).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = sp.sequence_parallel_attention(q, k, v, group=None, is_causal=True)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
