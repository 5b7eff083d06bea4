"""Functions of listed parameters: value and gradient of the unsharded ones, whatever the parameter's cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

import seqpar_kernels as sp

from ..world import World
from .models import VOCAB, assert_same_gradients
from .test_dtensor_params import pair, whole

#: Of a parameter and a tensor like it.
LOSSES: dict[str, Callable[..., Any]] = {
    name: getattr(F, name) for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss")
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f"{n} {r}": lambda p, q, f=f, r=r: f(p, q, reduction=r).sum() for n, f in LOSSES.items()
       for r in ("mean", "sum", "none")},
    "weighted mse": lambda p, q: 2 * F.mse_loss(3 * p - 1, q * 0.5) + F.mse_loss(q, p * p),
    "poisson": lambda p, q: F.poisson_nll_loss(p, q.abs()),
    "gaussian": lambda p, q: F.gaussian_nll_loss(p, q, q * q + 1),
    "kl": lambda p, q: F.kl_div(p.log_softmax(-1), (q + p).softmax(-1), reduction="batchmean"),
    "bce": lambda p, q: F.binary_cross_entropy_with_logits(p, q.sigmoid()),
    "embedding": lambda p, q: F.hinge_embedding_loss(p, torch.ones_like(q)),
    "cosine": lambda p, q: F.cosine_similarity(p, q, dim=-1).sum(),
    "all cosine": lambda p, q: F.cosine_similarity(p.flatten(), (q + 0 * p).flatten(), dim=0),
    "distance": lambda p, q: F.pairwise_distance(p, q).sum(),
    "dot": lambda p, q: torch.dot(p.view(-1), (q + 0 * p).view(-1)),
    "dist": lambda p, q: torch.dist(p, q),
    "einsum": lambda p, q: torch.einsum("...i,...i->...", p, q).pow(2).sum(),
    "gram": lambda p, q: (p @ (q + 0 * p).T).pow(2).mean() if p.ndim == 2 else (p * q).mean(),
    "cat": lambda p, q: torch.cat([p, q]).pow(2).mean(),
    "stack": lambda p, q: torch.stack([p, q, p]).prod(0).sum(),
    "where": lambda p, q: torch.where(p > 0, p * p, q * p).sum(),
    "lerp": lambda p, q: torch.lerp(p, q, 0.3).pow(2).sum(),
    "maximum": lambda p, q: torch.maximum(p, q).sum() + torch.minimum(p, 2 * q).mean(),
    "scaled": lambda p, q: (p / p.norm() * q.mean() + p.sum() * p).square().sum(),
    "difference": lambda p, q: (p - q).norm() + (q - p).abs().mean(),
    "in place": lambda p, q: p.pow(2).sum().add_(1).mul_(q.mean()) * 1.0,
    "rows like": lambda p, q: (p[:2] * (q + p)[:2] + p[-2:]).pow(2).sum(),
}  # fmt: skip
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda p: p.norm(),
    **{f"norm {n}": lambda p, n=n: p.norm(n) for n in (0.5, 1, 2, 3, float("inf"))},
    **{f"torch.norm {n}": lambda p, n=n: torch.norm(p, p=n) for n in ("fro", 1, 2)},
    **{f"vector norm {n}": lambda p, n=n: torch.linalg.vector_norm(p, n) for n in (1, 2, 4, float("-inf"))},
    "norm of rows": lambda p: p.norm(dim=-1).sum(),
    "norm of columns": lambda p: torch.linalg.vector_norm(p, dim=0, keepdim=True).sum(),
    "linalg": lambda p: torch.linalg.norm(p),
    "spectral": lambda p: torch.linalg.matrix_norm(p, 2) if p.ndim == 2 else p.norm(),
    "nuclear": lambda p: torch.linalg.matrix_norm(p, "nuc") if p.ndim == 2 else p.norm(),
    "singular values": lambda p: torch.linalg.svdvals(p).sum() if p.ndim == 2 else p.sum(),
    "orthogonal": lambda p: (p @ p.mT - torch.eye(p.shape[0])).norm() if not isinstance(p, DTensor) and p.ndim == 2
        else (p @ p.mT - DTensor.from_local(torch.eye(p.shape[0]), p.device_mesh, [Replicate()])).norm() if p.ndim == 2
        else p.norm(),
    "logsumexp": lambda p: torch.logsumexp(p, -1).sum() + p.flatten().logsumexp(0),
    "var": lambda p: p.var() + p.std(dim=-1).sum() + torch.var_mean(p, dim=0)[1].square().sum(),
    "std": lambda p: torch.std(p, unbiased=False),
    "mean": lambda p: p.mean() + p.square().mean(-1).sum() + p.pow(2).mean(dim=0).sum().sqrt(),
    "sum": lambda p: p.sum(0).square().sum() + p.sum(-1, keepdim=True).square().sum() + p.sum(dtype=torch.float64),
    "by element": lambda p: (p.abs().add(1).log() + torch.exp(-p) + p.sigmoid() * p.tanh() / 2 - (1 - p) ** 2).sum(),
    "relu": lambda p: F.relu(p - 0.01).sum() + p.clamp(-0.01, 0.01).sum() + F.gelu(p).mean(),
    "softmax": lambda p: (F.softmax(p, -1) * p).sum() + F.log_softmax(p, 0).mean(),
    "cumsum": lambda p: p.cumsum(-1).square().mean(),
    "max": lambda p: p.max() - p.amin() + p.max(-1).values.sum() + p.amax(0).sum(),
    "topk": lambda p: p.flatten().topk(3).values.sum() + p.sort(-1).values[..., 0].sum(),
    "shape": lambda p: p.reshape(-1, 2).prod(-1).sum() + p.unflatten(0, (1, -1)).permute(-1, *range(p.ndim)).std(),
    "index": lambda p: p[1].square().sum() + p[..., -1].sum() + p.narrow(0, 1, 2).sum() + p.chunk(2)[1].square().sum(),
    "unbind": lambda p: sum(row.square().sum() * i for i, row in enumerate(p.unbind(0))),
    "transposed": lambda p: (p.T * p.T).sum() + (p.mT @ p).square().mean() if p.ndim == 2 else (p * p).sum(),
    "nested": lambda p: ((p.pow(2).sum() + 1).log() * p.norm() * p).sum() / (1 + p.abs().mean()),
    "half": lambda p: p.double().pow(2).sum() + p.to(torch.float64).mean(),
    "whole": lambda p: whole(p).pow(3).sum() + whole(p * p).sum() + whole(p[:2]).square().sum(),
    "sparsity": lambda p: (p.abs() > 0.02).to(p.dtype).mul(p).sum(),
}  # fmt: skip
KINDS = {"gpt2": ("c_attn.weight", "c_attn.bias", "c_proj.weight", "wte.weight", "ln_1.weight"),
         "llama": ("q_proj.weight", "o_proj.weight", "embed_tokens.weight", "norm.weight"),
         "phi3": ("qkv_proj.weight", "gate_up_proj.weight", "o_proj.weight")}  # fmt: skip


def close(got: Any, expected: Tensor, what: str) -> str | None:
    got, expected = (whole(t).detach().double() for t in (got, expected))
    error, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    return None if error <= 2e-5 * max(scale, 1e-3) else f"{what}: off by {error:.2g} of {scale:.2g}"


def functions_case(kind: str) -> None:
    models = pair(kind)
    listed = [dict(model.named_parameters()) for model in models]
    names = [next(n for n in listed[0] if n.endswith(end)) for end in KINDS[kind]]
    generator = torch.Generator().manual_seed(2)
    wrong: list[str] = []
    for name in names:
        plain, cut = (params[name] for params in listed)
        if not plain.any():  # biases
            plain.data = torch.randn(plain.shape, generator=generator)
            cut.data = plain.data
        other = torch.randn(plain.shape, generator=generator) / 10
        like = cut.detach().clone()
        like.copy_(DTensor.from_local(other, cut.device_mesh, [Replicate()]))
        if models[1]._seqpar.cuts[name].unequal:  # type: ignore[union-attr]
            like.to_local().copy_(models[1]._seqpar.cuts[name].part(other))  # type: ignore[union-attr]
        functions: dict[str, Any] = {n: (f, (plain,), (cut,)) for n, f in UNARY.items()}
        functions.update({n: (f, (plain, other), (cut, like)) for n, f in BINARY.items()})
        everywhere = DTensor.from_local(other, cut.device_mesh, [Replicate()])
        for n in ("mse_loss mean", "difference", "weighted mse", "maximum"):
            functions[f"{n}, replicated"] = (BINARY[n], (plain, other), (cut, everywhere))
        for what, (function, *arguments) in functions.items():
            plain.grad = cut.grad = None
            values = [function(*given) for given in arguments]
            whole(values[0]).backward()
            whole(values[1]).backward()
            for got, expected, label in ((values[1], values[0], "value"), (cut.grad, plain.grad, "gradient")):
                wrong += filter(None, [close(got, expected, f"{name} {what} {label}")])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_one_parameter(world2: World, kind: str) -> None:
    world2.run(functions_case, kind)


def mixed_case(kind: str) -> None:
    """Added to a plain loss as it is, in place, and through gradients that have gradients."""
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(6))
    models = pair(kind)
    for way in range(3):
        seen = []
        for model in models:
            model.zero_grad()
            params = [p for p in model.parameters() if p.ndim == 2][:3]
            loss = model(ids, labels=ids).loss
            if way == 0:
                loss = loss + 0.1 * sum(F.mse_loss(p, torch.ones_like(p)) for p in params)
            elif way == 1:
                for p in params:
                    loss += p.norm() * p.abs().mean()
            else:
                grads = torch.autograd.grad(sum(p.pow(4).sum() for p in params), params, create_graph=True)
                loss = loss + sum(g.square().sum() + (g @ g.mT).mean() for g in grads)
            loss.backward()
            seen.append(loss.item())
        assert abs(seen[0] - seen[1]) <= 1e-5 * abs(seen[0]), (way, seen)
        expected = {n: p.grad for n, p in models[0].named_parameters() if p.grad is not None}
        assert_same_gradients(sp.gather_full_gradients(models[1]), expected)
    param = next(p for p in models[1].parameters() if p.ndim == 2)
    with pytest.raises(ValueError, match=r"mul: a function of parameters .* got a plain tensor .* param.full_tensor"):
        param * torch.ones(param.shape)
    assert torch.zeros_like(param).placements == param.placements and param.size() == param.shape
    with torch.no_grad():
        plain = next(p for p in models[0].parameters() if p.ndim == 2)
        assert torch.equal(whole(param[1:3]), plain[1:3]) and torch.equal(whole(param.reshape(-1)), plain.reshape(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_beside_a_loss(world2: World, kind: str) -> None:
    world2.run(mixed_case, kind)
