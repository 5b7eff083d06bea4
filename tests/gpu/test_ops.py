"""The ops between ranks on a CUDA device, over virtual ranks: outputs and gradients against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm.loopback import Loopback

from ..oracle import assert_within_budget

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
S, B, H, INNER, VOCABULARY = 131, 2, 96, 160, 203
SEQUENCE, FEATURES, WHOLE = 1, -1, None

#: name -> (whole tensor, the dimension along which ranks have parts of it: of a weight its rows or columns)
Made = dict[str, tuple[Tensor, int | None]]
Function = Callable[..., Sequence[Tensor]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


IDS = torch.randint(VOCABULARY, (B, S), generator=torch.Generator().manual_seed(7))
RESIDUAL = random(B, S, H, seed=5)


def made(op: str) -> Made:
    """What ``op`` is differentiated by."""
    x, wide = random(B, S, H, seed=1), random(B, S, INNER, seed=2)
    up, down = random(INNER, H, seed=3) / H**0.5, random(H, INNER, seed=4) / INNER**0.5
    table = random(VOCABULARY, H, seed=6) / H**0.5
    bias, gamma = random(H, seed=8), 1 + random(H, seed=9) / 4
    return {
        "all_gather_linear": {"x": (x, SEQUENCE), "weight": (up, 0)},
        "linear_reduce_scatter": {"x": (wide, FEATURES), "weight": (down, 1)},
        "norm after the sum": {"x": (wide, FEATURES), "weight": (down, 1), "bias": (bias, WHOLE), "g": (gamma, WHOLE)},
        "embedding": {"weight": (table, 0)},
        "loss": {"x": (x, SEQUENCE), "weight": (table, 0)},
        "loss of logits": {"logits": (random(B, S, VOCABULARY, seed=10), FEATURES)},
    }[op]


def ours(op: str, g: dist.ProcessGroup | None, residual: Tensor, ids: Tensor) -> Function:
    """[B, S/t, ...] or [..., features/t] in, likewise out."""
    common: dict[str, Any] = {"group": g}
    vocabulary = {**common, "vocab_size": VOCABULARY}
    fused = {**common, "residual": residual, "norm": "rms", "p": 0.3, "seed": 11}
    functions: dict[str, Function] = {
        "all_gather_linear": lambda x, weight: [
            sp.all_gather_linear(x, weight, seq_len=S if g else None, chunks=2 if g else None, **common)
        ],
        "linear_reduce_scatter": lambda x, weight: [
            sp.linear_reduce_scatter(x, weight, chunks=2 if g else None, **common)
        ],
        "norm after the sum": lambda x, weight, bias, g: sp.linear_reduce_scatter_dropout_add_norm(
            x, weight, bias, norm_weight=g, **fused
        ),
        "embedding": lambda weight: [sp.vocab_parallel_embedding(ids, weight, seq_dim=SEQUENCE, **vocabulary)],
        "loss": lambda x, weight: [sp.vocab_parallel_linear_cross_entropy(x, weight, ids, **vocabulary)],
        "loss of logits": lambda logits: [sp.vocab_parallel_cross_entropy(logits, ids, **vocabulary)],
    }
    return functions[op]


def plain(op: str, residual: Tensor, ids: Tensor) -> Function:
    def normed(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> Sequence[Tensor]:
        options: dict[str, Any] = {"p": 0.3, "seed": 11, "prenorm": True, "backend": "reference"}
        return sp.dropout_add_rms_norm(F.linear(x, weight), residual, g, x_bias=bias, **options)  # type: ignore[no-any-return]

    def loss(logits: Tensor) -> Sequence[Tensor]:
        return [
            F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), ids.flatten())
        ]

    functions: dict[str, Function] = {
        "all_gather_linear": lambda x, weight: [F.linear(x, weight)],
        "linear_reduce_scatter": lambda x, weight: [F.linear(x, weight)],
        "norm after the sum": normed,
        "embedding": lambda weight: [F.embedding(ids, weight)],
        "loss": lambda x, weight: loss(F.linear(x, weight)),
        "loss of logits": loss,
    }
    return functions[op]


#: Along which dimension ranks have parts of the outputs; of none of a loss.
OUTPUT_CUTS = {"all_gather_linear": FEATURES, "loss": WHOLE, "loss of logits": WHOLE}


def cut(t: Tensor, dim: int | None, g: dist.ProcessGroup) -> Tensor:
    if dim is WHOLE:
        return t
    # As ops cut: a sequence like tensor_split, features and vocabularies like chunk.
    parts = t.tensor_split(g.size(), dim) if dim == SEQUENCE and t.shape[dim] == S else t.chunk(g.size(), dim)
    return parts[g.rank()]


def differentiated(fn: Function, leaves: list[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outs = fn(*leaves)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, [d.to(outs[0].dtype) for d in douts])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "op",
    ["all_gather_linear", "linear_reduce_scatter", "norm after the sum", "embedding", "loss", "loss of logits"],
)
def test_error_is_within_budget(op: str, ranks: int, dtype: torch.dtype) -> None:
    """Of every rank's part; the reference is unsharded, in the same dtype on the same device."""
    given = {name: (t.to(dtype), dim) for name, (t, dim) in made(op).items()}
    ids, residual = IDS.to(DEVICE), RESIDUAL.to(dtype)
    expected: list[list[Tensor]] = []
    douts: list[Tensor] = []
    for wide in (dtype, torch.float64):
        leaves = [t.to(DEVICE, wide) for t, _ in given.values()]
        fn = plain(op, residual.to(DEVICE, wide), ids)
        if not douts:
            douts = [random(*out.shape, seed=20 + i).to(DEVICE, dtype) for i, out in enumerate(fn(*leaves))]
        expected.append(differentiated(fn, leaves, [d.to(wide) for d in douts]))
    reference, oracle = expected
    dims = [OUTPUT_CUTS.get(op, SEQUENCE)] * len(douts) + [dim for _, dim in given.values()]

    def on_rank(g: dist.ProcessGroup) -> list[Tensor]:
        leaves = [cut(t, dim, g).to(DEVICE) for t, dim in given.values()]
        fn = ours(op, g, cut(residual, SEQUENCE, g).to(DEVICE), ids)
        return differentiated(fn, leaves, [cut(d, dim, g) for d, dim in zip(douts, dims, strict=False)])

    with Loopback(ranks, DEVICE) as loopback:
        found = loopback.run(on_rank)
        magnitude = max(float(t.abs().max()) for t, _ in given.values())
        for group, got in zip(loopback.groups, found, strict=True):
            for i, tensor in enumerate(got):
                whole = [cut(t[i], dims[i], group) for t in (reference, oracle)]
                assert_within_budget(tensor, *whole, f"rank {group.rank()}, tensor {i}", magnitude)


def test_two_runs_give_the_same_bits() -> None:
    """Whatever the order in which ranks and streams come: gradients too."""

    def step(g: dist.ProcessGroup) -> list[Tensor]:
        wholes = random(B, S, H, seed=1), random(INNER, H, seed=2), random(H, INNER, seed=3)
        x, up, down = (t.to(DEVICE, torch.bfloat16) for t in wholes)
        leaves = [cut(x, SEQUENCE, g), up.chunk(g.size(), 0)[g.rank()], down.chunk(g.size(), 1)[g.rank()]]
        gamma = torch.ones(H, device=DEVICE, dtype=torch.bfloat16)

        def fn(x: Tensor, up: Tensor, down: Tensor, gamma: Tensor) -> Sequence[Tensor]:
            h = sp.all_gather_linear(x, up, group=g, seq_len=S, chunks=3)
            return sp.linear_reduce_scatter_dropout_add_norm(  # type: ignore[no-any-return]
                h.tanh(), down, residual=x, norm="rms", norm_weight=gamma, p=0.1, seed=3, group=g, chunks=3
            )

        part = [cut(random(B, S, H, seed=4 + i).to(DEVICE), SEQUENCE, g) for i in range(2)]
        return differentiated(fn, [*leaves, gamma], part)

    with Loopback(4, DEVICE) as loopback:
        runs = [loopback.run(step) for _ in range(3)]
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
