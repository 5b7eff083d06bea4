"""Optimizers, clipping and vectors of parameters: as unsharded, or refused in one sentence on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
    parameters_to_vector,
    vector_to_parameters,
)

import seqpar_kernels as sp

from ..world import World
from .models import VOCAB, assert_same_gradients, group, llama, transformers
from .test_dtensor_params import pair, whole
from .test_state import assert_identical

IDS = (torch.arange(26).view(2, 13) * 7) % VOCAB

RIGHT: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD fused": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "SGD foreach": lambda p: optim.SGD(p, 0.1, momentum=0.9, dampening=0.1, foreach=True),
    "Adam fused": lambda p: optim.Adam(p, 1e-3, amsgrad=True, fused=True),
    "AdamW fused": lambda p: optim.AdamW(p, 1e-3, fused=True),
    "AdamW tensor rate": lambda p: optim.AdamW(p, torch.tensor(1e-3), maximize=True),
    "Adagrad": lambda p: optim.Adagrad(p, 1e-3, lr_decay=0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, 1e-3, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p, foreach=True),
    "Adamax": lambda p: optim.Adamax(p, foreach=True),
    "ASGD": lambda p: optim.ASGD(p, foreach=True),
    "NAdam": lambda p: optim.NAdam(p, momentum_decay=0.01, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, 1e-3, centered=True, momentum=0.5, foreach=True),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "Adafactor": (lambda p: optim.Adafactor(p), "Adafactor averages rows and columns"),
    "Adafactor of Transformers": (lambda p: transformers.optimization.Adafactor(p), "Adafactor averages rows"),
    "Rprop": (lambda p: optim.Rprop(p), "Rprop writes by a mask"),
    "LBFGS": (lambda p: optim.LBFGS(p), "LBFGS puts all gradients in one vector"),
}


def losses(model: nn.Module) -> Tensor:
    return model(IDS, labels=IDS).loss  # type: ignore[no-any-return]


def steps_case(kind: str) -> None:
    wrong = []
    for name, make in RIGHT.items():
        models = pair(kind)
        start = {n: p.detach().clone() for n, p in models[0].named_parameters()}
        for model in models:
            optimizer = make(list(model.parameters()))
            for _ in range(3):
                optimizer.zero_grad()
                losses(model).backward()
                optimizer.step()
        cut = sp.full_state_dict(models[1])
        for key, expected in models[0].named_parameters():
            moved = (expected - start[key]).abs().max().item()
            error = (cut[key] - expected).abs().max().item()
            if not moved > 0 or error > max(1e-6, 0.03 * moved):
                wrong.append(f"{name} {key}: moved by {moved:.2g}, off by {error:.2g}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_steps_are_the_unsharded_steps(world2: World, kind: str) -> None:
    world2.run(steps_case, kind)


def matrices_case(kind: str) -> None:
    """Muon mixes rows. Gradients of full rank: it turns what rounding leaves of a missing one into whole directions."""
    models = pair(kind)
    for model in models:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        generator = torch.Generator().manual_seed(3)
        conversion = getattr(model, "_seqpar", None)
        names = [n for n, p in model.named_parameters() if p.ndim == 2]
        for name, param in zip(names, matrices, strict=True):
            grad = torch.randn(param.shape, generator=generator)
            if conversion is not None:
                cut = conversion.cuts[name]
                param.grad = param.detach().clone()
                param.grad.to_local().copy_(grad if cut.spec is None else cut.part(grad))
            else:
                param.grad = grad
        optim.Muon(matrices, lr=1e-2, weight_decay=0.0).step()
    start = dict(pair(kind)[0].named_parameters())
    cut = sp.full_state_dict(models[1])
    for key, expected in models[0].named_parameters():
        if expected.ndim == 2:
            update = expected - start[key]
            error = (cut[key] - expected).norm() / update.norm()  # in bfloat16; of other rows 1.4
            assert error < 0.1, f"{key}: off by {error} of its update"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3"])
def test_muon(world2: World, kind: str) -> None:
    world2.run(matrices_case, kind)


def refused_case(kind: str) -> None:
    for make, message in REFUSED.values():
        model = pair(kind)[1]
        optimizer = make(model.parameters())

        def closure(model: nn.Module = model) -> Tensor:
            loss = losses(model)
            loss.backward()
            return loss

        before = sp.full_state_dict(model)
        closure()
        for _ in range(2):
            with pytest.raises(ValueError, match=f"optimizer: {message}"):
                optimizer.step(closure)
        assert_identical(sp.full_state_dict(model), before)
    plain = torch.nn.Linear(3, 3)  # everybody else's are none of our business
    plain(torch.ones(3)).sum().backward()
    optim.Rprop(plain.parameters()).step()
    with pytest.raises(ValueError, match=r"resize_token_embeddings: .* resize first, then parallelize"):
        model.resize_token_embeddings(60)
    assert model.resize_token_embeddings() is model.get_input_embeddings()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_cannot_be_right_is_refused(world2: World, kind: str) -> None:
    world2.run(refused_case, kind)


def clip_case() -> None:
    """A vocabulary of which the last of four ranks holds nothing."""
    ids = IDS % 5
    plain, model = llama(vocab_size=5), sp.parallelize(llama(vocab_size=5), group(), loss_parallel=True)
    assert (model.lm_head.weight.numel() == 0) == (dist.get_rank() == 3)
    for order in (1.0, 2.0, 3.0, float("inf"), float("-inf")):
        for foreach in (None, True, False):
            norms = []
            for one in (plain, model):
                one.zero_grad()
                one(ids, labels=ids).loss.backward()
                norms.append(whole(clip_grad_norm_(one.parameters(), 0.02, order, foreach=foreach)))
                grads = [p.grad for p in one.parameters()]
                total = get_total_norm(grads, order, foreach=foreach)
                clip_grads_with_norm_(one.parameters(), 0.01, total, foreach=foreach)
                clip_grad_value_(one.parameters(), 1e-3, foreach=foreach)
            torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=1e-9)
            expected = {n: p.grad for n, p in plain.named_parameters()}
            assert_same_gradients(sp.gather_full_gradients(model), expected)
    if dist.get_rank() == 1:
        grad = model.model.layers[0].self_attn.q_proj.weight.grad
        grad[0, 0] = float("inf")
    for order in (2.0, float("inf")):
        with pytest.raises(RuntimeError, match=r"total norm of order .* is non-finite"):
            clip_grad_norm_(model.parameters(), 1.0, order, error_if_nonfinite=True)


def test_clipping_where_a_rank_holds_nothing(world4: World) -> None:
    world4.run(clip_case)


def vector_case(kind: str, grad: bool) -> None:
    plain, model = pair(kind)
    with torch.set_grad_enabled(grad):
        expected, got = (parameters_to_vector(one.parameters()) for one in (plain, model))
        assert isinstance(got, DTensor)
        assert torch.equal(whole(got), expected)
    if grad:
        for vector in (expected, got):
            (whole(vector) * torch.arange(len(expected))).sum().backward()
        assert_same_gradients(sp.gather_full_gradients(model), {n: p.grad for n, p in plain.named_parameters()})
    for new in (2 * got.detach(), 3 * whole(got).detach()):  # a DTensor, a plain tensor
        vector_to_parameters(new, model.parameters())
        vector_to_parameters(whole(new), plain.parameters())
        assert_identical(sp.full_state_dict(model), dict(plain.state_dict()))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_vectors_of_parameters(world2: World, kind: str, grad: bool) -> None:
    world2.run(vector_case, kind, grad)
