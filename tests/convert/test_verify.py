"""verify: right models pass, models broken on one rank do not, and nothing is left behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, VOCAB, gpt2, group, llama
from .test_parallelize import PLAN, Own


@pytest.fixture(scope="module")
def world3() -> Iterator[World]:
    world = World(3)
    yield world
    world.close()


def ids_of(length: int = 13, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (2, length))


def squares(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


def rows_of(found: sp.Verification) -> dict[tuple[str, str], Any]:
    return {(row.what, row.name): row for row in found.rows}


def right_case(kind: str, options: dict[str, Any], loss_parallel: bool, dtype: torch.dtype) -> str:
    plain = MODELS[kind](**options).to(dtype).train()
    cut = sp.parallelize(copy.deepcopy(plain), group(), loss_parallel=loss_parallel)
    ids = ids_of()
    found = sp.verify(cut, plain, {"input_ids": ids, "labels": ids}, verbose=False)
    assert found.ok, str(found)
    found.raise_if_wrong()
    rows = rows_of(found)
    assert {name for what, name in rows if what == "gradient"} == {name for name, _ in plain.named_parameters()}
    assert ("loss", "loss") in rows and ("output", "logits") in rows
    assert ("does not exist" in rows["output", "logits"].note) == loss_parallel
    assert all(0 < row.tolerance < (1e-5 if dtype == torch.float32 else 0.2) for row in found.rows)
    return str(found)


SIX_HEADS = {
    "gpt2": {"n_embd": 48, "n_head": 6},
    "llama": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
}


@pytest.mark.parametrize("loss_parallel", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_right_models_pass(world2: World, kind: str, loss_parallel: bool) -> None:
    first, second = world2.run(right_case, kind, {}, loss_parallel, torch.float32)
    assert first == second, "the ranks tell different stories"
    assert "2 ranks, float32, training mode, dropout at 0" in first
    assert max(map(len, first.splitlines())) <= 120


@pytest.mark.parametrize("kind", MODELS)
def test_right_models_pass_in_bf16(world2: World, kind: str) -> None:
    world2.run(right_case, kind, {}, False, torch.bfloat16)


@pytest.mark.parametrize("kind", MODELS)
def test_right_models_pass_on_three_ranks(world3: World, kind: str) -> None:
    assert "3 ranks" in world3.run(right_case, kind, SIX_HEADS[kind], False, torch.float32)[2]


def own_case() -> str:
    """A plan of the user's; the reference made by a callable, into which the trained weights go."""
    model = sp.parallelize(Own(), group(), PLAN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = ids_of(9, 11)
    squares(model(ids), ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    made = []

    def make() -> nn.Module:
        made.append(Own())
        return made[-1]

    found = sp.verify(model, make, (ids,), loss_fn=squares, verbose=False, raise_on_mismatch=True)
    assert len(made) == (group().rank() == 0), "the reference is the first rank's alone"
    # Making it draws weights: were the generator not put back, the ranks would draw apart from here on.
    parts = [ids_of(9, 11), ids_of(8, 11)]
    several = rows_of(sp.verify(model, make, parts, loss_fn=squares, verbose=False, raise_on_mismatch=True))
    assert ("loss", "batch 0: loss") in several and ("output", "batch 1: output") in several
    # Against the reference itself, not in fp64.
    flat = sp.verify(model, make, ids, loss_fn=squares, verbose=False, fp64=False, raise_on_mismatch=True)
    assert {row.tolerance for row in flat.rows} == {1e-4} and "the default for float32" in str(flat)
    given = sp.verify(model, make, ids, loss_fn=squares, verbose=False, tolerance=1e-9)
    assert not given.ok and {row.tolerance for row in given.rows} == {1e-9}
    return str(found)


def cancelling_case() -> tuple[str, float]:
    """A loss that is what rounding leaves of numbers that cancel; then the same, to which the converted model adds."""
    plain, running = Own(), [""]
    cut = sp.parallelize(copy.deepcopy(plain), group(), PLAN)
    ids = ids_of(9, 11)
    with torch.no_grad():
        sum_of_all = plain(ids).double().sum().item()
    for name, model in (("plain", plain), ("cut", cut)):
        model.register_forward_pre_hook(lambda *_, name=name: running.append(name))

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.sum() - sum_of_all

    def shifted(output: Tensor, batch: Any) -> Tensor:
        return loss(output, batch) + (1e-3 if running[-1] == "cut" else 0.0)

    right = sp.verify(cut, plain, ids, loss_fn=loss, verbose=False, raise_on_mismatch=True)
    wrong = sp.verify(cut, plain, ids, loss_fn=shifted, verbose=False)
    return rows_of(wrong)["loss", "loss"].verdict, rows_of(right)["loss", "loss"].error


def test_a_loss_that_cancels(world2: World) -> None:
    for verdict, error in world2.run(cancelling_case):
        assert verdict == "wrong" and error < 1e-6


def test_own_module_with_a_loss_function(world2: World) -> None:
    assert "verify Own: 2 ranks" in world2.run(own_case)[0]


def test_one_rank_and_a_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    plain = gpt2()
    ids = ids_of()
    found = sp.verify(sp.parallelize(copy.deepcopy(plain), None), plain, {"input_ids": ids, "labels": ids}, rows=3)
    printed = capsys.readouterr().out
    assert found.ok and printed.strip() == str(found) and "1 rank," in printed and "27 more" in printed


def broken_case(how: str) -> tuple[list[tuple[str, str, str, int]], str]:
    plain = llama()
    cut = sp.parallelize(copy.deepcopy(plain), group())
    second, params = group().rank() == 1, dict(cut.named_parameters())
    if how == "scaled":
        params["model.layers.0.mlp.up_proj.weight"].register_hook(lambda g: g * 1.01 if second else None)
    elif how == "bits":
        params["model.norm.weight"].register_hook(lambda g: g * (1 + 2**-23) if second else None)
    elif how == "frozen":
        cut.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    elif how == "logits":
        cut.lm_head.register_forward_hook(lambda module, args, out: out + 1e-3 if second else None)
    elif how == "trained":
        plain.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    ids = ids_of()
    found = sp.verify(cut, plain, {"input_ids": ids, "labels": ids}, verbose=False)
    assert not found.ok
    with pytest.raises(RuntimeError, match="NOT THE SAME"):
        found.raise_if_wrong()
    with pytest.raises(RuntimeError, match="NOT THE SAME"):
        sp.verify(cut, plain, {"input_ids": ids, "labels": ids}, verbose=False, raise_on_mismatch=True)
    assert found.worst.verdict != "ok"
    return [(r.what, r.name, r.verdict, r.rank) for r in found.rows if r.verdict != "ok"], str(found)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("scaled", [("gradient", "model.layers.0.mlp.up_proj.weight", "wrong", 1)]),
        ("bits", [("gradient", "model.norm.weight", "ranks differ", -1)]),
        ("frozen", [("gradient", "model.layers.1.self_attn.q_proj.weight", "missing", 0)]),
        ("trained", [("gradient", "model.layers.1.mlp.down_proj.weight", "extra", 0)]),
        ("logits", [("output", "logits", "wrong", 1)]),
    ],
)
def test_what_is_broken_on_one_rank_is_named(world2: World, how: str, expected: list[Any]) -> None:
    (rows, text), (others, other_text) = world2.run(broken_case, how)
    assert rows == others and text == other_text
    named = [(what, name, verdict, -1 if expected[0][3] < 0 else rank) for what, name, verdict, rank in rows]
    assert expected[0] in named
    if how != "logits":  # there the rounding of all that follows is another on that rank, too
        assert named == expected and "1 of 23 rows differ" in text and expected[0][2].upper() in text.splitlines()[3]


class Conditional(nn.Module):
    """Attention whose head count the plan leaves undivided: each rank mixes other heads than the model has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.norm_f = nn.LayerNorm(16)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.norm_f(x + self.proj(mixed.transpose(1, 2).flatten(2)))


def undivided_case() -> tuple[bool, str]:
    """4 heads of 4 on every rank: the 8 features of a rank make 4 heads of 2."""
    plan = {"norm": "scatter_input+norm", "qkv": "colwise:3", "proj": "rowwise", "norm_f": "norm+gather_output"}
    plain, cut = Conditional(), sp.parallelize(Conditional(), group(), plan)
    x = torch.randn(2, 8, 16)
    try:
        found = sp.verify(cut, plain, x, loss_fn=squares, verbose=False)
    except RuntimeError as error:  # refused at the first forward: as good
        return False, str(error)
    return found.ok, str(found)


def test_undivided_heads_are_found(world2: World) -> None:
    (ok, text), (other, _) = world2.run(undivided_case)
    assert not ok and not other
    assert "NOT THE SAME" in text or "verify: the converted model raised" in text


class Stateful(Own):
    """Whatever a forward may leave behind: statistics, counters, random numbers, functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = 0.3
        self.batch_norm = nn.BatchNorm1d(16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.idle = nn.Linear(2, 2)
        self.head.bias.requires_grad_(False)
        self.random = False

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.batch_norm(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = nn.functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x))
        if self.random and self.training:
            x = x * torch.rand(()) + random.random()
        return x


def traces_case() -> list[str]:
    plain = Stateful().train()
    plain.blocks[1].eval()
    cut = sp.parallelize(copy.deepcopy(plain), group(), PLAN)
    ids = ids_of(9, 11)
    for model in (plain, cut):  # gradients of the user's own, from a run with dropout
        torch.manual_seed(1)
        squares(model(ids), ids).backward()
    steps: list[int] = []
    cut.head.weight.register_post_accumulate_grad_hook(lambda param: steps.append(1))

    def plain_parameters(model: nn.Module) -> list[Any]:
        return [(name, getattr(param, "part", param)) for name, param in model.named_parameters()]

    def state_of(model: nn.Module) -> Any:
        return (
            [(n, id(p.grad), p.grad is None or p.grad._version) for n, p in plain_parameters(model)],
            [(n, id(b), b.tolist()) for n, b in model.named_buffers()],
            [(n, m.training, getattr(m, "p", 0), getattr(m, "dropout", 0)) for n, m in model.named_modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        )

    gradients = sp.gather_full_gradients(cut)
    torch.manual_seed(7)
    random.seed(7)
    before = [state_of(plain), state_of(cut)]
    found = [sp.verify(cut, plain, ids, loss_fn=squares, verbose=False, raise_on_mismatch=True)]
    assert [state_of(plain), state_of(cut)] == before
    drawn = (torch.rand(3).tolist(), random.random())
    torch.manual_seed(7)
    random.seed(7)
    assert drawn == (torch.rand(3).tolist(), random.random())
    for name, gradient in sp.gather_full_gradients(cut).items():
        assert torch.equal(gradient, gradients[name])
    assert not steps, "a hook behind a gradient has run"
    with torch.no_grad():
        squares_before = cut(ids)
    assert squares_before.requires_grad is False
    squares(cut(ids), ids).backward()
    assert steps == [1]
    for model in (plain, cut):
        model.random = True
        model.calls.zero_()
        model.batch_norm.reset_running_stats()
    found.append(sp.verify(cut, plain, ids, loss_fn=squares, verbose=False, raise_on_mismatch=True))
    assert cut.training and not cut.blocks[1].training and cut.dropout == 0.3
    return [str(one) for one in found]


def test_nothing_is_left_behind(world2: World) -> None:
    first, second = world2.run(traces_case)[0]
    assert "training mode, dropout at 0" in first and "no gradient on either side: head.bias, idle.weight" in first
    assert "evaluation mode" in second and "the reference draws random numbers" in second


def embeds_case() -> None:
    """Inputs that want a gradient."""
    plain = llama()
    cut = sp.parallelize(copy.deepcopy(plain), group())
    ids = ids_of(8)
    embeds = plain.get_input_embeddings()(ids).detach().requires_grad_()
    found = sp.verify(cut, plain, {"inputs_embeds": embeds, "labels": ids}, verbose=False, raise_on_mismatch=True)
    assert ("input gradient", "inputs_embeds") in rows_of(found) and embeds.grad is None


def test_input_gradients(world2: World) -> None:
    world2.run(embeds_case)


def compiled_case() -> None:
    own = sp.parallelize(Own(), group(), PLAN)
    ids = ids_of(8, 11)
    with pytest.raises(RuntimeError, match="the converted model raised: a plan is checked by the first forward"):
        sp.verify(torch.compile(own, backend="eager"), Own, ids, loss_fn=squares, verbose=False)
    sp.verify(own, Own, ids, loss_fn=squares, verbose=False, raise_on_mismatch=True)
    compiled = torch.compile(own, backend="aot_eager")
    found = sp.verify(compiled, Own, ids, loss_fn=squares, verbose=False, raise_on_mismatch=True)
    assert len([row for row in found.rows if row.what == "gradient"]) == len(list(own.parameters()))


def test_torch_compile(world2: World) -> None:
    world2.run(compiled_case)


def fsdp_case() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plain = Own()
    cut = sp.parallelize(copy.deepcopy(plain), mesh["tp"], PLAN)
    for block in cut.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(cut, mesh=mesh["dp"])
    ids = ids_of(9, 11)
    sp.verify(cut, plain, ids, loss_fn=squares, verbose=False, raise_on_mismatch=True)
    assert all(param.grad is None for param in cut.parameters())
    with pytest.raises(ValueError, match="batch: expected the same on every rank, but rank 2 has another than rank 0"):
        sp.verify(cut, plain, ids + mesh["dp"].get_local_rank(), loss_fn=squares, verbose=False)
    if torch.distributed.get_rank() == 3:
        dict(cut.named_parameters())["head.weight"].register_hook(lambda g: g)  # one that changes nothing
    found = sp.verify(cut, Own, ids, loss_fn=squares, verbose=False, raise_on_mismatch=True)
    with torch.no_grad():
        for name, param in cut.named_parameters():
            if name == "blocks.1.down.weight" and torch.distributed.get_rank() == 3:
                param._local_tensor.add_(1e-3)
    with pytest.raises(ValueError, match=r"1 differ: blocks\.1\.down\.weight"):
        sp.verify(cut, plain, ids, loss_fn=squares, verbose=False)
    return str(found)


def test_fully_shard_on_two_by_two_ranks(world4: World) -> None:
    assert "2 ranks x 2 data-parallel" in world4.run(fsdp_case)[3]


def refusals_case() -> list[str]:
    second, ids = group().rank() == 1, ids_of()
    plain, batch = llama(), {"input_ids": ids, "labels": ids}
    cut = sp.parallelize(copy.deepcopy(plain), group())
    said: list[str] = []

    def refused(kind: type[Exception], *args: Any, **options: Any) -> None:
        with pytest.raises(kind) as caught:
            sp.verify(*args, verbose=False, **options)
        said.append(str(caught.value))

    refused(ValueError, plain, plain, batch)
    refused(ValueError, cut, None, batch)
    refused(ValueError, cut, "llama", batch)
    refused(ValueError, cut, cut, batch)
    refused(ValueError, cut, lambda: 3, batch)
    refused(ValueError, cut, plain, 3 if second else batch)
    refused(ValueError, cut, plain, [])
    refused(ValueError, cut, plain, batch, tolerance=True)
    refused(ValueError, cut, plain, batch, fp64="yes")
    refused(ValueError, cut, plain, batch, rows=0)
    refused(ValueError, cut, plain, batch, loss_fn=3)
    refused(ValueError, cut, plain, {**batch, "labels": ids + second})
    refused(ValueError, cut, plain, {"input_ids": ids})
    refused(ValueError, cut, llama(tie_word_embeddings=True), batch)
    refused(ValueError, cut, plain, {"attention_mask": ids})

    def fails() -> nn.Module:
        raise KeyError("no such checkpoint")

    refused(RuntimeError, cut, fails, batch)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-3
    refused(ValueError, cut, other, batch)
    handle = cut.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0 if second else None)  # on one rank
    refused(RuntimeError, cut, plain, batch)
    handle.remove()
    sp.verify(cut, plain, batch, verbose=False, raise_on_mismatch=True)  # all of it left the group usable
    with torch.no_grad():
        cut.model.norm.weight[3] += 1e-3 * second
    refused(ValueError, cut, plain, batch)
    plan = {pattern: style for pattern, style in PLAN.items() if pattern != "blocks.*.scale"}
    missed = sp.parallelize(Own(), group(), plan)
    refused(RuntimeError, missed, Own, ids_of(8, 11), loss_fn=squares)
    return said


EXPECTED = [
    "has not been parallelized",
    "reference: expected a module, or a callable that makes one, on the group's first rank",
    "reference: expected a module, or a callable that makes one, got str",
    "reference: expected the model as it was before parallelize, got a parallelized one",
    "reference: expected the callable to return a module, got int",
    "rank 1: batch: expected a mapping, a tuple or a tensor, or a list of these as micro-batches, got int",
    "batch: expected at least one micro-batch",
    "tolerance: expected a positive number or None, got True",
    "fp64: expected True, False or None, got 'yes'",
    "rows: expected a positive int, got 0",
    "loss_fn: expected loss_fn(output, batch) -> scalar, or None, got 3",
    "batch: expected the same on every rank, but rank 1 has another than rank 0",
    "loss_fn: the model's output has none of its own; give loss_fn(output, batch) that returns a scalar tensor",
    "reference: expected the weights of the converted model, 1 differ: lm_head.weight",
    "the reference raised: You must specify exactly one of input_ids or inputs_embeds",
    "KeyError: 'no such checkpoint'",
    "reference: expected the weights of the converted model, 1 differ: model.norm.weight; give a callable",
    "the converted model raised: rank 1: ZeroDivisionError: division by zero",
    "model: the ranks hold different values of what is whole on each: model.norm.weight (rank 1)",
    "the converted model raised: blocks.0.scale: a sequence shard reaches parameter 'blocks.0.scale.gain'",
]


def test_refusals_come_on_every_rank(world2: World) -> None:
    for said in world2.run(refusals_case):
        for text, expected in zip(said, EXPECTED, strict=True):
            assert expected in text, (expected, text)


def offered_case() -> list[list[str]]:
    plan = {pattern: style for pattern, style in PLAN.items() if pattern != "blocks.*.scale"}
    model = sp.parallelize(Own(), group(), plan)
    notes = []
    for attempt in (lambda: model(ids_of(8, 11)), lambda: sp.parallelize(Own(), group(), {"nothing": "norm"})):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            attempt()
        notes.append(getattr(caught.value, "__notes__", [str(caught.value)]))
    right = sp.parallelize(Own(), group(), PLAN)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever torch raises for an argument that is none)
        right("text")
    notes.append(getattr(caught.value, "__notes__", []))
    return notes


def test_refusals_offer_verify(world2: World) -> None:
    for forward, conversion, foreign in world2.run(offered_case):
        for notes in (forward, conversion):
            assert sum("seqpar_kernels.verify(model, reference, batch)" in note for note in notes) == 1
        assert not foreign
