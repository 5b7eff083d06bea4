"""Every architecture that context parallelism takes without a trial, and the trial of those that it does not know."""

from __future__ import annotations

import pytest
import torch

import seqpar_kernels as sp
from seqpar_kernels.convert.hf.context_probe import PROVEN

from ..world import World
from .context_models import assert_trains_alike, batch, plain_model, shared

CHUNKS = 8


def architectures_case(kinds: list[str]) -> dict[str, str]:
    """What went wrong."""
    found = {}
    for kind in kinds:
        try:
            assert_trains_alike(plain_model(kind), shared(kind), batch(pad=True))
        except Exception as error:
            found[kind] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_proven_architectures_train_as_unsharded(world2: World, chunk: int) -> None:
    assert world2.run(architectures_case, sorted(PROVEN)[chunk::CHUNKS]) == [{}, {}]


def unknown_case() -> str:
    """Of an unknown name: one as it should be passes, one with a layer that mixes rows does not."""
    right, wrong = plain_model("llama"), plain_model("llama")
    for each in (right, wrong):
        each.config.model_type = "mine"
        sp.parallelize(each, torch.distributed.group.WORLD, context_parallel="auto")
    assert_trains_alike(plain_model("llama"), right, batch())
    wrong.model.layers[0].register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(RuntimeError) as caught:
        wrong(**batch())
    return str(caught.value)


def test_an_unknown_architecture_is_tried(world2: World) -> None:
    one, other = world2.run(unknown_case)
    assert one == other
    assert one.startswith("context_parallel: LlamaForCausalLM computes something else from shards of a sequence")
