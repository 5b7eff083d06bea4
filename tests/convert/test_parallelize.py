"""parallelize: Hugging Face models and the user's own, on real ranks, against the unsharded model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.convert import ParallelPlan, resolve

from ..world import RankError, World
from . import models
from .models import group

transformers = pytest.importorskip("transformers")

gpt2 = functools.partial(models.gpt2, vocab_size=50)
llama = functools.partial(models.llama, vocab_size=50)
MODELS = {"gpt2": gpt2, "llama": llama}


def train(model: nn.Module, ids: Tensor, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps (two accumulated backwards each), and the gradients of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(9)
    losses, gradients = [], {}
    for step in range(steps):
        for half in ids.chunk(2):
            loss = model(input_ids=half, labels=half).loss
            loss.backward()
            losses.append(loss.item())
        if step == 0:
            gradients = sp.gather_full_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def assert_same_run(a: Any, b: Any) -> None:
    assert a[1].keys() == b[1].keys()
    for x, y in zip(a[0], b[0], strict=True):
        assert abs(x - y) <= 1e-5 * abs(y), (a[0], b[0])
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def hugging_face_case(kind: str, length: int, options: dict[str, Any]) -> None:
    ids = torch.randint(50, (4, length))
    whole = sp.parallelize(MODELS[kind](**options), None)
    sharded = sp.parallelize(MODELS[kind](**options), group())
    reference = {n: p.shape for n, p in whole.named_parameters()}
    assert {n: p.shape for n, p in sp.full_state_dict(sharded).items() if n in reference} == reference
    expected, got = train(whole, ids), train(sharded, ids)
    assert_same_run(got, expected)
    state, other = sp.full_state_dict(whole), sp.full_state_dict(sharded)
    for name in state:
        # Adam divides by the root of tiny second moments: parameters agree less closely than gradients.
        torch.testing.assert_close(other[name], state[name], rtol=1e-2, atol=2e-3)
    MODELS[kind](**options).load_state_dict(other)
    for model in (whole, sharded):
        model.eval()
    with torch.no_grad():
        assert sharded(input_ids=ids).logits.shape == (4, length, 50)


@pytest.mark.parametrize("length", [16, 13])
@pytest.mark.parametrize("kind", MODELS)
def test_trains_like_the_unsharded_model_with_dropout_on(world: World, kind: str, length: int) -> None:
    world.run(hugging_face_case, kind, length, {})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu", "attn_implementation": "eager"}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ],
)
def test_variants(world2: World, kind: str, options: dict[str, Any]) -> None:
    world2.run(hugging_face_case, kind, 13, options)


def plain_case(kind: str) -> None:
    """With dropout off the plain Hugging Face model agrees too."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0} if kind == "gpt2" else {}
    ids = torch.randint(50, (2, 11))
    plain, sharded = MODELS[kind](**off), sp.parallelize(MODELS[kind](**off), group())
    a, b = plain(input_ids=ids, labels=ids), sharded(input_ids=ids, labels=ids)
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-4, atol=1e-5)
    a.loss.backward()
    b.loss.backward()
    full = sp.gather_full_gradients(sharded)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(full[name], param.grad, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(sharded(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    base = sp.parallelize(MODELS[kind](**off).base_model, group())  # the bare backbone
    whole = MODELS[kind](**off).base_model
    torch.testing.assert_close(base(ids).last_hidden_state, whole(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_equals_plain_hugging_face_without_dropout(world2: World, kind: str) -> None:
    world2.run(plain_case, kind)


class Block(nn.Module):
    """A user's block: layer scale, a parameter on the shard that no style replaces, and a norm on heads."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.act = Gain(4)
        self.down = nn.Linear(4 * hidden, hidden)
        self.drop = nn.Dropout(0.1)
        self.scale = Gain(hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        h = self.act(h.unflatten(-1, (-1, 4))).flatten(-2).tanh()
        return x + self.scale(self.drop(self.down(h)))


class Gain(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class ZeroCentredNorm(nn.Module):
    """Uses its weight in an expression only."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1.0 + self.weight.float())


class Own(nn.Module):
    """A user's model, [B, S, H] or [S, B, H]."""

    def __init__(self, seq_dim: int = 1, hidden: int = 16):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, 11)
        self.seq_dim = seq_dim

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids if self.seq_dim == 1 else ids.t())
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


PLAN = {
    "blocks.0": "scatter_input",
    "blocks.*.norm": "norm",
    "blocks.*.up": "colwise",
    "blocks.*.act": "tensor_parallel",
    "blocks.*.down": "rowwise",
    "blocks.*.drop": "dropout",
    "blocks.*.scale": "sequence",
    "norm": "norm+gather_output",
}


def own_case(seq_dim: int) -> None:
    ids = torch.randint(11, (2, 7))
    results = []
    for g in (None, group()):
        model = sp.parallelize(Own(seq_dim), g, PLAN, seq_dim=seq_dim)
        for _ in range(2):
            torch.manual_seed(5)
            loss = model(ids).square().mean()
            loss.backward()
        results.append(([loss.item()], sp.gather_full_gradients(model)))
    assert_same_run(results[1], results[0])


@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
def test_own_module_through_a_plan(world: World, seq_dim: int) -> None:
    world.run(own_case, seq_dim)


def one_exchange_case() -> int:
    """Replicated gradients: one exchange a backward, however many parameters; also through autograd.grad."""
    import seqpar_kernels.ops.mappings as mappings

    original, calls = mappings.sum_over_ranks, []
    mappings.sum_over_ranks = lambda *args: calls.append(len(args[0])) or original(*args)
    try:
        model = sp.parallelize(Own(), group(), PLAN)
        ids = torch.randint(11, (2, 8))
        model(ids).sum().backward()
        assert calls == [9]  # 2 x (norm weight, norm bias, act, scale) + final norm
        torch.manual_seed(0)
        expected = copy.deepcopy([p.grad for p in model.parameters()])
        model.zero_grad()
        assert all(e is not None for e in expected)
        torch.manual_seed(2)
        loss = model(ids).sum()
        names = dict(model.named_parameters())
        wanted = [names["norm.weight"], names["blocks.0.scale.gain"]]
        direct = torch.autograd.grad(loss, wanted)
        torch.manual_seed(2)
        model(ids).sum().backward()
        torch.testing.assert_close(list(direct), [p.grad for p in wanted])
        with torch.no_grad():
            model(ids)
    finally:
        mappings.sum_over_ranks = original
    return len(calls)


def test_replicated_gradients_take_one_exchange_a_backward(world2: World) -> None:
    assert world2.run(one_exchange_case) == [3, 3]


def checkpoint_case(kind: str, reentrant: bool) -> None:
    ids = torch.randint(50, (2, 8))
    results = []
    longer = torch.randint(50, (2, 12))
    for checkpointing in (False, True):
        model = sp.parallelize(MODELS[kind](), group())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        results.append(train(model, ids, 1))
        torch.manual_seed(4)  # two forwards of different length before one backward
        (model(input_ids=ids, labels=ids).loss + model(input_ids=longer, labels=longer).loss).backward()
        results.append(([0.0], sp.gather_full_gradients(model)))
    assert_same_run(results[2], results[0])
    assert_same_run(results[3], results[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing(world2: World, kind: str, reentrant: bool) -> None:
    world2.run(checkpoint_case, kind, reentrant)


def missed_case(missing: str) -> None:
    plan = {pattern: style for pattern, style in PLAN.items() if pattern != missing}
    model = Own()
    if missing == "gather":
        plan.update({"norm": "norm", "head": "sequence"})
    if missing == "derived":
        del plan["blocks.*.norm"]
        for block in model.blocks:
            block.norm = ZeroCentredNorm(16)
    model = sp.parallelize(model, group(), plan)
    ids = torch.randint(11, (2, 8))
    for attempt in (model, model.eval(), torch.compile(model.train(), backend="eager")):
        with pytest.raises(RuntimeError) as caught:  # trying again does not help
            attempt(ids)
        if attempt is model:
            first = str(caught.value)
    raise RuntimeError(first)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("blocks.*.norm", "blocks.0.norm: a sequence shard reaches parameter 'blocks.0.norm.weight'"),
        ("blocks.*.scale", "blocks.0.scale: a sequence shard reaches parameter 'blocks.0.scale.gain'"),
        ("norm", "norm: a sequence shard reaches parameter 'norm.weight'"),
        ("blocks.*.up", "blocks.0.up: a sequence shard reaches parameter 'blocks.0.up.weight'"),
        ("derived", "blocks.0.norm: a sequence shard reaches parameter 'blocks.0.norm.weight'"),
        ("blocks.*.drop", "blocks.0.drop: dropout on a sequence shard that the plan does not know"),
        ("blocks.0", "blocks.0.norm: the plan says 'norm', which takes a sequence shard, but its input is the whole"),
        ("gather", "Own returns a sequence shard: the plan has no 'gather_output'"),
    ],
)
def test_what_the_plan_misses_is_named(world2: World, missing: str, message: str) -> None:
    with pytest.raises(RankError) as caught:
        world2.run(missed_case, missing)
    assert all(not ok and message in text for ok, text in caught.value.outcomes), caught.value


def refusals_case() -> None:
    g = group()
    t = g.size()

    def refused(message: str, model: nn.Module, *args: Any, **options: Any) -> None:
        before = {n: p.shape for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            sp.parallelize(model, *args, **options)
        assert before == {n: p.shape for n, p in model.named_parameters()}, "the model was changed"

    refused("plan: there is no built-in plan for Own", Own(), g)
    refused(r"plan\['blocks.\*.nrm'\]: matches no module of Own; it has", Own(), g, {"blocks.*.nrm": "norm"})
    refused(r"plan\['norm'\]: expected styles out of .* got 'nrom'", Own(), g, {"norm": "nrom"})
    refused("blocks.0.up: style 'norm': module: expected no parameter but a weight", Own(), g, {"blocks.*.up": "norm"})
    nested = {"blocks.*": "sequence", "blocks.*.norm": "norm"}
    refused("plan: blocks.0.norm has the style 'norm' inside blocks.0, which is 'sequence'", Own(), g, nested)
    hooked = gpt2()
    hooked.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: None)
    refused("transformer.h.1.mlp.c_fc: has hooks that the conversion would drop", hooked, g)
    assert hooked.transformer.h[0].attn.num_heads == 4
    refused("head.out_features: expected its size to be a multiple of the 2 ranks", Own(), g, {"head": "colwise"})
    refused("embed: style 'colwise': module: expected torch.nn.Linear", Own(), g, {"embed": "colwise"})
    refused("norm: style 'dropout' takes torch.nn.Dropout", Own(), g, {"norm": "dropout"})
    refused(
        "model.config.num_attention_heads: expected a multiple of the 2 ranks of the group, got 1", gpt2(n_head=1), g
    )
    refused(
        "num_key_value_heads: expected a multiple or a divisor of the 2 ranks of the group, got 3",
        llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3), g,
    )  # fmt: skip
    refused("engine: expected one of", gpt2(), g, engine="warp")
    model = Own()
    model.head.weight = nn.Parameter(torch.randn(12, 16))
    model.head.out_features = 12
    model.embed.weight = model.head.weight
    refused(r"head: its weight is tied to \['embed'\]", model, g, {"head": "colwise"})
    done = sp.parallelize(gpt2(), g)
    refused("model: GPT2LMHeadModel has been parallelized already", done, g)
    with pytest.raises(RuntimeError, match="cannot be deep-copied"):
        copy.deepcopy(done)
    with pytest.raises(ValueError, match="has not been parallelized"):
        sp.explain(Own())
    assert t == 2


def test_the_mesh_is_taken_under_its_old_name() -> None:
    given: dict[str, Any] = {"group_or_mesh": None}
    model = Own()
    assert sp.parallelize(model, plan=PLAN, **given) is model
    with pytest.raises(ValueError, match="group_or_mesh: expected device_mesh alone, got both"):
        sp.parallelize(Own(), device_mesh=None, plan=PLAN, **given)


def test_refusals_leave_the_model_as_it_was(world2: World) -> None:
    world2.run(refusals_case)


def old_torch_case() -> None:
    least, resolve.LEAST_TORCH = resolve.LEAST_TORCH, (99, 0)
    try:
        model = gpt2()
        with pytest.raises(RuntimeError, match=r"torch: parallelize needs the DTensors of torch 99\.0 or newer"):
            sp.parallelize(model, group())
        sp.parallelize(model, None)  # one rank has no DTensors
    finally:
        resolve.LEAST_TORCH = least


def test_a_torch_that_is_too_old_is_refused(world2: World) -> None:
    assert resolve.why_not_convert() is None
    world2.run(old_torch_case)


def different_weights_case() -> None:
    model = gpt2()
    if group().rank():
        with torch.no_grad():
            model.transformer.wte.weight[3, 4] += 1e-3
    sp.parallelize(model, group())


def test_ranks_with_different_weights_all_refuse(world2: World) -> None:
    outcomes = world2.outcomes(different_weights_case)
    assert all(not ok and "seed the ranks alike or load the same checkpoint" in text for ok, text in outcomes)


def explain_case() -> None:
    model = sp.parallelize(llama(hidden_size=128, intermediate_size=256), group(), engine="p2p")
    before = sp.explain(model)
    assert all(row.engine == "not run yet" for row in before.rows if row.style in ("colwise", "rowwise"))
    ids = torch.randint(50, (4, 128))
    model(input_ids=ids, labels=ids).loss.backward()
    rows = {row.module: row for row in sp.explain(model).rows}
    q = rows["model.layers.0.self_attn.q_proj"]
    assert (q.style, q.engine, q.fused) == ("colwise", "p2p", "yes") and "k_proj, v_proj" in q.why
    assert rows["model.norm"].style == "norm+gather_output"
    assert all(row.why for row in rows.values())
    assert "group of 2 ranks" in str(sp.explain(model))


def test_explain(world2: World) -> None:
    world2.run(explain_case)


def test_explain_and_state_without_a_group() -> None:
    model = sp.parallelize(gpt2(), None)
    ids = torch.randint(50, (1, 5))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    assert "no group" in str(sp.explain(model))
    assert sp.full_state_dict(model).keys() == gpt2().state_dict().keys()


def test_plan_objects() -> None:
    model = sp.parallelize(Own(), None, ParallelPlan(PLAN, shared=(("up",),)))
    assert model(torch.randint(11, (1, 3))).shape == (1, 3, 11)
    with pytest.raises(ValueError, match="plan: expected a mapping"):
        sp.parallelize(Own(), None, ["norm"])  # type: ignore[arg-type]


def hidden_states_case() -> None:
    model = sp.parallelize(gpt2(), group())
    ids = torch.randint(50, (2, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match="output_hidden_states: expected False"):
            model(ids, output_hidden_states=True)
        model(ids)


def test_hidden_states_are_refused_every_time(world2: World) -> None:
    world2.run(hidden_states_case)


def generate_case(kind: str) -> None:
    ids = torch.randint(1, 50, (2, 5))
    expected = MODELS[kind]().eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    got = (
        sp.parallelize(MODELS[kind](), group()).eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_generation_with_a_cache(world2: World, kind: str) -> None:
    world2.run(generate_case, kind)


def compiled_case(kind: str) -> None:
    ids = torch.randint(50, (2, 8))
    model = sp.parallelize(MODELS[kind](), group()).eval()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = sp.gather_full_gradients(model)
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids).loss.backward()
    got = sp.gather_full_gradients(model)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_compiles(world2: World, kind: str) -> None:
    world2.run(compiled_case, kind)


def head_dropout_case(pdrop: float) -> tuple[list[float], float]:
    """Heads that are all alike: what they return differs by their dropout alone. And the generator afterwards."""
    model = gpt2(attn_pdrop=pdrop, attn_implementation="eager").train()
    for block in model.transformer.h:
        nn.init.zeros_(block.attn.c_attn.weight)
        nn.init.ones_(block.attn.c_attn.bias)
    sp.parallelize(model, group())
    seen: list[Tensor] = []
    model.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(7)
    model(torch.arange(8)[None])
    return seen[0][0, :, 0].tolist(), torch.rand(()).item()


def test_heads_on_different_ranks_do_not_drop_alike(world2: World) -> None:
    (first, after), (second, after_too) = world2.run(head_dropout_case, 0.5)
    assert first != second and after == after_too
    (first, _), (second, _) = world2.run(head_dropout_case, 0.0)
    assert first == second
