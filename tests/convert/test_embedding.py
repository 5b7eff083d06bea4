"""A vocabulary-parallel embedding in a converted model: partial rows are reduce-scattered straight into the shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import seqpar_kernels as sp
from seqpar_kernels.overlap import pipeline

from ..world import World
from .models import MODELS, VOCAB, assert_same_gradients, assert_same_loss, group, llama, transformers


def gemma(**options: Any) -> nn.Module:
    """Its embedding multiplies by sqrt(H); dropout nowhere."""
    torch.manual_seed(3)
    config = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=4, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config)


EMBEDDINGS: dict[str, Callable[..., nn.Module]] = {**MODELS, "gemma": gemma}


class Collectives:
    """Counts what ``overlap.pipeline`` is asked for, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[str] = []
        for name in ("gather", "reduce_scatter"):
            monkeypatch.setattr(pipeline, name, self._counted(name, getattr(pipeline, name)))

    def _counted(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(x: Tensor, dim: int, *rest: Any) -> Tensor:
            label = next((arg for arg in rest if isinstance(arg, str)), "")
            self.seen.append(f"{name} {label}".strip())
            return function(x, dim, *rest)

        return counted


def trained(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(9)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), sp.gather_full_gradients(model)


def row_of(model: Any) -> Any:
    name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    return next(row for row in sp.explain(model).rows if row.module == name)


def exact_case(kind: str, tied: bool, length: int) -> None:
    ids = torch.randint(VOCAB, (3, length))
    build = EMBEDDINGS[kind]
    whole = sp.parallelize(build(tie_word_embeddings=tied), None)
    expected = trained(whole, ids)
    found = []
    for summed in (False, True):
        model: Any = sp.parallelize(build(tie_word_embeddings=tied), group(), loss_parallel=True)
        embedding = model.get_input_embeddings()
        assert row_of(model).why == "not run yet"
        if summed:  # what it would be otherwise
            embedding.whole_needed = lambda: "this test"
        with pytest.MonkeyPatch.context() as patch:
            model(input_ids=ids, labels=ids)  # followed by the check of a first forward
            model.zero_grad()
            calls = Collectives(patch)
            found.append(trained(model, ids))
        assert calls.seen.count("reduce_scatter vocab_embedding") == (not summed)
        assert calls.seen.count("gather vocab_embedding backward") == (not summed)
        row = row_of(model)
        assert (row.fused, row.style) == ("no" if summed else "yes", "vocabulary")
        assert ("this test takes it whole" if summed else "straight into the sequence shard") in row.why
    (loss, gradients), (summed_loss, summed_gradients) = found
    assert loss == summed_loss
    for name, gradient in summed_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    assert_same_loss(loss, expected[0])
    assert_same_gradients(gradients, expected[1])


@pytest.mark.parametrize("length", [16, 13, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_gives_what_the_sum_over_the_ranks_gives(world: World, kind: str, tied: bool, length: int) -> None:
    world.run(exact_case, kind, tied, length)


def checkpointed(model: Any, reentrant: bool) -> str:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return "the reentrant checkpoint of" if reentrant and hasattr(model.base_model, "layers") else "yes"


def scaled(model: Any) -> str:
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: (2 * out.to(torch.float32)) / 0.5)
    return "yes"


def normalized(model: Any) -> str:
    norm = nn.LayerNorm(32)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: norm(out))
    return "layer_norm"


def shifted(model: Any) -> str:
    """By what is the same for every row, and trained: its gradient is a sum over all rows."""
    embedding = model.get_input_embeddings()
    embedding.register_parameter("shift", nn.Parameter(torch.full((32,), 0.1)))
    embedding.register_forward_hook(lambda module, args, out: out + module.shift)
    return "add"


def taken_later(model: Any) -> str:
    """The shard and the whole tensor: each has a part of the gradient."""
    kept: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: kept.append(out))

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        out.loss = out.loss + kept.pop().tanh().mean()

    model.register_forward_hook(hook)
    return "tanh"


def changed_in_place(model: Any) -> str:
    """Before it is cut, under a name that still says the tensor as it was."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        same = out
        out *= 1.5
        return same

    model.get_input_embeddings().register_forward_hook(hook)
    return "mul_"


CHANGES: dict[str, Callable[[nn.Module], str]] = {
    "reentrant": lambda model: checkpointed(model, True),
    "checkpointed": lambda model: checkpointed(model, False),
    **{change.__name__: change for change in (scaled, normalized, shifted, taken_later, changed_in_place)},
}


def changed_case(kind: str, change: str) -> None:
    ids = torch.randint(VOCAB, (2, 9))
    found = []
    for g in (None, group()):
        torch.manual_seed(5)
        model: Any = sp.parallelize(MODELS[kind](), g, loss_parallel=True)
        wanted = CHANGES[change](model)
        found.append(trained(model.train(), ids))
    row = row_of(model)
    assert row.fused == "yes" if wanted == "yes" else row.fused == "no" and wanted in row.why, row
    assert_same_loss(found[1][0], found[0][0])
    assert_same_gradients(found[1][1], found[0][1])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", MODELS)
def test_what_needs_the_whole_gets_it(world2: World, kind: str, change: str) -> None:
    """And explain says what it was."""
    world2.run(changed_case, kind, change)


def sharded_case(blocks: bool) -> None:
    """fully_shard's hooks take tensors that autograd knows; behind the root's the shard is taken."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    ids = torch.randint(VOCAB, (2, 9))
    expected = trained(sp.parallelize(llama(), None), ids)
    model: Any = sp.parallelize(llama(), mesh["tp"], loss_parallel=True)
    for block in model.model.layers if blocks else ():
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    mine = mesh["dp"].get_local_rank()
    _, gradients = trained(model, ids[mine : mine + 1])
    assert_same_gradients(gradients, expected[1])
    row = row_of(model)
    assert (row.fused == "no" and "wrapped" in row.why) if blocks else row.fused == "yes", row


@pytest.mark.parametrize("blocks", [False, True])
def test_behind_fully_shard(world4: World, blocks: bool) -> None:
    world4.run(sharded_case, blocks)


class Other(nn.Embedding):
    """Says it scales, and does something else."""

    embed_scale = 2.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale + 1


def test_a_forward_of_ones_own_is_taken_by_what_it_computes() -> None:
    with pytest.raises(ValueError, match="one that multiplies by its embed_scale, got Other"):
        sp.VocabParallelEmbedding.from_torch(Other(VOCAB, 8))
    ids = torch.randint(VOCAB, (2, 5))
    embedding: Any = gemma().get_input_embeddings()
    ours = sp.VocabParallelEmbedding.from_torch(embedding)
    assert torch.equal(ours(ids), embedding(ids)) and ours.state_dict().keys() == embedding.state_dict().keys()
