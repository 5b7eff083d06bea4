"""Tensors whose rows overlap or repeat, forward and backward, through every op that reads what a user laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import native

from ..world import World

H = 12


def _layouts(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of ``shape`` with overlapping memory: rows one element apart, half a row apart, one row many times."""
    *lead, cols = shape
    if not lead:  # no rows that could overlap
        return dict.fromkeys(LAYOUTS, torch.randn(()).to(dtype).expand(shape))
    rows = int(torch.Size(lead).numel())
    near = torch.randn(rows + cols).to(dtype).unfold(0, cols, 1)[:rows]
    half = torch.randn(rows * cols).to(dtype).as_strided((rows, cols), (cols // 2, 1))
    found = {"unfold": near.view(shape) if len(lead) == 1 else near.reshape(rows, cols).unflatten(0, lead)}
    found["half"] = half if len(lead) == 1 else half.unflatten(0, lead)
    found["repeated"] = torch.randn(cols).to(dtype).expand(shape)
    found["one value"] = torch.randn(()).to(dtype).expand(shape)
    return found


LAYOUTS = ("unfold", "half", "repeated", "one value")


def _same(run: Callable[..., Tensor | Sequence[Tensor]], *given: Tensor, layout: str) -> None:
    """``run`` on overlapping inputs, with an overlapping gradient of its result, gives what contiguous ones give."""
    results = []
    for copied in (False, True):
        leaves = [t.contiguous() if copied else t.detach() for t in given]
        before = [t.clone() for t in leaves]
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())
        outs = run(*leaves)
        outs = [outs] if isinstance(outs, Tensor) else [out for out in outs if out is not None]
        torch.manual_seed(7)
        grads = [_layouts(*out.shape, dtype=out.dtype)[layout] if out.dim() else torch.ones(()) for out in outs]
        grads = [grad.contiguous() if copied else grad for grad in grads]
        torch.autograd.backward(outs, grads)
        assert all(torch.equal(a.detach(), b) for a, b in zip(leaves, before, strict=True)), "an input was written to"
        results.append([*(out.detach() for out in outs), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected)


NORMS: dict[str, Any] = {
    "layer": lambda b, x, r, w: sp.dropout_add_layer_norm(x, r, w[0], w[1], p=0.2, seed=1, prenorm=True, backend=b),
    "rms": lambda b, x, r, w: sp.dropout_add_rms_norm(x, r, w[0], p=0.2, seed=1, backend=b, x_bias=w[1]),
    "add": lambda b, x, r, w: sp.dropout_add(x, r, p=0.2, seed=1, backend=b),
    "two": lambda b, x, r, w: sp.dropout_add_layer_norm(x, r, w[0], weight2=w[1], backend=b),
    "alone": lambda b, x, r, w: sp.dropout_add_layer_norm(x, None, w[0], backend=b),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, layout: str, backend: str | None) -> None:
    torch.manual_seed(0)
    for shape in ((7, H), (2, 3, H), (1, 5, H), (7, 33)):
        for dtype in (torch.float32, torch.bfloat16):
            x, residual = (_layouts(*shape, dtype=dtype)[layout] for _ in range(2))
            vectors = _layouts(2, shape[-1], dtype=dtype)[layout]
            _same(lambda *t: NORMS[name](backend, *t), x, residual, vectors, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_kernels_take_a_stack_of_them(layout: str) -> None:
    parts = _layouts(3, 5, H)[layout]
    assert torch.equal(native.reduce_shards(parts, None), native.reduce_shards(parts.contiguous(), None))
    turned = torch.randn(3, H, 5).mT
    assert torch.equal(native.reduce_shards(turned, None), native.reduce_shards(turned.contiguous(), None))


def ops_case(layout: str) -> None:
    g = dist.group.WORLD
    assert g is not None
    t, rank = g.size(), g.rank()
    torch.manual_seed(0)
    w = torch.randn(10, H)
    for shape in ((4 * t, H), (2, 4 * t, H)):
        x = _layouts(*shape)[layout]
        weight = _layouts(10, H)[layout]
        _same(lambda x, w: sp.all_gather_linear(x, w, group=g, chunks=2), x, weight, layout=layout)
        _same(lambda x, w: sp.linear_reduce_scatter(x, w, group=g, chunks=2), x, weight, layout=layout)
        _same(
            lambda x, gate: sp.linear_reduce_scatter(x, w, group=g, activation="silu", gate=gate), x, x, layout=layout
        )
        residual = _layouts(*shape[:-2], 4, 10)[layout]
        _same(
            lambda x, r: sp.linear_reduce_scatter_dropout_add_norm(x, w, residual=r, norm="rms", group=g),
            x, residual, layout=layout,
        )  # fmt: skip
        for mapping in (
            sp.gather_sequence, sp.scatter_sequence, sp.reduce_scatter_sequence, sp.reduce_from_tensor_parallel,
            sp.copy_to_tensor_parallel, sp.scatter_tensor_parallel, sp.gather_tensor_parallel,
        ):  # fmt: skip
            _same(lambda x, f=mapping: f(x, g), x, layout=layout)
        target = torch.randint(0, H * t, shape[:-1])
        _same(lambda x, t=target: sp.vocab_parallel_cross_entropy(x, t, group=g, reduction="none"), x, layout=layout)
        _same(lambda x, t=target: sp.vocab_parallel_cross_entropy(x, t, group=g, z_loss=0.1), x, layout=layout)
        whole = torch.randint(0, 10 * t, (*shape[:-2], shape[-2] * t))
        _same(lambda x, w, t=whole: sp.vocab_parallel_linear_cross_entropy(x, w, t, group=g), x, weight, layout=layout)
    ids = torch.arange(4 * t).unfold(0, t, 1)[: 2 * t].t()  # [t, 2t], each entry in many places
    table = _layouts(3 * t, H)[layout]
    _same(lambda w: sp.vocab_parallel_embedding(ids, w, group=g), table, layout=layout)
    assert rank < t


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_on_ranks(layout: str, world2: World) -> None:
    world2.run(ops_case, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linears_on_one_rank(layout: str) -> None:
    torch.manual_seed(0)
    x, weight = _layouts(2, 4, H)[layout], _layouts(10, H)[layout]
    for f in (sp.all_gather_linear, sp.linear_reduce_scatter):
        _same(lambda x, w, f=f: f(x, w, group=None), x, weight, layout=layout)
    q = _layouts(2, 4, H)[layout]
    _same(lambda q: F.scaled_dot_product_attention(q, q, q), q, layout=layout)  # what ours is compared with takes them
    _same(lambda q: sp.functional.causal_attention(q, q, q, head_dim=4, p=0.1, seed=1), q, layout=layout)
