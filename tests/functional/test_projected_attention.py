"""sequence_parallel_self_attention on 1 to 4 ranks: the unsharded fp64 run, bits, groups, what is saved, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqpar_kernels as sp
from seqpar_kernels import ops
from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.kernels import attention_native
from seqpar_kernels.ops.projected_attention import ProjectedScalars
from seqpar_kernels.ops.sequence_attention import Scalars
from seqpar_kernels.overlap.attention_choice import Problem, choose
from seqpar_kernels.overlap.head_groups import HeadGroups, head_groups

from ..oracle import assert_within_budget
from ..world import World
from .attention_cases import ends
from .groups import on_ranks

if attention_native.unavailable(torch.device("cpu")) is not None:
    pytest.skip(str(attention_native.unavailable(torch.device("cpu"))), allow_module_level=True)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
WEIGHTS = ("q_weight", "k_weight", "v_weight", "out_weight")
BIASES = ("q_bias", "k_bias", "v_bias", "out_bias")


class Projected:
    """Whole tensors, alike on all ranks, and options of the call."""

    def __init__(
        self,
        rows: int = 29,
        heads: tuple[int, int] = (8, 8),
        dims: tuple[int, int] = (16, 64),
        dtype: torch.dtype = F32,
        *,
        bias: bool = False,
        rotary: int = 0,
        sinks: bool = False,
        mask: Tensor | None = None,
        **options: Any,
    ):
        g = torch.Generator().manual_seed(rows)
        features, (head_dim, value_dim) = 24, dims
        self.heads, self.dtype, self.mask, self.options = heads, dtype, mask, options

        def made(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g, dtype=F64) * scale).to(dtype)

        wide = [heads[0] * head_dim, heads[1] * head_dim, heads[1] * value_dim]
        self.inputs = {"x": made(2, rows, features)}
        self.inputs |= {n: made(w, features, scale=features**-0.5) for n, w in zip(WEIGHTS, wide)}
        inner = heads[0] * value_dim
        self.inputs["out_weight"] = made(features, inner, scale=inner**-0.5)
        if bias:
            self.inputs |= {n: made(w) for n, w in zip(BIASES, [*wide, features])}
        if sinks:
            self.inputs["sinks"] = made(heads[0])
        self.dy = made(2, rows, features)
        self.tables = None
        if rotary:
            angles = torch.arange(rows)[:, None] * 100.0 ** -(torch.arange(0, rotary, 2) / rotary)
            self.tables = angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin()

    @property
    def layout(self) -> str:
        return str(self.options.get("layout", "contiguous"))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The whole sequence in plain torch, operation by operation."""
        t = {name: value.detach().to(dtype).requires_grad_() for name, value in self.inputs.items()}
        (hq, hkv), rows = self.heads, t["x"].shape[1]

        def projected(name: str, heads: int) -> Tensor:
            y = F.linear(t["x"], t[f"{name}_weight"], t.get(f"{name}_bias"))
            return y.unflatten(-1, (heads, -1)).transpose(1, 2)

        def turned(x: Tensor) -> Tensor:
            if self.tables is None:
                return x
            cos, sin = (table.to(dtype) for table in self.tables)
            size = cos.shape[-1]
            a, b = x[..., :size].chunk(2, -1)
            rotated = x[..., :size] * cos + torch.cat([-b, a], -1) * sin
            return torch.cat([rotated, x[..., size:]], -1)

        q, k, v = turned(projected("q", hq)), turned(projected("k", hkv)), projected("v", hkv)
        k, v = (x.repeat_interleave(hq // hkv, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        cap = self.options.get("softcap", 0.0)
        scores = torch.tanh(scores / cap) * cap if cap else scores
        at = torch.arange(rows)
        see = torch.ones(rows, rows, dtype=torch.bool) if self.mask is None else self.mask.expand(2, 1, rows, rows)
        if self.options.get("is_causal"):
            see = see & (at <= at[:, None])
        left = self.options.get("window_size", (-1, -1))[0]
        see = see & (at >= at[:, None] - left) if left >= 0 else see
        if "cu_seqlens" in self.options:
            documents = torch.searchsorted(self.options["cu_seqlens"][1:], at, right=True)
            see = see & (documents[:, None] == documents)
        scores = scores.masked_fill(~see, -math.inf)
        if "sinks" in t:
            scores = torch.cat([scores, t["sinks"][:, None, None].expand(2, hq, rows, 1)], -1)
        out = torch.softmax(scores, -1)[..., :rows] @ v
        y = F.linear(out.transpose(1, 2).flatten(2), t["out_weight"], t.get("out_bias"))
        grads = torch.autograd.grad(y, list(t.values()), self.dy.to(dtype))
        return {"y": y.detach(), **dict(zip(t, grads))}

    def sharded(self, group: dist.ProcessGroup | None, **asked: Any) -> dict[str, Tensor]:
        """This rank's rows of y and dx; sums over ranks of the gradients of weights, biases and sinks."""
        t = {name: value.detach().clone() for name, value in self.inputs.items()}
        t["x"] = self.shard(t["x"], group).clone()
        for value in t.values():
            value.requires_grad_()
        tables = None
        if self.tables is not None:
            tables = tuple(self.shard(table[None], group) for table in self.tables)
        mask = {} if self.mask is None else {"attn_bias": self.mask}
        y = sp.sequence_parallel_self_attention(
            **t, group=group, num_heads=self.heads[0], num_kv_heads=self.heads[1], rotary=tables,
            seq_len=self.dy.shape[1], **self.options, **asked, **mask,
        )  # fmt: skip
        grads = dict(zip(t, torch.autograd.grad(y, list(t.values()), self.shard(self.dy, group))))
        for name in grads:
            if name != "x" and group is not None:
                total = sp.reduce_from_tensor_parallel(grads[name].double(), group)
                grads[name] = total.to(grads[name].dtype)
        return {"y": y.detach(), **grads}

    def shard(self, t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return sp.shard_sequence(t, group, 1, layout=self.layout)

    def check(self, group: dist.ProcessGroup | None, **asked: Any) -> None:
        """Errors against fp64 are at most twice those of plain PyTorch in the same dtype."""
        got, exact, plain = self.sharded(group, **asked), self.plain(F64), self.plain(self.dtype)
        for name, mine in got.items():
            true, theirs = exact[name], plain[name]
            if name in ("y", "x"):
                true, theirs = self.shard(true, group), self.shard(theirs, group)
            if true.numel():
                what = f"{name} of {self.heads} {self.options} {asked}, {self.dtype}"
                # What cancels: numbers of the attention's scale, in gradients of parameters summed over 58 rows.
                magnitude = 4.0 if name in ("y", "x") else 16.0
                assert_within_budget(mine, theirs, true, what, magnitude * (4 if self.dtype == F64 else 1))


CASES: dict[str, Callable[[], Projected]] = {
    "causal, biases": lambda: Projected(is_causal=True, bias=True),
    "rotary, zigzag": lambda: Projected(is_causal=True, layout="zigzag", rotary=16, bias=True),
    "part of a head rotated": lambda: Projected(heads=(16, 8), rotary=6, is_causal=True, window_size=(7, 0)),
    "documents, sinks": lambda: Projected(cu_seqlens=ends(0, 9, 9, 29), is_causal=True, sinks=True, layout="zigzag"),
    "uneven heads": lambda: Projected(heads=(13, 13), is_causal=True, softcap=2.0),
    "fewer key heads than ranks": lambda: Projected(heads=(6, 2), is_causal=True, sinks=True),
    "one key head": lambda: Projected(heads=(4, 1), is_causal=True, rotary=16),
    "few rows": lambda: Projected(3, is_causal=True),
    "bf16": lambda: Projected(dtype=BF16, is_causal=True, bias=True, rotary=16),
    "fp64": lambda: Projected(dtype=F64, dims=(16, 16), is_causal=True),
    "padding": lambda: Projected(mask=(torch.arange(29) > 3).view(1, 1, 1, 29), layout="zigzag"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str) -> None:
    CASES[name]().check(None)


def numbers_case(group: dist.ProcessGroup, names: list[str]) -> None:
    for name in names:
        problem = CASES[name]()
        engines = (
            ("ulysses", "ring", "auto") if name in ("rotary, zigzag", "fewer key heads than ranks") else ("ulysses",)
        )
        for engine in engines:
            problem.check(group, engine=engine)


@pytest.mark.parametrize("first", range(0, len(CASES), 4))
def test_on_ranks(world4: World, first: int) -> None:
    world4.run(on_ranks, numbers_case, list(CASES)[first : first + 4])


def counts(heads: int, ranks: int) -> list[int]:
    """Numbers of groups that there can be, of heads with values of 64 features."""
    found = groups_of(heads, ranks, value_dim=64, dtype_bytes=4)
    return list(range(1, len(found) + 1))


def groups_of(heads: int, ranks: int, asked: int | None = None, value_dim: int = 128, dtype_bytes: int = 2) -> Any:
    problem = Problem(4096, 4096, 1, heads, heads, value_dim, value_dim, dtype_bytes, "contiguous", ranks, None, 0)
    return head_groups(choose(problem, "ulysses"), problem, asked, "cpu", None).groups


def bits_case(group: dist.ProcessGroup) -> None:
    """With projections that copy numbers, y and dx are the out, dq, dk and dv of sequence_parallel_attention."""
    hq = hkv = 12
    sizes = [hq * 16, hkv * 16, hkv * 64]
    weights = [w.contiguous() for w in torch.eye(sum(sizes)).split(sizes)] + [torch.eye(hq * 64)]
    g = torch.Generator().manual_seed(2)
    whole, dwhole = torch.randn(2, 31, sum(sizes), generator=g), torch.randn(2, 31, hq * 64, generator=g)
    for dtype, options in (
        (F32, dict(is_causal=True, layout="zigzag", dropout_p=0.2, seed=11, sinks=torch.randn(hq, generator=g))),
        (BF16, dict(window_size=(9, 0), is_causal=True)),
        (F32, dict(cu_seqlens=ends(0, 13, 31), softcap=3.0)),
    ):
        layout = str(options.get("layout", "contiguous"))
        given = [w.to(dtype) for w in weights]
        sinks = {"sinks": options.pop("sinks").to(dtype)} if "sinks" in options else {}

        def run(
            pg: dist.ProcessGroup | None,
            groups: int | None,
            given: list[Tensor] = given,
            layout: str = layout,
            options: dict[str, Any] = {**options, **sinks},  # noqa: B006
        ) -> list[Tensor]:
            x, dy = (sp.shard_sequence(t.to(given[0].dtype), pg, 1, layout=layout) for t in (whole, dwhole))
            x = x.clone().requires_grad_()
            common: dict[str, Any] = dict(options, group=pg, seq_len=31)
            if groups == 0:  # the plain call
                q, k, v = (t.view(*t.shape[:2], 12, -1) for t in x.split(sizes, -1))
                y = sp.sequence_parallel_attention(q, k, v, engine="ulysses" if pg else "auto", **common)
                y = y.flatten(2)  # type: ignore[union-attr]
            else:
                y = sp.sequence_parallel_self_attention(
                    x,
                    *given,
                    num_heads=hq,
                    num_kv_heads=hkv,
                    head_groups=groups,
                    engine="ulysses",
                    **common,
                )
            return [y.detach(), *torch.autograd.grad(y, [x], dy)]

        plain = run(group, 0)
        one = [sp.shard_sequence(t, group, 1, layout=layout) for t in run(None, 0)]
        assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))
        most = counts(12, group.size())
        assert len(most) > 1
        for groups in (None, *most):
            for bound in (None, 1 << 30):  # a bound that allows everything changes the schedule alone
                sp.set_max_workspace_bytes(bound)
                try:
                    found = run(group, groups)
                finally:
                    sp.set_max_workspace_bytes(None)
                assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), (groups, dtype)


def saved_case(group: dist.ProcessGroup) -> None:
    """No more is kept for the backward than of the projections and the attention one after the other."""
    problem = Projected(32, heads=(12, 12), is_causal=True)
    t = {n: v.detach().clone().requires_grad_() for n, v in problem.inputs.items()}
    x = problem.shard(problem.inputs["x"], group).clone().requires_grad_()
    w = [t[n] for n in WEIGHTS]

    def kept(fn: Callable[[], Any]) -> int:
        storages: dict[int, int] = {}

        def pack(s: Tensor) -> Tensor:
            storages[s.untyped_storage().data_ptr()] = s.untyped_storage().nbytes()
            return s

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda s: s):
            alive = fn()
        total = sum(storages.values())
        del alive
        return total

    options: dict[str, Any] = dict(group=group, is_causal=True, engine="ulysses", seq_len=32)

    def apart() -> Tensor:
        q, k, v = (F.linear(x, weight).view(*x.shape[:2], 12, -1) for weight in w[:3])
        out = sp.sequence_parallel_attention(q, k, v, **options)
        return F.linear(out.flatten(2), w[3])  # type: ignore[union-attr]

    grouped = kept(lambda: sp.sequence_parallel_self_attention(x, *w, num_heads=12, head_groups=2, **options))
    assert 0 < grouped <= kept(apart)


def checkpoint_case(group: dist.ProcessGroup) -> None:
    problem = Projected(heads=(12, 12), is_causal=True, layout="zigzag")
    found = []
    for again in (False, True):
        t = {n: v.detach().clone().requires_grad_() for n, v in problem.inputs.items()}
        x = problem.shard(t.pop("x").detach(), group).clone().requires_grad_()

        def attend(x: Tensor, t: dict[str, Tensor] = t) -> Tensor:
            return sp.sequence_parallel_self_attention(
                x * 1.5, **t, group=group, num_heads=12, is_causal=True, layout="zigzag", dropout_p=0.1, seq_len=29,
                engine="ulysses", head_groups=2,
            )  # fmt: skip

        torch.manual_seed(3)
        y = checkpoint(attend, x, use_reentrant=False) if again else attend(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, *t.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def compile_case(group: dist.ProcessGroup) -> None:
    """One op forward, one backward; a ring between plain projections."""
    from torch._dynamo.backends.common import aot_autograd

    problem = Projected(16, heads=(12, 12), is_causal=True, bias=True)
    for engine, op in (("ulysses", "seqpar.projected_attention"), ("ring", "seqpar.sequence_attention")):
        t = {n: v.detach().clone().requires_grad_() for n, v in problem.inputs.items()}
        graphs: list[str] = []
        torch._dynamo.reset()

        def attend(t: dict[str, Tensor], engine: str = engine) -> Tensor:
            return sp.sequence_parallel_self_attention(**t, group=group, num_heads=12, is_causal=True, engine=engine)

        def seen(graph: torch.fx.GraphModule, _: object, graphs: list[str] = graphs) -> Any:
            graphs += [str(n.target) for n in graph.graph.nodes if "seqpar" in str(n.target)]
            return graph

        run = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen))
        results = [[y, *torch.autograd.grad(y.sum(), list(t.values()))] for y in (attend(t), run(t))]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert graphs == [f"{op}.default", f"{op}_backward.default"]


def frozen_case(group: dist.ProcessGroup) -> None:
    """Weights without gradients get none; without gradients nothing is kept and y is the same."""
    problem = Projected(16, heads=(12, 12), is_causal=True, bias=True, sinks=True)
    t = {n: v.detach().clone() for n, v in problem.inputs.items()}
    options: dict[str, Any] = dict(group=group, num_heads=12, is_causal=True, engine="ulysses")
    with torch.no_grad():
        plain = sp.sequence_parallel_self_attention(**t, **options)
    t["x"].requires_grad_()
    t["v_weight"].requires_grad_()
    y = sp.sequence_parallel_self_attention(**t, **options)
    y.sum().backward()
    assert torch.equal(plain, y)
    assert [n for n, v in t.items() if v.grad is not None] == ["x", "v_weight"]


@pytest.mark.parametrize(
    "case", [bits_case, saved_case, checkpoint_case, compile_case, frozen_case], ids=lambda case: case.__name__
)
def test_groups_on_ranks(world4: World, case: object) -> None:
    world4.run(on_ranks, case)


def errors_case(group: dist.ProcessGroup) -> None:
    problem = Projected(4 * group.size(), heads=(8, 8))
    good: dict[str, Any] = dict(problem.inputs, group=group, num_heads=8)
    good["x"] = good["x"][:, :4]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("num_heads: expected a positive int", dict(num_heads=0)),
        ("num_kv_heads: expected a positive int that divides num_heads=8, got 3", dict(num_kv_heads=3)),
        ("k_weight: expected 8 heads of 16 features like q", dict(k_weight=torch.ones(8, 24))),
        ("out_weight: expected ", dict(out_weight=torch.ones(24, 8))),
        ("head_groups: expected at most", dict(head_groups=9, engine="ulysses")),
        ("head_groups: expected None where the ranks do not all", dict(head_groups=2, engine="ring")),
        (r"rotary cos: expected rows for \(2, 4\)", dict(rotary=(torch.ones(3, 8), torch.ones(3, 8)))),
        ("rotary cos: expected an even number of up to 16", dict(rotary=(torch.ones(4, 18), torch.ones(4, 18)))),
        (r"sinks: expected \(8,\)", dict(sinks=torch.ones(2))),
        (r"x: expected \[B, S/t, E\]", dict(x=torch.ones(4, 24))),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            sp.sequence_parallel_self_attention(**{**good, **options})
    sp.set_max_workspace_bytes(64)
    try:
        with pytest.raises(
            ValueError, match=r"max_workspace_bytes: expected at least .* smallest group of heads, got 64"
        ):
            sp.sequence_parallel_self_attention(**good, engine="ulysses")
    finally:
        sp.set_max_workspace_bytes(None)
    dist.barrier(group)
    sp.sequence_parallel_self_attention(**good)


def test_errors_on_every_rank(world4: World) -> None:
    world4.run(on_ranks, errors_case)


def test_gradcheck_and_opcheck() -> None:
    problem = Projected(4, heads=(2, 1), dims=(4, 3), dtype=F64, bias=True, sinks=True, rotary=4)
    t = {n: v.requires_grad_() for n, v in problem.inputs.items()}
    assert problem.tables is not None
    tables = tuple(table.double() for table in problem.tables)

    def attend(*tensors: Tensor) -> Tensor:
        return sp.sequence_parallel_self_attention(
            **dict(zip(t, tensors, strict=True)), group=None, num_heads=2, num_kv_heads=1, rotary=tables,
            is_causal=True, dropout_p=0.2, seed=3,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, tuple(t.values()))
    scalars = (*ProjectedScalars(2, 1, 4, 3, None),)
    asked = Scalars(4, 4, 0.5, 0.0, None, 0, 0.0, "contiguous", "auto", None, None, None, None, False, False, "")
    args = [*(t[n] for n in ("x", *WEIGHTS, *BIASES)), *(table[None] for table in tables), t["sinks"], None, None]
    torch.library.opcheck(ops.projected_attention.overload, (*args, *scalars, *asked))
    args = [a if a is None else a.detach() for a in args]
    saving = asked._replace(save=True)
    y, *kept = ops.projected_attention(*args, *scalars, *saving)
    given = (torch.ones_like(y), *kept, [True] * 9, *args, *scalars, *saving)
    torch.library.opcheck(torch.ops.seqpar.projected_attention_backward.default, given)


def test_groups_hold_whole_blocks_for_all_ranks() -> None:
    for heads in (1, 3, 4, 7, 8, 13, 16, 32, 40):
        for ranks in (2, 3, 4, 8):
            if heads < ranks:
                continue
            for asked in counts(heads, ranks):
                found = groups_of(heads, ranks, asked, value_dim=64, dtype_bytes=4)
                assert [h for g in found for h in g] == list(range(heads)) and len(found) == asked
                held = [sum(len(range(len(g))[r::ranks]) for g in found) for r in range(ranks)]
                assert max(held) <= -(-heads // ranks) + (1 if heads % ranks else 0)
                assert all(g.start % 2 == 0 for g in found)  # two heads of 64 are a block


def test_groups_by_size_and_by_bound() -> None:
    assert len(groups_of(32, 4)) == 4
    assert len(groups_of(5, 4)) == len(groups_of(32, 1)) == 1
    small = Problem(64, 64, 1, 32, 32, 128, 128, 2, "contiguous", 4, None, 0)
    choice = choose(small, "ulysses")

    def grouped(bound: int | None) -> HeadGroups:
        return head_groups(choice, small, None, "cpu", bound)

    assert len(grouped(None).groups) == 1
    tight = grouped(choice.wire.forward)
    assert len(tight.groups) > 3 and tight.reason == "within max_workspace_bytes"
    with pytest.raises(ValueError, match="max_workspace_bytes: expected at least"):
        grouped(1000)
    assert head_groups(choice, small, 2, "cuda", None).block == 8  # 1024 features


def test_autocast() -> None:
    problem = Projected()
    t = {n: v.requires_grad_() for n, v in problem.inputs.items()}
    with torch.autocast("cpu", BF16):
        y = sp.sequence_parallel_self_attention(**t, group=None, num_heads=8)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert t["x"].grad is not None and t["x"].grad.dtype == F32


def test_groups_travel_while_others_are_computed_with() -> None:
    """The order of events, not time: a group is posted before the one before it is waited for."""
    from seqpar_kernels.overlap.messages import Messages

    events: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    post, wait = Messages.post, Messages.wait

    def posted(self: Messages, sends: Any, receives: Any) -> None:
        events[self._rank] += [("post", index) for _, index, _ in sends]
        post(self, sends, receives)

    def waited(self: Messages, peer: int, index: int, buffer: Tensor) -> None:
        events[self._rank].append(("wait", index))
        wait(self, peer, index, buffer)

    problem = Projected(32, heads=(12, 12), is_causal=True)

    def on_rank(group: dist.ProcessGroup) -> None:
        t = dict(problem.inputs)
        t["x"] = problem.shard(t["x"], group)
        sp.sequence_parallel_self_attention(**t, group=group, num_heads=12, engine="ulysses", head_groups=3)

    with pytest.MonkeyPatch.context() as patch, Loopback(2) as world:
        patch.setattr(Messages, "post", posted)
        patch.setattr(Messages, "wait", waited)
        world.run(on_rank)
    expected = [
        ("post", 0), ("post", 2), ("wait", 0), ("post", 1), ("post", 4), ("wait", 2), ("post", 3), ("wait", 1),
        ("wait", 4), ("post", 5), ("wait", 3), ("wait", 5),
    ]  # fmt: skip
    assert events[0] == events[1] == expected
