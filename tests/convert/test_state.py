"""Listed parameters are DTensors: torch's own clipping, optimizers and checkpoints are right on a converted model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, VOCAB, assert_same_gradients, gpt2, group, llama

CASES = [("gpt2", False), ("gpt2", True), ("llama", True)]


def converted(kind: str, loss_parallel: bool, g: Any) -> nn.Module:
    return sp.parallelize(MODELS[kind](), g, loss_parallel=loss_parallel)


def both(kind: str, loss_parallel: bool) -> tuple[nn.Module, nn.Module]:
    return converted(kind, loss_parallel, group()), converted(kind, loss_parallel, None)


def backward(model: nn.Module, seed: int = 9) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(VOCAB, (2, 9))
    model(ids, labels=ids).loss.backward()


def clip_case(kind: str, loss_parallel: bool, norm_type: float) -> None:
    models = both(kind, loss_parallel)
    norms = []
    for model in models:
        backward(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)
    assert norms[0] > 0.05
    assert_same_gradients(*(sp.gather_full_gradients(model) for model in models))
    value = 1e-3
    for model in models:
        torch.nn.utils.clip_grad_value_(model.parameters(), value)
    assert_same_gradients(*(sp.gather_full_gradients(model) for model in models))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize(("kind", "loss_parallel"), CASES)
def test_clip_grad_norm(world: World, kind: str, loss_parallel: bool, norm_type: float) -> None:
    world.run(clip_case, kind, loss_parallel, norm_type)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "AdamW": {"lr": 1e-3, "amsgrad": True, "foreach": True},
    "Adam": {"lr": 1e-3, "fused": True},
    "Adagrad": {"lr": 1e-3},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"lr": 1e-3, "centered": True, "momentum": 0.5},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
    "Muon": {"lr": 1e-2},
}


def optimizer_case(name: str, options: dict[str, Any]) -> None:
    # LBFGS and Muon flatten: a DTensor says that it cannot where a vocabulary of 51 is cut.
    models = both("llama", name not in ("LBFGS", "Muon"))
    for model in models:
        # Muon takes matrices, and mixes rows: what it does to a part is not part of what it does to the whole.
        params = [p for p in model.parameters() if p.ndim == 2 or name != "Muon"]
        optimizer = getattr(torch.optim, name)(params, **options)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            torch.manual_seed(9)
            ids = torch.randint(VOCAB, (2, 9))
            loss = model(ids, labels=ids).loss
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    cut, whole = (sp.full_state_dict(model) for model in models)
    tolerance = 0.3 if name == "Muon" else 0.05  # Muon iterates in bfloat16
    start = MODELS["llama"]().state_dict()
    for key, expected in whole.items():
        moved = (expected - start[key]).abs().max()
        error = (cut[key] - expected).abs().max()
        assert error <= max(1e-5, tolerance * moved.item()), f"{key}: moved by {moved}, off by {error}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(world2: World, name: str) -> None:
    world2.run(optimizer_case, name, OPTIMIZERS[name])


def trained(kind: str, loss_parallel: bool, g: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = converted(kind, loss_parallel, g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in (1, 2):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """First moments, whole, through the same way that full_state_dict goes."""
    names = {id(param): name for name, param in model.named_parameters()}
    out = {}
    for param, entry in optimizer.state.items():
        value = entry["exp_avg"]
        cut = getattr(param, "cut", None)
        if cut is not None and cut.spec is not None:
            value = sp.nn.full_tensor(value.to_local(), cut.spec, group())
        out[names[id(param)]] = (value.to_local() if isinstance(value, DTensor) else value).clone()
    return out


def save_case(kind: str, loss_parallel: bool, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = trained(kind, loss_parallel, group())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"model": sp.sharded_state_dict(model), "optimizer": sp.sharded_optimizer_state_dict(model, optimizer)},
            checkpoint_id=folder,
        )
    return sp.full_state_dict(model), whole_optimizer_state(model, optimizer)


def load(kind: str, loss_parallel: bool, folder: str, g: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    model = converted(kind, loss_parallel, g)
    for param in model.parameters():
        param.detach().zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
    state = {"model": sp.sharded_state_dict(model), "optimizer": sp.sharded_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    sp.load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1e-2
    steps = {int(entry["step"]) for entry in optimizer.state.values()}
    assert len(steps) == 1
    result = sp.full_state_dict(model), whole_optimizer_state(model, optimizer), steps.pop()
    backward(model)
    optimizer.step()
    return result


def load_case(kind: str, loss_parallel: bool, folder: str) -> Any:
    return load(kind, loss_parallel, folder, group())


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("kind", "loss_parallel"), CASES)
def test_checkpoint_of_four_ranks_loads_on_two_and_on_one(
    world4: World, world2: World, tmp_path: Path, kind: str, loss_parallel: bool
) -> None:
    parameters, moments = world4.run(save_case, kind, loss_parallel, str(tmp_path))[0]
    for got in (
        *world2.run(load_case, kind, loss_parallel, str(tmp_path)),
        load(kind, loss_parallel, str(tmp_path), None),
    ):
        assert_identical(got[0], parameters)
        assert_identical(got[1], moments)
        assert got[2] == 2


def plain_checkpoint_case(kind: str, loss_parallel: bool, folder: str) -> None:
    g = group()
    model, _ = trained(kind, loss_parallel, g)
    full = sp.full_state_dict(model)
    if g.rank() == 0:
        model.save_pretrained(folder, state_dict=dict(full))  # which it empties
    torch.distributed.barrier()
    plain = type(model).from_pretrained(folder)
    assert_identical(dict(plain.state_dict()), full)
    other = converted(kind, loss_parallel, g)
    assert not other.load_state_dict(plain.state_dict()).missing_keys  # whole tensors, cut on the way
    assert_identical(sp.full_state_dict(other), full)
    third = converted(kind, loss_parallel, g)
    set_model_state_dict(third, get_model_state_dict(model))  # torch's own
    assert_identical(sp.full_state_dict(third), full)
    for key, value in model.state_dict().items():
        if isinstance(value, DTensor):
            assert torch.equal(value.full_tensor(), full[key]), key
    with pytest.raises(ValueError, match="assign: expected False"):
        other.load_state_dict(plain.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**plain.state_dict(), "lm_head.weight": torch.zeros(4, 32)})


@pytest.mark.parametrize(("kind", "loss_parallel"), CASES)
def test_plain_hugging_face_checkpoints(world2: World, tmp_path: Path, kind: str, loss_parallel: bool) -> None:
    world2.run(plain_checkpoint_case, kind, loss_parallel, str(tmp_path))


def listed_case() -> None:
    model = converted("gpt2", True, group())
    plain = gpt2()
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    listed = dict(model.named_parameters())
    weight = model.transformer.h[0].mlp.c_fc.weight
    param = listed["transformer.h.0.mlp.c_fc.weight"]
    assert isinstance(param, nn.Parameter) and isinstance(param, DTensor)
    assert type(weight) is nn.Parameter and weight.shape[1] == param.shape[1] // group().size()
    assert weight is model.transformer.h[0].mlp.c_fc.weight, "the modules' own parameter, each time"
    backward(model)
    assert param.grad.shape == param.shape and param.grad._local_tensor is weight.grad
    assert param.grad is param.grad
    torch.testing.assert_close(
        param.grad.full_tensor(), sp.gather_full_gradients(model)["transformer.h.0.mlp.c_fc.weight"]
    )
    param.grad = param.grad * 2
    assert param.grad._local_tensor is weight.grad
    model.zero_grad()
    assert weight.grad is None and param.grad is None
    with pytest.raises(ValueError, match="grad: expected a DTensor like the parameter"):
        param.grad = torch.zeros(3)
    param.requires_grad_(False)
    backward(model)
    assert weight.grad is None and not weight.requires_grad
    param.requires_grad = True
    seen = []
    param.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    backward(model)
    assert seen[0] is param
    ids = torch.randint(VOCAB, (2, 9))
    model.zero_grad()
    (direct,) = torch.autograd.grad(model.eval()(ids, labels=ids).loss, [param])
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(direct.to_local(), weight.grad)
    model.zero_grad()
    model.to(torch.float64)
    assert weight is model.transformer.h[0].mlp.c_fc.weight and weight.dtype == torch.float64
    fresh = dict(model.named_parameters())["transformer.h.0.mlp.c_fc.weight"]
    assert fresh.dtype == torch.float64 and fresh.to_local().data_ptr() == weight.data_ptr()
    with pytest.raises(RuntimeError, match=r"has been moved or cast since it was listed"):
        param.grad  # noqa: B018
    backward(model)
    assert fresh.grad.dtype == torch.float64
    with pytest.raises(RuntimeError, match="cannot be deep-copied"):
        copy.deepcopy(list(model.parameters()))
    compiled = torch.compile(llama(), backend="eager")
    assert all(type(p) is nn.Parameter for p in compiled.parameters())


def test_what_is_listed_and_what_is_computed_with(world2: World) -> None:
    world2.run(listed_case)


def undo_case(kind: str, loss_parallel: bool) -> None:
    before = MODELS[kind]()
    plain = {name: (type(module), set(vars(module))) for name, module in before.named_modules()}
    model, _ = trained(kind, loss_parallel, group())
    full = sp.full_state_dict(model)
    assert sp.unparallelize(model.eval()) is model
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == plain
    assert_identical(dict(model.state_dict()), full)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in before.named_parameters()]  # ties and order
    before.load_state_dict(full)
    ids = torch.randint(VOCAB, (2, 7))
    a, b = model(ids, labels=ids), before.eval()(ids, labels=ids)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    copy.deepcopy(model)
    sp.parallelize(model, group(), loss_parallel=loss_parallel)  # and again
    assert_identical(sp.full_state_dict(model), full)
    with pytest.raises(ValueError, match="has not been parallelized"):
        sp.unparallelize(before)


@pytest.mark.parametrize(("kind", "loss_parallel"), CASES)
def test_unparallelize(world2: World, kind: str, loss_parallel: bool) -> None:
    world2.run(undo_case, kind, loss_parallel)


def test_unparallelize_without_a_group() -> None:
    model = sp.unparallelize(converted("gpt2", True, None))
    assert_identical(dict(model.state_dict()), dict(gpt2().state_dict()))
    assert model.lm_head.weight is model.transformer.wte.weight


def kept_case() -> None:
    """What happened to buffers since conversion holds, and a hook's handle still takes it off."""
    model = llama()
    calls: list[str] = []
    handles = [m.register_forward_hook(lambda *_: calls.append("hook")) for m in (model, model.model.layers[0])]
    sp.parallelize(model, group())
    sp.unparallelize(model.to(torch.float64))
    plain = llama().to(torch.float64)
    assert_identical(dict(model.named_buffers()), dict(plain.named_buffers()))
    ids = torch.randint(VOCAB, (2, 7))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    model(ids)
    assert len(calls) == 2


def test_unparallelize_keeps_buffers_and_hooks(world2: World) -> None:
    world2.run(kept_case)
