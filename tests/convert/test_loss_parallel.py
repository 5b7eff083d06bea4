"""parallelize(loss_parallel=True): the same loss and gradients, and no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import World
from .context_models import small_model
from .models import MODELS, VOCAB, assert_same_gradients, assert_same_loss, gpt2, group, llama


def train(model: nn.Module, ids: Tensor, **more: Any) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(9)
    losses, gradients = [], {}
    for step in range(3):
        for half in ids.chunk(2):
            labels = half.clone()
            labels[:, ::4] = -100
            loss = model(input_ids=half, labels=labels, **more).loss
            loss.backward()
            losses.append(loss.item())
        if step == 0:
            gradients = sp.gather_full_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def training_case(kind: str, length: int, options: dict[str, Any]) -> None:
    ids = torch.randint(VOCAB, (4, length))
    whole = sp.parallelize(MODELS[kind](**options), None)
    cut = sp.parallelize(MODELS[kind](**options), group(), loss_parallel=True)
    expected, got = train(whole, ids), train(cut, ids)
    for a, b in zip(got[0], expected[0], strict=True):
        assert_same_loss(a, b)
    assert_same_gradients(got[1], expected[1])
    state, other = sp.full_state_dict(whole), sp.full_state_dict(cut)
    assert state.keys() == other.keys()
    for name in state:
        torch.testing.assert_close(other[name], state[name], rtol=1e-4, atol=1e-5)
    for model in (whole.eval(), cut.eval()):
        model.config.use_cache = False
    torch.testing.assert_close(cut(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [16, 13])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", MODELS)
def test_trains_like_the_unsharded_model(world: World, kind: str, tied: bool, length: int) -> None:
    world.run(training_case, kind, length, {"tie_word_embeddings": tied})


def outputs_case(kind: str) -> None:
    ids = torch.randint(VOCAB, (2, 8))
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0} if kind == "gpt2" else {}
    plain, cut = MODELS[kind](**off), sp.parallelize(MODELS[kind](**off), group(), loss_parallel=True)
    weight = cut.get_output_embeddings().weight
    assert weight.shape[0] < VOCAB and ("gpt2" not in kind or weight is cut.get_input_embeddings().weight)
    out, reference = cut(ids, labels=ids), plain(ids, labels=ids)
    assert out.logits is None and "logits" not in out
    assert cut(ids, labels=ids, return_dict=False)[1] is None
    assert_same_loss(out.loss.item(), reference.loss.item())
    # Trainer's way: the number of items of the whole accumulated batch.
    a, b = (m(ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss for m in (cut, plain))
    assert_same_loss(a.item(), b.item())
    # Without labels: whole logits, and a loss of one's own on them.
    for model in (cut, plain):
        model.zero_grad()
        model(ids).logits.logsumexp(-1).sum().backward()
    full = sp.gather_full_gradients(cut)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(full[name], param.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_same_loss(cut.eval()(ids, labels=ids).loss.item(), plain.eval()(ids, labels=ids).loss.item())
    prompt = ids[:, :5].clamp(min=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(cut.generate(prompt, **options), plain.generate(prompt, **options))
    with pytest.raises(RuntimeError, match="the head was not given the last hidden state"):
        cut(ids, labels=ids, logits_to_keep=3)
    assert cut(ids).logits.shape == (2, 8, VOCAB)
    rows = {row.module: row for row in sp.explain(cut).rows}
    assert rows["lm_head"].style == "vocabulary"


@pytest.mark.parametrize("kind", MODELS)
def test_outputs(world2: World, kind: str) -> None:
    world2.run(outputs_case, kind)


def checkpoint_case(kind: str, reentrant: bool) -> None:
    ids = torch.randint(VOCAB, (2, 8))
    gradients = []
    for checkpointing in (False, True):
        model = sp.parallelize(MODELS[kind](), group(), loss_parallel=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model.train()(ids, labels=ids).loss.backward()
        gradients.append(sp.gather_full_gradients(model))
    assert_same_gradients(gradients[1], gradients[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing(world2: World, kind: str, reentrant: bool) -> None:
    world2.run(checkpoint_case, kind, reentrant)


def compiled_case(kind: str) -> None:
    ids = torch.randint(VOCAB, (2, 8))
    model = sp.parallelize(MODELS[kind](), group(), loss_parallel=True).eval()
    eager = model(ids, labels=ids).loss
    eager.backward()
    expected = sp.gather_full_gradients(model)
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager")(ids, labels=ids).loss
    loss.backward()
    assert_same_loss(loss.item(), eager.item())
    assert_same_gradients(sp.gather_full_gradients(model), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_compiles(world2: World, kind: str) -> None:
    world2.run(compiled_case, kind)


def refusals_case() -> None:
    g = group()

    def refused(message: str, model: nn.Module) -> None:
        shapes = {n: p.shape for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            sp.parallelize(model, g, loss_parallel=True)
        assert shapes == {n: p.shape for n, p in model.named_parameters()}, "the model was changed"

    model = llama()
    model.loss_function = nn.functional.cross_entropy
    refused("expected a Hugging Face model with a head and the loss ForCausalLMLoss", model)
    refused("expected a Hugging Face model with a head", llama().base_model)
    model = gpt2()
    model.lm_head = nn.Sequential(nn.Linear(32, 51))
    refused("lm_head: module: expected torch.nn.Linear with its own forward, got Sequential", model)
    model = gpt2()
    model.transformer.extra = nn.Linear(32, 51)
    model.transformer.extra.weight = model.lm_head.weight
    refused("is cut by vocabulary, but its weight is tied to", model)
    changed = sp.parallelize(llama(), g, loss_parallel=True)
    changed.lm_head.register_forward_hook(lambda module, args, out: out + 2)
    ids = torch.randint(VOCAB, (2, 8))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the model changes its logits before the loss"):
            changed(ids, labels=ids)
    assert changed(ids).logits.shape == (2, 8, VOCAB)


def test_refusals(world2: World) -> None:
    world2.run(refusals_case)


#: Architectures that scale or cap their logits -> options by which that is not nothing.
CHANGED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.7},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "nanochat": {"final_logit_softcapping": 0.7},  # its norm without weight runs before the blocks too
}
#: What changes nothing.
NEUTRAL: dict[str, float | None] = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def changed_logits_case(kind: str, compiled: bool) -> None:
    ids = torch.randint(3, 120, (2, 7))
    plain, cut = small_model(kind, CHANGED[kind]), small_model(kind, CHANGED[kind])
    sp.parallelize(cut, group(), loss_parallel=True)
    expected = plain(ids, labels=ids)
    got = (torch.compile(cut, backend="aot_eager") if compiled else cut)(ids, labels=ids)
    assert got.logits is None
    assert_same_loss(got.loss.item(), expected.loss.item())
    expected.loss.backward()
    got.loss.backward()
    full = sp.gather_full_gradients(cut)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(full[name], param.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    other = small_model(kind, {name: NEUTRAL[name] for name in CHANGED[kind]})(ids, labels=ids).loss  # it matters
    assert abs(other.item() - expected.loss.item()) > 1e-2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", CHANGED)
def test_scaled_and_capped_logits(world2: World, kind: str, compiled: bool) -> None:
    world2.run(changed_logits_case, kind, compiled)


def shown_case(kind: str) -> None:
    """The blocks' result is gathered where the last norm has no weight or is one of several."""
    ids = torch.randint(3, 120, (2, 7))
    plain, cut = small_model(kind, {}), sp.parallelize(small_model(kind, {}), group(), loss_parallel=True)
    losses = [model(ids, labels=ids).loss for model in (plain, cut)]
    assert_same_loss(losses[1].item(), losses[0].item())
    for loss in losses:
        loss.backward()
    full = sp.gather_full_gradients(cut)
    for name, param in plain.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(full[name], param.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(RuntimeError, match="expected one label for each of the 6 rows that the head was given, got 14"):
        cut(ids, labels=ids, logits_to_keep=3)


@pytest.mark.parametrize("kind", ["olmo", "gemma4_text"])
def test_a_last_norm_that_runs_on_all_rows(world2: World, kind: str) -> None:
    world2.run(shown_case, kind)


def hooked_case() -> None:
    """What a hook multiplies and squashes counts too, in place or not."""
    ids = torch.randint(VOCAB, (2, 8))

    def bend(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = (-2 * out.float() / 4).mul(1.5)
        out /= 3.0
        return torch.tanh(out) * -0.5

    models = llama(), sp.parallelize(llama(), group(), loss_parallel=True)
    for model in models:
        model.lm_head.register_forward_hook(bend)
        model.lm_head.weight.data.mul_(30)
    losses = [model(ids, labels=ids).loss for model in models]
    assert_same_loss(losses[1].item(), losses[0].item())
    models[0].lm_head.register_forward_hook(lambda module, args, out: out.tanh())
    models[1].lm_head.register_forward_hook(lambda module, args, out: out.tanh())
    with pytest.raises(RuntimeError, match="changes its logits before the loss by more than a number and one tanh"):
        models[1](ids, labels=ids)


def written_case() -> None:
    """Columns of padding at -inf: the loss would not know."""
    ids = torch.randint(VOCAB, (2, 8))

    def mask(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out[..., 40:] = -1e9
        return out

    def mask_view(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out.transpose(0, 1)[..., 40:].fill_(-1e9)
        return out * 2

    for hook in (mask, mask_view):
        cut = sp.parallelize(llama(), group(), loss_parallel=True)
        cut.lm_head.register_forward_hook(hook)
        with pytest.raises(
            RuntimeError, match=r"changes its logits before the loss|refers to a single memory location"
        ):
            cut(ids, labels=ids)
    cut = sp.parallelize(llama(), group(), loss_parallel=True)
    cut.lm_head.register_forward_hook(lambda module, args, out: out.masked_fill(torch.arange(VOCAB) > 40, -1e9))
    cut(ids)  # checks the changed model
    with pytest.raises(RuntimeError, match="changes its logits before the loss"):
        torch.compile(cut, backend="aot_eager")(ids, labels=ids)


def test_hooks_that_write_into_logits(world2: World) -> None:
    world2.run(written_case)


def test_hooks_that_change_logits(world2: World) -> None:
    world2.run(hooked_case)


def other_change_compiled_case() -> None:
    """Under torch.compile the change is the config's, and a model that does another one is told."""
    ids = torch.randint(3, 120, (2, 7))
    cut = sp.parallelize(small_model("granite", CHANGED["granite"]), group(), loss_parallel=True)
    cut.config.logits_scaling = 5.0
    with pytest.raises(RuntimeError, match="the logits changed otherwise than by scale"):
        torch.compile(cut, backend="aot_eager")(ids, labels=ids)


def test_another_change_under_compile(world2: World) -> None:
    world2.run(other_change_compiled_case)


def test_without_a_group() -> None:
    ids = torch.randint(VOCAB, (2, 7))
    plain, cut = llama(), sp.parallelize(llama(), None, loss_parallel=True)
    out = cut(ids, labels=ids)
    assert out.logits is None
    assert_same_loss(out.loss.item(), plain(ids, labels=ids).loss.item())
