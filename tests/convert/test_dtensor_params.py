"""What training code does to listed parameters besides stepping: penalties, averages, swaps, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

import seqpar_kernels as sp

from ..world import World
from .models import MODELS, VOCAB, assert_same_gradients, group
from .test_pretrained import phi3
from .test_state import assert_identical

KINDS = {"gpt2": (MODELS["gpt2"], True), "llama": (MODELS["llama"], True), "phi3": (phi3, False)}
OFF = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0}}


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """The plain model and the converted one, no dropout."""
    make, loss_parallel = KINDS[kind]
    plain, model = (make(**OFF.get(kind, {})) for _ in range(2))
    return plain, sp.parallelize(model, group(), loss_parallel=loss_parallel)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda p: p.pow(2).sum(),
    "norm": torch.linalg.vector_norm,
    "transposed": lambda p: (p.T * p.T).sum(),
    "rows": lambda p: ((p * p).sum(-1) + 1).sqrt().sum(),
    "whole": lambda p: whole(p).pow(3).sum(),
    "replicated": lambda p: (
        p.redistribute(placements=[Replicate()]).to_local() if isinstance(p, DTensor) else p
    ).exp().sum(),
}  # fmt: skip


def penalty_case(kind: str, name: str) -> None:
    ids = torch.randint(VOCAB, (2, 9))
    models = pair(kind)
    direct = []
    for model in models:
        params = list(model.parameters())
        params[2].requires_grad_(False)
        penalty = whole(sum(map(PENALTIES[name], params)))  # type: ignore[arg-type]
        direct.append(torch.autograd.grad(penalty, params[1], retain_graph=True)[0])
        (model(ids, labels=ids).loss + 0.1 * penalty).backward()
    expected = {n: p.grad for n, p in models[0].named_parameters() if p.grad is not None}
    assert_same_gradients(sp.gather_full_gradients(models[1]), expected)
    cut = models[1]._seqpar.cuts[list(dict(models[1].named_parameters()))[1]]  # type: ignore[union-attr]
    part = direct[1].to_local()
    torch.testing.assert_close(part, direct[0] if cut.spec is None else cut.part(direct[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_listed_parameters_has_its_gradient(world2: World, kind: str, name: str) -> None:
    world2.run(penalty_case, kind, name)


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_ones(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ctx.shape)


def function_case() -> None:
    _, model = pair("llama")
    param = next(model.parameters())
    with pytest.raises(RuntimeError, match=r"its gradient would be lost: give it param.to_local\(\)"):
        Sum.apply(param).backward()
    Sum.apply(param.to_local()).backward()
    assert param.grad is not None and param.grad.to_local().eq(1).all()


def test_an_autograd_function_does_not_lose_the_gradient(world2: World) -> None:
    world2.run(function_case)


def swap_case(kind: str) -> None:
    """The usual way of evaluating averaged weights."""
    ids = torch.randint(VOCAB, (2, 9))
    plain, model = pair(kind)
    with torch.no_grad():
        before = model(ids).logits
        shadow = {name: param.data.clone() * 2 for name, param in model.named_parameters()}
        backup = {}
        for name, param in model.named_parameters():
            backup[name] = param.data
            param.data = shadow[name]
        for param in plain.parameters():
            param.mul_(2)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        assert_identical(sp.full_state_dict(model), dict(plain.state_dict()))
        for name, param in model.named_parameters():
            param.data = backup[name]
        assert torch.equal(model(ids).logits, before)
        with pytest.raises(ValueError, match="data: expected a DTensor like the parameter"):
            param.data = torch.zeros(3)
        with pytest.raises(ValueError, match=r"float64 on cpu; change dtype and device with model.to"):
            param.data = param.data.double()


@pytest.mark.parametrize("kind", KINDS)
def test_data_can_be_swapped(world2: World, kind: str) -> None:
    world2.run(swap_case, kind)


def copy_case(kind: str) -> None:
    _, model = pair(kind)
    full = sp.full_state_dict(model)
    best = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.detach().zero_()
    for name, tensor in best.items():
        assert torch.equal(whole(tensor), full[name]), name
    model.load_state_dict(best)
    assert_identical(sp.full_state_dict(model), full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_can_be_deep_copied(world2: World, kind: str) -> None:
    world2.run(copy_case, kind)


def stepped_case(form: str) -> None:
    """A step between forward and backward changes the weights that the backward needs: torch's own error.

    torch's fused steps of plain tensors are not counted, so the plain model would have wrong gradients there.
    """
    ids = torch.randint(VOCAB, (2, 9))
    for model in pair("llama")[form == "fused" :]:
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=0.1, **({} if form == "one by one" else {form: True}))
        model(ids, labels=ids).loss.backward()
        loss = model(ids, labels=ids).loss
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = model(ids, labels=ids).loss
        params[0].data.mul_(1.0)  # which autograd does not count, unsharded neither
        loss.backward()


@pytest.mark.parametrize("form", ["one by one", "foreach", "fused"])
def test_a_step_between_forward_and_backward_is_an_error(world2: World, form: str) -> None:
    world2.run(stepped_case, form)


def inputs_case() -> None:
    """``backward(inputs=...)``: gradients of those alone."""
    ids = torch.randint(VOCAB, (2, 9))
    plain, model = pair("llama")
    expected = {}
    for m in (plain, model):
        wanted = list(m.parameters())[1:3]
        m(ids, labels=ids).loss.backward(inputs=wanted)
        torch.autograd.backward([(p * p).sum() for p in wanted], inputs=wanted[0])
        given = [name for name, param in m.named_parameters() if param.grad is not None]
        assert len(given) == 2, given
        expected = expected or {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
    assert_same_gradients(sp.gather_full_gradients(model), expected)


def test_backward_takes_listed_parameters_as_inputs(world2: World) -> None:
    world2.run(inputs_case)
