"""Ranks that differ where they must be alike: an error on every rank that names what differs, or the right result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, VOCAB, gpt2, group, llama


@pytest.fixture(scope="module")
def world3() -> Iterator[World]:
    world = World(3)
    yield world
    world.close()


def tokens(seed: int, rows: int = 2) -> Tensor:
    return torch.randint(VOCAB, (rows, 8), generator=torch.Generator().manual_seed(seed))


def refused(call: Callable[[], Any], *parts: str) -> None:
    """On every rank, with all of ``parts`` in the message."""
    with pytest.raises(RuntimeError) as error:
        call()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, str(error.value))
    for text in every:
        assert all(part in text for part in parts), (parts, text)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor, shift: Tensor | None = None, cache: Tensor | None = None) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.norm(x) if shift is None else self.norm(x) + shift


PLAN = {
    "blocks.0": "scatter_input",
    "blocks.*.norm": "norm",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "norm": "norm+gather_output",
}


def own() -> Own:
    torch.manual_seed(1)
    return sp.parallelize(Own(), group(), PLAN)


def own_batch_case(kind: str, loss_parallel: bool) -> None:
    model = sp.parallelize(MODELS[kind](), group(), loss_parallel=loss_parallel)
    rank, ids = dist.get_rank(), tokens(0)
    where = type(model).__name__
    apart = tokens(rank)
    refused(lambda: model(input_ids=apart, labels=ids), where, "input_ids: other values on rank 1 than", "same batch")
    refused(lambda: model(input_ids=ids, labels=apart), "labels: other values on rank 1")
    swapped = ids.flip(0) if rank else ids  # the same rows in another order
    refused(lambda: model(swapped), "input_ids: other values on rank 1")
    mask = torch.ones_like(ids)
    mask[0, 0] = 1 - rank
    refused(lambda: model(ids, attention_mask=mask), "attention_mask: other values on rank 1")
    some = {"attention_mask": torch.ones_like(ids)} if rank else {}
    refused(lambda: model(ids, **some), "attention_mask: given on rank 1 alone")
    refused(lambda: model(tokens(0, 2 + rank)), "input_ids: int64 (2, 8) on rank 0, int64 (3, 8) on rank 1")
    model(input_ids=ids, labels=ids).loss.backward()  # and the right batch goes on


@pytest.mark.parametrize("loss_parallel", [False, True], ids=["", "loss_parallel"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_another_batch_is_refused_by_name(world2: World, kind: str, loss_parallel: bool) -> None:
    world2.run(own_batch_case, kind, loss_parallel)


def own_model_case() -> None:
    rank = dist.get_rank()
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(5))
    one_row = x.clone()
    one_row[1, 3, 5] += 1.0 if rank else 0.0
    refused(lambda: own()(one_row), "Own: ", "x: other values on rank", "1")
    nan = torch.full_like(x, float("nan"))
    assert own()(nan).isnan().all()  # is itself
    model = own()
    model(x, shift=torch.zeros(7, 12), cache=torch.full((3,), float(rank)))  # a rank's own
    rounded = x * (1.0 + rank * 1e-6)
    for _ in range(40):
        model(rounded)  # no other batch: other rounding
    refused(lambda: [model(x * (1.0 + rank)) for _ in range(17)], "x: other values on rank")
    block = own().blocks[0]  # called by itself
    refused(lambda: block(x + rank), "blocks.0: ", "x: other values on rank")


def test_float_batches_and_three_ranks(world3: World) -> None:
    world3.run(own_model_case)


def later_case() -> int:
    """Forwards until one that differed among others is noticed."""
    model = sp.parallelize(gpt2(), group()).eval()
    rank = dist.get_rank()
    for step in range(6):
        model(tokens(step))
    model(tokens(6 + rank))  # not compared at once
    error = ""
    for step in range(7, 100):
        try:
            model(tokens(step))
        except RuntimeError as found:
            error = str(found)
            break
    assert "input_ids: other values on rank 1" in error and "one of the last forwards" in error
    return step - 6


def test_a_single_forward_is_noticed_later(world2: World) -> None:
    found = world2.run(later_case)
    assert found[0] == found[1] <= 16


def outside_case() -> None:
    """Labels and loss outside of the model."""
    model = sp.parallelize(llama(), group())
    ids, apart = tokens(0), tokens(dist.get_rank())

    def step(labels: Tensor) -> None:
        nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).backward()

    step(ids)
    step(ids)
    refused(lambda: [step(apart) for _ in range(17)], "the gradient at the output of model.norm", "labels and loss")


def test_labels_outside_the_model(world2: World) -> None:
    world2.run(outside_case)


def seeds_case() -> None:
    ids, rank = tokens(0), dist.get_rank()
    for options in ({"resid_pdrop": 0.1, "embd_pdrop": 0.0}, {"resid_pdrop": 0.0, "embd_pdrop": 0.1}):
        model = sp.parallelize(gpt2(**options), group()).train()
        torch.manual_seed(rank)
        refused(lambda model=model: model(ids), "the random generator", "rank 1", "torch.manual_seed")  # type: ignore[misc]
        torch.manual_seed(0)
        for _ in range(3):
            model(ids)
    torch.manual_seed(rank)
    sp.parallelize(gpt2(resid_pdrop=0.0, embd_pdrop=0.0), group()).train()(ids)  # nothing is drawn


def test_dropout_seeds_apart(world2: World) -> None:
    world2.run(seeds_case)


def initialised_case(kind: str, loss_parallel: bool) -> None:
    def reset(model: nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    def by_type(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
            nn.init.xavier_normal_(module.weight)  # type: ignore[arg-type]

    def by_attribute(module: nn.Module) -> None:
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            nn.init.trunc_normal_(weight, std=0.3)

    def by_owner(module: nn.Module) -> None:
        for child in module.children():
            if "weight" in child._parameters:
                child.weight.data.normal_(0, 0.3)

    def listed(model: nn.Module) -> None:
        for param in model.parameters():
            if param.dim() > 1:
                nn.init.kaiming_uniform_(param)

    ways: list[Callable[[Any], Any]] = [
        lambda model: model.apply(model._init_weights),
        lambda model: model.apply(by_type),
        lambda model: model.apply(by_attribute),
        lambda model: model.apply(by_owner),
        listed,
    ]
    if kind == "llama":  # Conv1D has no reset_parameters
        ways.append(reset)
    for way in ways:
        whole, model = MODELS[kind](), sp.parallelize(MODELS[kind](), group(), loss_parallel=loss_parallel)
        before = sp.full_state_dict(model)
        results = []
        for each in (whole, model):
            torch.manual_seed(7)
            way(each)
        results = sp.full_state_dict(model)
        expected = whole.state_dict()
        assert any(not torch.equal(before[name], value) for name, value in expected.items())
        for name, value in expected.items():
            assert torch.equal(results[name], value), name
        model(tokens(0))


@pytest.mark.parametrize("loss_parallel", [False, True], ids=["", "loss_parallel"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_initialised_after_conversion_as_before(world2: World, kind: str, loss_parallel: bool) -> None:
    world2.run(initialised_case, kind, loss_parallel)


def data_case() -> None:
    """By other doors than a parameter itself, before and after a forward."""
    ways: list[Callable[[Tensor], Any]] = [
        lambda p: p.data.normal_(0, 0.02),
        lambda p: p.detach().uniform_(-0.1, 0.1),
        lambda p: nn.init.xavier_uniform_(p.data),
        torch.no_grad()(lambda p: p.add_(torch.randn_like(p), alpha=0.02)),
        torch.no_grad()(lambda p: p.data.mul_((torch.rand_like(p.data) > 0.5).to(p.dtype))),
    ]
    for first in (False, True):
        for way in ways:
            whole, model = llama(), sp.parallelize(llama(), group())
            if first:
                model(tokens(0))
            for each in (whole, model):
                torch.manual_seed(7)
                for param in each.parameters():
                    if param.dim() > 1:
                        way(param)
            results = sp.full_state_dict(model)
            for name, value in whole.state_dict().items():
                assert torch.equal(results[name], value), name
            model(tokens(1))
        with pytest.raises(RuntimeError, match="trunc_normal_: takes no listed parameter"):
            nn.init.trunc_normal_(dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].data)


def test_data_is_initialised_as_a_whole(world2: World) -> None:
    world2.run(data_case)


def by_name_case() -> None:
    """What no torch function sees is noticed by the next forward, or the next comparison."""
    for steps in (1, 4):
        for by_data in (False, True):
            model: Any = sp.parallelize(llama(), group())
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            for step in range(steps):
                model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
                optimizer.step()
            weight = model.model.layers[0].mlp.up_proj.weight
            torch.manual_seed(5)
            nn.init.normal_(weight.data if by_data else weight, 0, 0.02)
            forwards = 32 if by_data else 1
            refused(lambda m=model, n=forwards: [m(tokens(9)) for _ in range(n)], "up_proj.weight", "same values")  # type: ignore[misc]
    for step in range(20):  # right: initialised as a whole, and stepped
        if step == 3:
            model = sp.parallelize(llama(), group())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        if step > 3:
            model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
            optimizer.step()
            model.model.layers[0].mlp.up_proj.reset_parameters()


def test_initialised_by_name_is_noticed(world2: World) -> None:
    world2.run(by_name_case)


class Buffered(Own):
    """A table that all ranks share, and statistics of the features that this rank has."""

    def __init__(self, seed: int):
        super().__init__()
        self.register_buffer("table", torch.randn(7, generator=torch.Generator().manual_seed(seed)), persistent=False)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        for block in self.blocks:
            block.register_buffer("largest", torch.zeros(()))


def buffers_case() -> None:
    torch.manual_seed(1)
    x, rank = torch.randn(2, 7, 12), dist.get_rank()
    torch.manual_seed(1)
    refused(lambda: sp.parallelize(Buffered(rank), group(), PLAN), "weights and buffers", "alike")
    torch.manual_seed(1)
    model: Any = sp.parallelize(Buffered(0), group(), PLAN)
    for block in model.blocks:  # as its own forward would
        block.up.register_forward_hook(
            lambda m, args, out, b=block: b.largest.copy_(out.detach().max() * 3**rank) and None
        )
    for _ in range(40):
        model(x)  # statistics are a rank's own
    model.table.mul_(1 - 2 * rank)
    refused(lambda: [model(x) for _ in range(32)], "table: the ranks", "buffers")


def test_buffers_apart(world2: World) -> None:
    world2.run(buffers_case)


def wrongly_initialised_case() -> None:
    ids, rank = tokens(0), dist.get_rank()
    model: Any = sp.parallelize(llama(), group())
    torch.manual_seed(0)
    nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)  # by hand: every rank draws the same part
    refused(lambda: model(ids), "model.layers.1.mlp.up_proj.weight", "same values", "reset_parameters()")
    with pytest.raises(RuntimeError, match=r"torch.nn.init.orthogonal_: takes no listed parameter"):
        nn.init.orthogonal_(dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"])
    model = sp.parallelize(llama(), group())
    with pytest.raises(RuntimeError, match=r"Linear.weight: the function computes with the old values"):
        model.apply(lambda m: isinstance(m, nn.Linear) and m.weight.data.div_(m.weight.norm()))
    model = sp.parallelize(llama(), group())
    for step in range(3):
        model(tokens(step))
    torch.manual_seed(rank)
    nn.init.normal_(model.model.embed_tokens.weight)  # replicated
    refused(lambda: model(ids), "model.embed_tokens.weight: the ranks", "alike")  # at once: no optimizer wrote it
    model = sp.parallelize(llama(), group())
    model.model.norm.weight.data.mul_(1 + rank)
    refused(lambda: model(ids), "model.norm.weight: the ranks", "alike", "load_state_dict")


def test_parameters_apart_are_noticed(world2: World) -> None:
    world2.run(wrongly_initialised_case)


def right_case() -> None:
    """What may differ, or be done in between."""
    model: Any = sp.parallelize(llama(), group())
    seen: list[nn.Module] = []
    assert model.apply(seen.append) is model and model.model.layers[0].mlp.up_proj in seen
    for step in range(20):  # checkpointed around the model: its forward is repeated in the backward
        ids = tokens(step)
        checkpoint(lambda ids=ids: model(ids, labels=ids).loss, use_reentrant=False).backward()
        if step % 3 == 0:
            with torch.no_grad():
                model.eval()(ids)
            model.train()
    with torch.inference_mode():
        model.eval()(tokens(0))
    model(tokens(0))
    model.model(tokens(1))  # the decoder by itself
    apart = tokens(dist.get_rank())
    refused(lambda: [model.model(apart) for _ in range(17)], "model: ", "input_ids: other values on rank 1")


def test_right_use_goes_on(world2: World) -> None:
    world2.run(right_case)


def switched_off_case() -> None:
    os.environ["SEQPAR_COMPARE_RANKS"] = "0"
    try:
        model = sp.parallelize(gpt2(), group())
    finally:
        del os.environ["SEQPAR_COMPARE_RANKS"]
    model(tokens(dist.get_rank()))
    if dist.get_rank() == 0:
        os.environ["SEQPAR_COMPARE_RANKS"] = "0"
    try:
        refused(lambda: sp.parallelize(gpt2(), group()), "SEQPAR_COMPARE_RANKS=0")
    finally:
        os.environ.pop("SEQPAR_COMPARE_RANKS", None)


def test_switched_off_on_all_ranks_only(world2: World) -> None:
    world2.run(switched_off_case)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_no_group_under_a_launcher(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "2")
    expected = rf"got None in one of 2 processes \({variable}, .*Call init_process_group first"
    for missing in (None, dist.group.WORLD):
        with pytest.raises(RuntimeError, match=expected):
            sp.parallelize(gpt2(), missing)
    monkeypatch.setenv(variable, "1")
    sp.parallelize(gpt2(), None)(tokens(0))


def called_apart_case() -> None:
    """One rank refuses its arguments, so that it has called once more than the other; the group goes on."""
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="engine: expected one of"):
            sp.parallelize(gpt2(), group(), engine="none")
    heard = r"rank 0 refused its arguments|the ranks will not meet"
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError, match=heard):
            sp.parallelize(gpt2(), group())
    sp.parallelize(gpt2(), group())(tokens(0))


def test_parallelize_goes_on_after_a_call_of_one_rank(world2: World) -> None:
    world2.run(called_apart_case)
