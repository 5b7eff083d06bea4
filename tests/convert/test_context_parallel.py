"""Whole Transformers models over a sequence that ranks share: loss, gradients and logits of the unsharded model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.convert import conversion_of

from ..world import World
from .context_models import (
    TOLERANCE,
    VOCAB,
    assert_alike,
    assert_trains_alike,
    batch,
    difference,
    gradients,
    mesh_of,
    plain_model,
    shared,
)

#: One of each kind of attention.
KINDS = [
    "gpt2",  # learned positions
    "llama",  # grouped heads
    "mistral",  # a window in every layer
    "qwen2",
    "gemma2",  # capped scores, every second layer a window
    "gemma3_text",  # two kinds of rotary embedding
    "gpt_oss",  # sinks, windows, experts
    "deepseek_v3",  # latent attention: values unlike keys; experts
    "mixtral",  # experts that some ranks have no token for
    "granite_swa",  # sinks
]


def model_case(kind: str) -> None:
    plain, model = plain_model(kind), shared(kind)
    assert_trains_alike(plain, model, batch(pad=True))
    assert_trains_alike(plain, model, batch(length=8))  # gradients accumulate


@pytest.mark.parametrize("kind", KINDS)
def test_models_train_as_unsharded(world2: World, kind: str) -> None:
    world2.run(model_case, kind)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_models_on_more_ranks_than_key_heads(world4: World, kind: str) -> None:
    world4.run(model_case, kind)


def three_ranks_case(kind: str) -> None:
    """Ranks that divide neither the length nor the heads."""
    group = dist.new_group([0, 1, 2])
    try:
        if dist.get_rank() < 3:
            plain, model = plain_model(kind), shared(kind, mesh=group)
            assert_trains_alike(plain, model, batch(pad=True))
    finally:
        dist.barrier()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_models_on_three_ranks(world4: World, kind: str) -> None:
    world4.run(three_ranks_case, kind)


def chunks_case() -> None:
    """Llama 4 attends within chunks of the sequence; those that begin behind padding are refused."""
    options = {"attention_chunk_size": 4}
    plain, model = plain_model("llama4_text", options), shared("llama4_text", options)
    assert_trains_alike(plain, model, batch())
    with pytest.raises(RuntimeError, match="chunks that begin behind left padding"):
        model(**batch(pad=True))


def test_chunks(world2: World) -> None:
    world2.run(chunks_case)


def engine_case(engine: str) -> str:
    model = shared("llama", context_parallel=engine)
    assert_trains_alike(plain_model("llama"), model, batch(pad=True))
    return conversion_of(model).context.layout


def test_engines_and_their_layouts(world2: World) -> None:
    layouts = {engine: world2.run(engine_case, engine)[0] for engine in ("ulysses", "ring", "all_gather")}
    assert layouts == {"ulysses": "contiguous", "ring": "zigzag", "all_gather": "zigzag"}


def packing_case(kind: str) -> None:
    """Documents of their own in each batch entry, told by positions that begin anew."""
    given = batch(length=14)
    starts = ([0, 5, 9], [0, 2, 13])
    positions = torch.stack([torch.cat([torch.arange(n) for n in _lengths(s, 14)]) for s in starts])
    given["position_ids"] = positions
    plain, model = plain_model(kind), shared(kind)
    assert_trains_alike(plain, model, given)
    same = {**batch(length=14), "position_ids": positions[:1]}  # one row for all entries
    assert_trains_alike(plain, model, {**same, "position_ids": positions[:1].expand(2, -1)}, mine=same)


def _lengths(starts: list[int], length: int) -> list[int]:
    return [b - a for a, b in zip(starts, [*starts[1:], length])]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_packed_documents(world2: World, kind: str) -> None:
    world2.run(packing_case, kind)


def lengths_case() -> None:
    """The borders of documents as flash-attention takes them are the positions' equal."""
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    borders = torch.tensor([0, 5, 14], dtype=torch.int32)
    given = batch(1, 14)
    plain, model = plain_model("llama"), shared("llama")
    mine = {**given, "position_ids": positions, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    assert_trains_alike(plain, model, {**given, "position_ids": positions}, mine=mine)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected ascending integers from 0 to the 14 rows"):
        model(**{**mine, "cu_seq_lens_q": borders - 1, "cu_seq_lens_k": borders - 1})


def test_documents_by_their_lengths(world2: World) -> None:
    world2.run(lengths_case)


def labels_case() -> None:
    """Labels of one rank's rows alone, of none, and of one row a rank."""
    plain, model = plain_model("llama"), shared("llama")
    given = batch()
    given["labels"] = given["input_ids"].clone()
    given["labels"][:, 3:] = -100
    assert_trains_alike(plain, model, given)
    assert_trains_alike(plain, model, batch(1, dist.get_world_size()))
    given["labels"][:] = -100
    assert plain(**given).loss.isnan() and model(**given).loss.isnan()
    given["labels"] = given["input_ids"]
    for items in (torch.tensor(7), 7):
        expected = plain(**given, num_items_in_batch=items).loss
        assert difference(model(**given, num_items_in_batch=items).loss, expected) <= TOLERANCE
    shifted = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    got = model(input_ids=given["input_ids"], shift_labels=shifted).loss
    assert difference(got, plain(**given).loss) <= TOLERANCE


def test_labels_are_those_of_all_ranks(world: World) -> None:
    world.run(labels_case)


def recompute_case(reentrant: bool) -> None:
    plain, model = plain_model("gemma2"), shared("gemma2")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # The second forward comes between the first one and its backward: what that recomputes is its own.
    first, other = batch(pad=True), batch(length=9, seed=4)
    for given in (first, other):
        plain(**given, use_cache=False).loss.backward()
    losses = [model(**given).loss for given in (first, other)]
    losses[0].backward()
    losses[1].backward()
    assert_alike(gradients(model), gradients(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute(world2: World, reentrant: bool) -> None:
    world2.run(recompute_case, reentrant)


def sharded_case(layout: bool | str) -> None:
    """The rows of a loader that shards."""
    plain, model = plain_model("llama"), shared("llama", input_is_sharded=layout)
    name = "contiguous" if layout is True else layout
    assert conversion_of(model).context.layout == name
    given = batch(length=16, pad=True)
    group = dist.group.WORLD
    mine = {key: sp.shard_sequence(value, group, -1, layout=str(name)) for key, value in given.items()}
    assert_trains_alike(plain, model, given, mine=mine)
    del mine["labels"]
    mine["shift_labels"] = sp.next_token_labels(given["labels"], group, layout=str(name))
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None].expand(2, -1)
    del mine["attention_mask"], given["attention_mask"]
    mine["position_ids"] = sp.shard_sequence(positions, group, -1, layout=str(name))
    given["position_ids"] = positions
    assert_trains_alike(plain, model, given, mine=mine)


@pytest.mark.parametrize("layout", [True, "zigzag"])
def test_a_batch_that_is_sharded(world2: World, layout: bool | str) -> None:
    world2.run(sharded_case, layout)


def embeds_case() -> None:
    """Embeddings in place of token ids: their gradient is whole on every rank."""
    plain, model = plain_model("llama"), shared("llama")
    found = []
    for each in (plain, model):
        embeds = plain.model.embed_tokens(batch()["input_ids"]).detach().requires_grad_()
        each(inputs_embeds=embeds, labels=batch()["labels"]).loss.backward()
        found.append(embeds.grad)
    assert difference(found[1], found[0]) <= TOLERANCE


def test_input_embeddings(world2: World) -> None:
    world2.run(embeds_case)


def dropout_case(kind: str, options: dict[str, float]) -> tuple[list[float], list[float], float]:
    """Losses of two forwards, recomputed or not, the same for any number of ranks; and the generator after them."""
    found: list[list[float]] = []
    for recompute in (False, True):
        model = shared(kind, options)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        losses = [model(**batch()).loss for _ in range(2)]
        for loss in losses:
            loss.backward()
        found.append([loss.item() for loss in losses] + [p.grad.norm().item() for p in model.parameters()])
    return found[0], found[1], torch.rand(()).item()


def whole_dropout_case(options: dict[str, float]) -> list[float]:
    model = plain_model("llama", options)
    sp.parallelize(model, None, context_parallel="auto")
    torch.manual_seed(5)
    return [model(**batch()).loss.item() for _ in range(2)]


def test_attention_drops_by_position(world: World) -> None:
    """What one rank would drop, however many share the sequence; a recomputation drops the same."""
    options = {"attention_dropout": 0.3}
    expected = whole_dropout_case(options)
    assert expected[0] != expected[1]
    for plain, recomputed, drawn in world.run(dropout_case, "llama", options):
        assert plain[:2] == pytest.approx(expected, rel=1e-5)
        assert recomputed == pytest.approx(plain, rel=1e-5)
        assert drawn == world.run(dropout_case, "llama", options)[0][2]


def test_rows_drop_on_each_rank_for_itself(world2: World) -> None:
    options = {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.1}
    for plain, recomputed, _ in world2.run(dropout_case, "gpt2", options):
        assert recomputed == pytest.approx(plain, rel=1e-5)


def grid_case(kind: str, recompute: bool) -> None:
    plain, model = plain_model(kind), shared(kind, mesh=mesh_of(2, 2))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_trains_alike(plain, model, batch(pad=True), times=2)
    assert_trains_alike(plain, model, batch(length=8))
    assert "attention over 2 ranks" in str(sp.explain(model)).replace("\n", " ")


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [("gpt2", False), ("llama", False), ("llama", True), ("mistral", False), ("gemma2", False), ("granite_swa", False)],
)
def test_with_tensor_parallelism(world4: World, kind: str, recompute: bool) -> None:
    world4.run(grid_case, kind, recompute)


def longrope_case() -> None:
    """Rotary frequencies that change where a sequence is longer than some length: the whole one counts."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
    options = {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 10,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 10,
            **factors,
        },
    }
    plain, model = plain_model("phi3", options), shared("phi3", options)
    for length in (13, 9):
        assert_trains_alike(plain, model, batch(length=length))
    assert not torch.equal(plain(**batch(length=13)).logits[:, :9], plain(**batch(length=9)).logits)


def test_rotary_embeddings_that_follow_the_length(world2: World) -> None:
    world2.run(longrope_case)


def one_rank_case() -> None:
    """A parameter that only some ranks use, as an expert without tokens is."""
    model = shared("llama")
    extra = torch.nn.Parameter(torch.ones(VOCAB))
    model.lm_head.extra = extra
    if dist.get_rank() == 0:
        model.lm_head.register_forward_hook(lambda module, args, output: output + extra)
    model(**batch()).loss.backward()
    assert extra.grad is not None and extra.grad.abs().max() > 0
    ranks = torch.stack([extra.grad, torch.zeros(VOCAB)])[: dist.get_world_size()]
    dist.broadcast(ranks, 0)
    assert torch.equal(extra.grad, ranks[0])


def test_a_parameter_that_one_rank_uses(world2: World) -> None:
    world2.run(one_rank_case)


def undo_case() -> None:
    model = shared("llama")
    model(**batch()).loss.backward()
    plain = plain_model("llama")
    sp.unparallelize(model)
    assert model.config._attn_implementation == "sdpa" and model.loss_function.__name__ == "ForCausalLMLoss"
    assert_alike({n: p.detach() for n, p in model.named_parameters()}, dict(plain.named_parameters()), 0.0)
    out, expected = model(**batch()), plain(**batch())
    assert difference(out.logits, expected.logits) <= TOLERANCE
    out.loss.backward()
    expected.loss.backward()
    assert_alike(gradients(model), gradients(plain))  # of one rank: nothing sums them any more


def test_unparallelize(world2: World) -> None:
    world2.run(undo_case)


def refusals_case() -> list[str]:
    """Each on every rank, before anything is sent, so that the next one meets it."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = shared("llama")
    given = batch()
    square = torch.ones(2, 1, 13, 13, dtype=torch.bool)
    calls: dict[str, dict[str, Any]] = {
        "attention_mask: expected [2, 13]": {**given, "attention_mask": square},
        "use_cache: expected none": {**given, "use_cache": True},
        "logits_to_keep: expected 0": {**given, "logits_to_keep": 1},
        "output_attentions: expected False": {**given, "output_attentions": True},
        "token_type_ids: expected None": {**given, "token_type_ids": given["input_ids"]},
        "output_router_logits: expected False": {**given, "output_router_logits": True},
        "labels: expected [2, 13]": {**given, "labels": given["labels"][:, 1:]},
        "input_ids: expected these or inputs_embeds": {"labels": given["labels"]},
        "rows or more with context_parallel, one for each rank": {"input_ids": given["input_ids"][:, :1]},
    }
    found = []
    for text, kwargs in calls.items():
        with pytest.raises(ValueError, match=re.escape(text)) as caught:
            model(**kwargs)
        found.append(str(caught.value))
    with pytest.raises(RuntimeError, match="outside of a forward of the model that parallelize was given"):
        model.model(given["input_ids"])
    model(**given).loss.backward()  # nothing is left behind

    kinds = {
        "olmo_hybrid": "AttentionInterface",
        "minimax": "layers of type linear_attention",
        "phi4_multimodal": "has a Conv2d",
    }
    for kind, text in kinds.items():
        with pytest.raises(ValueError, match=f"context_parallel: .*{text}"):
            shared(kind)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    classifier = LlamaForSequenceClassification(LlamaConfig(vocab_size=8, **small))
    for wrong, options, text in (
        (torch.nn.Linear(2, 2), {}, "is no model of Transformers"),
        (classifier, {}, "its head may count rows"),
        (plain_model("llama"), {"context_parallel": "rings"}, "context_parallel: expected None or one of 'auto'"),
        (plain_model("llama"), {"input_is_sharded": "rows"}, "input_is_sharded: expected a bool"),
        (plain_model("llama"), {"loss_parallel": True}, "loss_parallel: expected False"),
    ):
        with pytest.raises(ValueError, match=text):
            sp.parallelize(wrong, dist.group.WORLD, **{"context_parallel": "auto", **options})
    with pytest.raises(ValueError, match="input_is_sharded: expected False without context_parallel"):
        sp.parallelize(plain_model("llama"), dist.group.WORLD, input_is_sharded=True)
    doge = shared("doge")
    with pytest.raises(RuntimeError, match="the model computes with its attention mask"):
        doge(**given)
    return found


def test_what_cannot_be_honoured_is_refused(world2: World) -> None:
    one, other = world2.run(refusals_case)
    assert one == other


def other_batch_case() -> str:
    model = shared("llama")
    with pytest.raises(RuntimeError) as caught:
        model(**batch(seed=dist.get_rank()))
    return str(caught.value)


def test_ranks_that_are_given_other_batches(world2: World) -> None:
    for message in world2.run(other_batch_case):
        assert "input_ids: other values on rank 1 than on rank 0" in message
