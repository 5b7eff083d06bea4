"""Checkpointed forwards of the decoder inside a model: each is recomputed as it was, whatever came after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, VOCAB, assert_same_gradients, group

OFF = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, "llama": {}}


def inner(model: nn.Module, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids).last_hidden_state.square().mean()  # type: ignore[no-any-return, operator]


def outer(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


ORDERS = {
    "inner": [(inner, 9), (inner, 10)],
    "longer first": [(inner, 12), (inner, 9), (inner, 11)],
    "inner then outer": [(inner, 9), (outer, 12), (inner, 10)],
    "outer then inner": [(outer, 13), (inner, 10), (outer, 8)],
}


def inner_case(kind: str, loss_parallel: bool, reentrant: bool) -> None:
    for order, calls in ORDERS.items():
        found = []
        for converted in (False, True):
            model = MODELS[kind](**OFF[kind]).train()
            if converted:
                sp.parallelize(model, group(), loss_parallel=loss_parallel)
                with torch.no_grad():  # leaves what holds without checkpoints
                    outer(model, torch.zeros(1, 7, dtype=torch.long))
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            generator = torch.Generator().manual_seed(8)
            losses = [f(model, torch.randint(VOCAB, (1, n), generator=generator)) for f, n in calls]
            with torch.no_grad():
                inner(model, torch.zeros(1, 5, dtype=torch.long))
            sum(i * loss for i, loss in enumerate(losses, 1)).backward()  # type: ignore[union-attr]
            if converted:
                found.append(sp.gather_full_gradients(model))
            else:
                found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        try:
            assert_same_gradients(found[1], found[0])
        except AssertionError as error:
            raise AssertionError(order) from error


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("kind", "loss_parallel"), [("gpt2", False), ("llama", False), ("llama", True)])
def test_forwards_of_the_model_inside(world2: World, kind: str, loss_parallel: bool, reentrant: bool) -> None:
    world2.run(inner_case, kind, loss_parallel, reentrant)


def own_loop(model: Any, ids: Tensor) -> Tensor:
    """As early exits and probes write it."""
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(x, positions)
    for layer in model.model.layers:
        x = layer(x, position_embeddings=rotary)
    return model.lm_head(model.model.norm(x))  # type: ignore[no-any-return]


def own_loop_case() -> None:
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(8))
    plain, model = MODELS["llama"](), sp.parallelize(MODELS["llama"](), group())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"model\.layers\.0: the sequence is cut in no forward of the model"):
            own_loop(model, ids)
        with torch.no_grad():
            torch.testing.assert_close(own_loop(model, ids), own_loop(plain, ids))
        outer(model, ids).backward()


def test_a_loop_over_the_layers_is_refused_where_it_has_gradients(world2: World) -> None:
    world2.run(own_loop_case)
