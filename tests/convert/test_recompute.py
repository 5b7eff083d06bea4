"""Activation checkpointing of a converted model: same gradients, and no collective twice that is asked to be kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import seqpar_kernels as sp
from seqpar_kernels.comm.coordination import Coordination

from ..world import World
from .models import MODELS, VOCAB, assert_same_gradients, group


def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = op.namespace == "seqpar"
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


def through_checkpoint(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(functools.partial(forward, **kwargs), *args, **options)


def checkpointed(model: Any, **options: Any) -> None:
    """Each block's forward through torch.utils.checkpoint."""
    for block in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        block.forward = functools.partial(through_checkpoint, block.forward, options)


def run(model: nn.Module, ids: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients, and how many exchanges forward and backward took."""
    original, exchanges = Coordination.begin, 0

    def counted(*args: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return original(*args)

    Coordination.begin = counted  # type: ignore[method-assign]
    try:
        torch.manual_seed(5)
        model(ids, labels=ids, use_cache=False).loss.backward()
    finally:
        Coordination.begin = original  # type: ignore[method-assign]
    return sp.gather_full_gradients(model), exchanges


def recompute_case(kind: str) -> None:
    ids = torch.randint(VOCAB, (2, 9))
    found = {}
    ways: dict[str, dict[str, Any] | None] = {
        "none": None,
        "full": {"use_reentrant": False},
        "reentrant": {"use_reentrant": True},
        "selective": {
            "use_reentrant": False,
            "context_fn": functools.partial(create_selective_checkpoint_contexts, policy),
        },
    }
    for name, options in ways.items():
        model = sp.parallelize(MODELS[kind](), group(), loss_parallel=True).train()
        model(ids)  # the check's forward calls more than a forward does
        if options is not None:
            checkpointed(model, **options)
        found[name] = run(model, ids)
    for name in ("full", "reentrant", "selective"):
        assert_same_gradients(found[name][0], found["none"][0])
    assert found["full"][1] > found["none"][1]
    counts = {name: count for name, (_, count) in found.items()}
    assert found["selective"][1] <= found["none"][1], f"{counts}: what the policy keeps is not exchanged again"


@pytest.mark.parametrize("kind", MODELS)
def test_recompute(world2: World, kind: str) -> None:
    world2.run(recompute_case, kind)


def several_case(kind: str, reentrant: bool, lengths: tuple[int, int]) -> None:
    """Two forwards before one backward, and one without gradients behind them: each is recomputed as it was."""
    first, second = (torch.randint(VOCAB, (2, length)) for length in lengths)
    found = []
    for checkpointing in (False, True):
        model = sp.parallelize(MODELS[kind](), group(), loss_parallel=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        loss = model(first, labels=first).loss + 2 * model(second, labels=second).loss
        with torch.no_grad():
            model(second[:, :3])
        loss.backward()
        found.append(sp.gather_full_gradients(model))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("lengths", [(13, 16), (9, 11), (12, 9)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_several_forwards_before_a_backward(
    world2: World, kind: str, reentrant: bool, lengths: tuple[int, int]
) -> None:
    world2.run(several_case, kind, reentrant, lengths)
