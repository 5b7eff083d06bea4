"""Linears that keep what their input was made from, rotation, attention with our dropout: against plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels import functional
from seqpar_kernels.functional import NormRecipe, causal_attention, checked_all_gather_linear
from seqpar_kernels.kernels import NormKind, RowMap
from seqpar_kernels.kernels.reference import dropout_mask

from ..oracle import assert_within_budget
from ..world import World

K = 6
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def of_recipe(
    x: Tensor, weight: Tensor, g: dist.ProcessGroup | None, recipe: NormRecipe | None, chunks: int | None = None
) -> Tensor:
    """all_gather_linear, x made again from the recipe."""
    call, operands = checked_all_gather_linear(x, weight, None, g, -2, chunks, "auto", None, recipe=recipe)
    return call(*operands)  # type: ignore[no-any-return]


def keeping_less(
    z: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    kind: NormKind,
    recipe: bool,
    zero_centered: bool = False,
) -> Tensor:
    g = group() if dist.is_initialized() else None
    norm = sp.dropout_add_rms_norm if kind == NormKind.RMS else sp.dropout_add_layer_norm
    vectors = (gamma,) if kind == NormKind.RMS else (gamma, beta)
    y, kept = norm(z, None, *vectors, prenorm=True, group=g, zero_centered_weight=zero_centered)
    made_from = NormRecipe(kept, gamma, beta, kind, zero_centered, 1e-5) if recipe else None
    return of_recipe(y, weight, g, made_from, 2)


@pytest.mark.parametrize("zero_centered", [False, True], ids=["weight", "1 + weight"])
@pytest.mark.parametrize("kind", [NormKind.LAYER, NormKind.RMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norm_is_made_again_bit_for_bit(kind: NormKind, dtype: torch.dtype, zero_centered: bool) -> None:
    z, weight, gamma = leaf(2, 5, 33, dtype=dtype), leaf(7, 33, dtype=dtype), leaf(33, dtype=dtype)
    beta = leaf(33, dtype=dtype) if kind == NormKind.LAYER else None
    wanted = [t for t in (z, weight, gamma, beta) if t is not None]
    dy = torch.randn(2, 5, 7, dtype=dtype)
    results = [keeping_less(z, weight, gamma, beta, kind, recipe, zero_centered) for recipe in (False, True)]
    assert torch.equal(*results)
    for plain, again in zip(*(torch.autograd.grad(y, wanted, dy) for y in results), strict=True):
        assert torch.equal(plain, again)
    kept = [sp.activation_bytes(keeping_less, z, weight, gamma, beta, kind, recipe).total for recipe in (False, True)]
    assert kept[0] - kept[1] == z.nbytes


def norm_case(kind: int) -> None:
    torch.manual_seed(group().rank())
    z, weight = leaf(2, 4, K), leaf(3, K)
    torch.manual_seed(0)
    gamma, beta = leaf(K), leaf(K) if kind == NormKind.LAYER else None
    wanted = [t for t in (z, weight, gamma, beta) if t is not None]
    results = [keeping_less(z, weight, gamma, beta, NormKind(kind), recipe) for recipe in (False, True)]
    dy = torch.randn_like(results[0])
    plain, again = (torch.autograd.grad(y, wanted, dy) for y in results)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def wide_stream_case() -> None:
    """The stream in fp32 beside 16-bit results, autocast, and weights that need no gradient."""
    g = group()
    torch.manual_seed(1)
    x, residual, gamma = leaf(1, 3, K, dtype=torch.bfloat16), leaf(1, 3, K, dtype=torch.float32), torch.ones(K)
    weight = leaf(3, K, dtype=torch.bfloat16)
    y, z = sp.dropout_add_rms_norm(x, residual, gamma, prenorm=True, group=g)
    assert z.dtype == torch.float32
    recipe = NormRecipe(z, gamma, None, NormKind.RMS, False, 1e-5)
    for w in (weight, weight.detach()):
        wanted = [x, residual, w] if w.requires_grad else [x, residual]
        outs = [of_recipe(y, w, g, r) for r in (None, recipe)]
        plain, again = (torch.autograd.grad(out.sum(), wanted, retain_graph=True) for out in outs)
        torch.testing.assert_close(plain, again, rtol=0, atol=0)
    master = leaf(3, K, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = sp.dropout_add_rms_norm(residual, None, gamma, prenorm=True, group=g)
        recipe = NormRecipe(z, gamma, None, NormKind.RMS, False, 1e-5)
        outs = [of_recipe(y, master, g, r) for r in (None, recipe)]
    plain, again = (torch.autograd.grad(out.sum(), [residual, master], retain_graph=True) for out in outs)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_a_norm_is_made_again_on_ranks(world2: World) -> None:
    world2.run(norm_case, int(NormKind.LAYER))
    world2.run(norm_case, int(NormKind.RMS))
    world2.run(wide_stream_case)


def activation_case(activation: str, gated: bool, seq_dim: int) -> None:
    g = group()
    t, rank = g.size(), g.rank()
    shape = [2, 2, K * t]
    shape[seq_dim] = 5
    x, gate = leaf(*shape), leaf(*shape) if gated else None
    weight, bias = leaf(4, K * t), leaf(4)
    act = ACTIVATIONS[activation]
    expected = F.linear(act(x) if gate is None else act(gate) * x, weight, bias)
    dy = torch.randn_like(expected)
    wanted = [tensor for tensor in (x, weight, bias, gate) if tensor is not None]
    want = torch.autograd.grad(expected, wanted, dy)
    cut = slice(rank * K, rank * K + K)
    mine = [w.detach()[..., cut].clone().requires_grad_() for w in (x, weight)]
    gate_mine = None if gate is None else gate.detach()[..., cut].clone().requires_grad_()
    own_bias = bias.detach().clone().requires_grad_()
    y = sp.linear_reduce_scatter(
        *mine, own_bias, group=g, seq_dim=seq_dim, chunks=2, activation=activation, gate=gate_mine
    )
    torch.testing.assert_close(y, expected.tensor_split(t, seq_dim)[rank])
    inputs = [tensor for tensor in (*mine, own_bias, gate_mine) if tensor is not None]
    got = torch.autograd.grad(y, inputs, dy.tensor_split(t, seq_dim)[rank])
    torch.testing.assert_close(got[0], want[0][..., cut])
    torch.testing.assert_close(got[1], want[1][:, cut])
    torch.testing.assert_close(got[2], want[2])
    if gate is not None:
        torch.testing.assert_close(got[3], want[3][..., cut])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_ahead_of_the_matmul(world2: World, activation: str, gated: bool) -> None:
    world2.run(activation_case, activation, gated, 1)
    world2.run(activation_case, activation, gated, 0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_activation_is_not_kept(gated: bool) -> None:
    x, gate = leaf(1, 9, 40, dtype=torch.bfloat16), leaf(1, 9, 40, dtype=torch.bfloat16) if gated else None
    weight = torch.nn.Parameter(torch.randn(4, 40, dtype=torch.bfloat16))
    report = sp.activation_bytes(sp.linear_reduce_scatter, x, weight, group=None, activation="silu", gate=gate)
    assert report.total == x.nbytes * (2 if gated else 1)
    # Which gradients are wanted changes none of them.
    wanted = [tensor for tensor in (x, weight, gate) if tensor is not None]
    together = torch.autograd.grad(report.result.sum(), wanted)
    for tensor, expected in zip(wanted, together, strict=True):
        alone = {name: t if t is tensor or t is None else t.detach() for name, t in (("x", x), ("gate", gate))}
        w = weight if tensor is weight else weight.detach()
        y = sp.linear_reduce_scatter(alone["x"], w, group=None, activation="silu", gate=alone["gate"])
        assert torch.equal(torch.autograd.grad(y.sum(), tensor)[0], expected)


def test_gradcheck() -> None:
    x, gate, w, b = leaf(1, 3, 4), leaf(1, 3, 4), leaf(2, 4), leaf(2)
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(
            lambda x, g, w, b, a=activation: sp.linear_reduce_scatter(x, w, b, group=None, activation=a, gate=g),
            (x, gate, w, b),
        )
        assert torch.autograd.gradcheck(
            lambda x, w, a=activation: sp.linear_reduce_scatter(x, w, group=None, activation=a), (x, w)
        )
    q, k, v = leaf(1, 5, 8), leaf(1, 5, 4), leaf(1, 5, 4)
    for p, base in ((0.0, None), (0.3, None), (0.3, 100.0)):
        options: dict[str, Any] = {"head_dim": 2, "p": p, "rope_theta": base, "seed": 3}
        assert torch.autograd.gradcheck(lambda q, k, v, o=options: causal_attention(q, k, v, **o), (q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation: expected one of"),
        ({"gate": torch.ones(1, 2, K)}, "gate: expected None without an activation"),
        ({"activation": "silu", "gate": torch.ones(1, 2, 5)}, "gate: expected the shape of x"),
        ({"activation": "silu", "gate": torch.ones(1, 2, K).double()}, "gate: expected the dtype of x"),
        ({"activation": "silu", "gate": 3}, "gate: expected a tensor, got int"),
    ],
)
def test_bad_activations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sp.linear_reduce_scatter(torch.ones(1, 2, K), torch.ones(3, K), group=None, **options)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, p: float, seed: int, wide: torch.dtype) -> Tensor:
    """[B, heads, S, d], fewer key heads allowed; scores of everything at once."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) / math.sqrt(q.shape[3])
    weights = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    rows = weights.shape[:3].numel()
    keep = dropout_mask(rows, weights.shape[3], p, torch.tensor(seed), RowMap(rows, 0, 0)).view(weights.shape)
    return (torch.where(keep, weights / (1 - p), 0) @ v.to(wide)).to(q.dtype)


def split_heads(t: Tensor, size: int, seq_dim: int) -> Tensor:
    t = t.unflatten(-1, (-1, size))
    return t.permute(1, 2, 0, 3) if seq_dim == 0 else t.transpose(1, 2)


@pytest.mark.parametrize("blocks", [1, 3], ids=["one_block", "blocks"])
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_with_dropout(dtype: torch.dtype, seq_dim: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqpar_kernels.ops import attention

    length, heads, size = 13, 4, 6
    monkeypatch.setattr(attention, "_BLOCK_ELEMENTS", heads * length * -(-length // blocks))
    shape = (length, 2) if seq_dim == 0 else (2, length)
    q, k, v = (leaf(*shape, count * size, dtype=dtype) for count in (heads, 2, 2))
    y = causal_attention(q, k, v, head_dim=size, p=0.3, seed=9, seq_dim=seq_dim)
    dy = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (q, k, v), dy))
    want = []
    for kind in (dtype, torch.float64):
        leaves = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        wide = torch.promote_types(kind, torch.float32)
        out = attention_reference(*(split_heads(t, size, seq_dim) for t in leaves), 0.3, 9, wide)
        out = (out.permute(2, 0, 1, 3) if seq_dim == 0 else out.transpose(1, 2)).flatten(2)
        want.append((out, *torch.autograd.grad(out, leaves, dy.to(kind))))
    for name, g, reference, oracle in zip(("y", "dq", "dk", "dv"), got, *want, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(g, oracle)
        else:
            assert_within_budget(g, reference, oracle, name)
    assert torch.equal(causal_attention(q, k, v, head_dim=size, p=0.3, seed=9, seq_dim=seq_dim), y)
    report = sp.activation_bytes(causal_attention, q, k, v, head_dim=size, p=0.3, seed=9, seq_dim=seq_dim)
    assert report.total == q.nbytes + k.nbytes + v.nbytes + 8


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_attention_of_an_empty_batch_or_of_one_token(p: float) -> None:
    for batch, length in ((0, 3), (2, 1)):
        q, k, v = (leaf(batch, length, features) for features in (8, 4, 4))
        y = causal_attention(q, k, v, head_dim=2, p=p, rope_theta=10.0, seed=1)
        y.sum().backward()
        assert y.shape == q.shape and torch.isfinite(y).all()
        assert all(t.grad.shape == t.shape and torch.isfinite(t.grad).all() for t in (q, k, v))


def heads_case() -> None:
    """Every rank's heads drop what the same heads drop on one rank; no two heads drop alike."""
    g = group()
    q, k, v = (torch.randn(2, 9, 8 * 4, dtype=torch.float64) for _ in range(3))
    whole = causal_attention(q, k, v, head_dim=4, p=0.5, seed=2)
    part = causal_attention(*(t.chunk(g.size(), -1)[g.rank()] for t in (q, k, v)), head_dim=4, p=0.5, seed=2, group=g)
    torch.testing.assert_close(part, whole.chunk(g.size(), -1)[g.rank()])
    alike = causal_attention(*(t[..., :4].repeat(1, 1, 8) for t in (q, k, v)), head_dim=4, p=0.5, seed=2)
    first, *others = alike.unflatten(-1, (8, 4)).unbind(2)
    assert all(not torch.equal(first, other) for other in others)


def test_attention_dropout_does_not_know_of_ranks(world: World) -> None:
    world.run(heads_case)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 0}, "head_dim: expected a positive int, got 0"),
        ({"head_dim": 5}, "q: expected whole heads of 5 features"),
        ({"k": torch.ones(1, 3, 12), "v": torch.ones(1, 3, 12)}, "k: expected whole heads of 4 .* divide those of q"),
        ({"v": torch.ones(1, 3, 4)}, "v: expected the shape of k"),
        ({"k": torch.ones(1, 2, 8)}, "k: expected torch.float32"),
        ({"v": torch.ones(1, 3, 8).double()}, "v: expected torch.float32"),
        ({"p": 1.5}, "p: expected a probability"),
        ({"q": None}, "q: expected a tensor, got NoneType"),
        ({"head_dim": 1, "rope_theta": 10.0}, "head_dim: expected an even number with rope_theta, got 1"),
    ],
)
def test_bad_attention_arguments(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.ones(1, 3, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        functional.causal_attention(**{**arguments, "head_dim": 4, **changed})


def opcheck_case() -> None:
    ops, check = torch.ops.seqpar, torch.library.opcheck
    name, t = group().group_name, group().size()
    place = (name, 1, 4 * t, 2, "p2p")
    x, z, w, b = (torch.randn(shape, requires_grad=True) for shape in ((2, 4, K), (2, 4, K), (3, K), (3,)))
    norm = (torch.ones(K), torch.zeros(K), int(NormKind.LAYER), False, 1e-5)
    check(ops.all_gather_linear_of_norm.default, (x, z.detach(), *norm, [w, w], [b, None], *place))
    dy = torch.randn(2, 4 * t, 3)
    wants = (True, [True], [True])
    recipe = (z.detach(), *norm, torch.float32)
    check(ops.all_gather_linear_of_norm_backward.default, (*recipe, [dy], [w.detach()], *wants, *place))
    wide, gate = (torch.randn(2, 4 * t, K, requires_grad=True) for _ in range(2))
    check(ops.activation_linear_reduce_scatter.default, (wide, gate, w, b, "silu", *place))
    check(ops.activation_linear_reduce_scatter.default, (wide, None, w, None, "gelu", *place))
    tensors = (torch.randn(2, 4, 3), wide.detach(), gate.detach(), w.detach())
    args = (*tensors, torch.float32, [True] * 4, "gelu_tanh", *place)
    check(ops.activation_linear_reduce_scatter_backward.default, args)
    q = torch.randn(2, 5, 4, 6).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 2, 5, 6, requires_grad=True)
    check(ops.rotary.default, (q, 2, 100.0, False))
    attention = (torch.tensor(3), 0.2, 0.5, True, 8, 4)
    check(ops.dropout_attention.default, (q, k, k, *attention))
    detached = [tensor.detach() for tensor in (q, q, k, k)]
    check(ops.dropout_attention_backward.default, (*detached, *attention))


def test_opcheck(world2: World) -> None:
    world2.run(opcheck_case)
