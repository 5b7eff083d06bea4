"""``generate`` of a converted model: one text on all ranks, and that of a whole model with the first rank's seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, group
from .test_ranks_alike import refused, tokens

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0},
    "ended": {"do_sample": True, "top_k": 0, "eos_token_id": list(range(1, 12)), "max_new_tokens": 20},
    "beams": {"do_sample": True, "num_beams": 3},
    "contents": {"do_sample": True, "return_dict_in_generate": True, "output_scores": True},
    "lookup": {"do_sample": True, "prompt_lookup_num_tokens": 2, "rows": 1},
}


def generate_case(kind: str, loss_parallel: bool) -> None:
    whole, model = MODELS[kind]().eval(), sp.parallelize(MODELS[kind]().eval(), group(), loss_parallel=loss_parallel)
    rank = dist.get_rank()
    for name, way in WAYS.items():
        options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **way}
        ids = tokens(1, options.pop("rows", 2))
        torch.manual_seed(4)
        expected = whole.generate(ids, **options)
        after = torch.get_rng_state()
        for apart in (0, 1):
            torch.manual_seed(4 + rank * apart)
            own = torch.get_rng_state()
            found = model.generate(ids, **options)
            found, wanted = getattr(found, "sequences", found), getattr(expected, "sequences", expected)
            assert torch.equal(found, wanted), (name, found, wanted)
            drawn = after if rank * apart == 0 else own
            assert torch.equal(torch.get_rng_state(), drawn), name


@pytest.mark.parametrize("loss_parallel", [False, True], ids=["", "loss_parallel"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_one_text_on_all_ranks(world2: World, kind: str, loss_parallel: bool) -> None:
    world2.run(generate_case, kind, loss_parallel)


def apart_case() -> None:
    model = sp.parallelize(MODELS["llama"]().eval(), group())
    rank = dist.get_rank()
    options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    refused(lambda: model.generate(tokens(rank), **options), "input_ids: other values on rank 1")
    own = torch.Generator().manual_seed(rank)

    def drawn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return scores + 9 * torch.rand(scores.shape, generator=own)  # a generator of the user's own

    refused(
        lambda: model.generate(tokens(0), do_sample=True, logits_processor=[drawn], **options), "rank 1", "the same"
    )
    by_hand = tokens(0)

    def sampled() -> None:
        ids = by_hand
        torch.manual_seed(rank)
        for _ in range(17):
            ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)], 1)

    refused(sampled, "input_ids: other values on rank 1", "torch.manual_seed")


def test_what_comes_apart_is_refused(world2: World) -> None:
    world2.run(apart_case)
