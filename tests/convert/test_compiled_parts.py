"""Blocks compiled by themselves, and whole models that were changed before torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import seqpar_kernels as sp

from ..world import World
from .models import assert_same_gradients, group, llama

IDS = torch.randint(3, 11, (2, 9), generator=torch.Generator().manual_seed(7))


def step(model: Any) -> float:
    model.zero_grad()
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item()


def in_place(model: Any, backend: Any) -> None:
    for block in model.model.layers:
        block.compile(backend=backend)


def wrapped(model: Any, backend: Any) -> None:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend=backend)


def blocks_case(compile_blocks: Callable[[Any, Any], None], when: str) -> None:
    plain, model = llama(), llama()
    expected = step(plain)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    backend = CompileCounterWithBackend("aot_eager")
    if when == "before":
        compile_blocks(model, backend)
    model = sp.parallelize(model, group())
    if when == "after":
        compile_blocks(model, backend)
    if when == "later":
        step(model)
        compile_blocks(model, backend)
    for _ in range(3):
        torch.testing.assert_close(step(model), expected, rtol=1e-5, atol=0.0)
    assert backend.frame_count > 0
    found = {name.replace("._orig_mod", ""): g for name, g in sp.gather_full_gradients(model).items()}
    assert_same_gradients(found, gradients)


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("compile_blocks", [in_place, wrapped])
def test_blocks_are_compiled_by_themselves(world2: World, compile_blocks: Any, when: str) -> None:
    world2.run(blocks_case, compile_blocks, when)


def steered(model: Any) -> Tensor:
    vector = torch.linspace(-0.1, 0.1, 32).requires_grad_()
    model.model.layers[0].register_forward_hook(lambda m, args, out: out + vector)
    return vector


def doubled(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda m, args, out: out * 2)


def changed_case(first: bool) -> None:
    model = sp.parallelize(llama(), group())
    if first:
        step(model)
    steered(model)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"model\.layers\.0: a module, a hook or a forward has been added"):
        step(compiled)
    with pytest.raises(RuntimeError, match=r"model\.layers\.0: a sequence shard meets a trainable tensor"):
        step(model)


def right_case() -> None:
    """What computes with nothing that is trained takes one eager forward."""
    plain, model = llama(), sp.parallelize(llama(), group())
    doubled(plain)
    doubled(model)
    expected = step(plain)
    step(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(step(compiled), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("first", [False, True], ids=["at once", "after a forward"])
def test_what_was_added_is_refused_under_compile_too(world2: World, first: bool) -> None:
    world2.run(changed_case, first)


def test_an_eager_forward_admits_what_is_right(world2: World) -> None:
    world2.run(right_case)
