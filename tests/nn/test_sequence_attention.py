"""nn.SequenceParallelAttention: the function's results, sinks as a parameter, dropout in training, copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp

from ..functional.groups import on_ranks
from ..world import World


def module_case(group: dist.ProcessGroup) -> None:
    attention = sp.SequenceParallelAttention(group, is_causal=True, layout="zigzag", sinks=4, dropout_p=0.2)
    assert [name for name, _ in attention.named_parameters()] == ["sinks"]
    torch.nn.init.normal_(attention.sinks)
    q, k, v = torch.randn(3, 1, 6, 4, 8).unbind(0)
    options = dict(group=group, is_causal=True, layout="zigzag", sinks=attention.sinks)
    for training in (True, False):
        attention.train(training)
        expected = sp.sequence_parallel_attention(q, k, v, **options, dropout_p=0.2 * training, seed=7)
        assert torch.equal(attention(q, k, v, seed=7), expected)
        assert torch.equal(copy.deepcopy(attention)(q, k, v, seed=7), expected)
    attention(q, k, v).sum().backward()
    # Its part: where heads are exchanged that of its own heads.
    assert attention.sinks.grad is not None and attention.sinks.grad.any()


def test_module(world4: World) -> None:
    world4.run(on_ranks, module_case)


def projections_case(group: dist.ProcessGroup) -> None:
    """Whole weights on every rank: rows of one rank's result, gradients that sum to its own."""
    options = dict(embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, bias=True, rope_theta=100.0, is_causal=True)
    torch.manual_seed(1)
    one = sp.SequenceParallelAttention(None, layout="zigzag", **options)
    torch.manual_seed(1)
    shared = sp.SequenceParallelAttention(group, layout="zigzag", engine="ulysses", **options)
    names = [f"{p}_proj.{n}" for p in "qkvo" for n in ("weight", "bias")]
    assert [name for name, _ in shared.named_parameters()] == names
    x = torch.randn(1, 13, 64)
    mine = sp.shard_sequence(x, group, 1, layout="zigzag")
    assert shared.planned() is None
    y, whole = shared(mine, seq_len=13), one(x)
    assert torch.equal(copy.deepcopy(shared)(mine, seq_len=13), y)
    torch.testing.assert_close(y, sp.shard_sequence(whole, group, 1, layout="zigzag"))
    y.sum().backward()
    whole.sum().backward()
    for a, b in zip(shared.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(sp.reduce_from_tensor_parallel(a.grad, group), b.grad, rtol=1e-4, atol=1e-4)
    choice, groups = shared.planned()
    assert choice.engine == "ulysses" and len(groups.groups) == 1  # 4 KiB are one message
    table = sp.explain(sp.parallelize(torch.nn.ModuleDict({"attention": shared}), group, {}))
    row = next(row for row in table.rows if row.module == "attention")
    assert (row.engine, row.chunks) == ("ulysses", "1") and "groups of heads: " in row.why and "x the mean" in row.why


def test_projections(world4: World) -> None:
    world4.run(on_ranks, projections_case)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="embed_dim: expected an int where num_heads"):
        sp.SequenceParallelAttention(None, num_heads=3)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads=4, got 3"):
        sp.SequenceParallelAttention(None, embed_dim=8, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="k, v: SequenceParallelAttention expected the hidden states alone"):
        sp.SequenceParallelAttention(None, embed_dim=8, num_heads=4)(*torch.ones(3, 1, 2, 4, 2))
    assert "layout='zigzag'" in repr(sp.SequenceParallelAttention(None, layout="zigzag"))
    with pytest.raises(ValueError, match="sinks: expected the number of query heads"):
        sp.SequenceParallelAttention(None, sinks=0)
    with pytest.raises(ValueError, match="layout: expected"):
        sp.SequenceParallelAttention(None, layout="striped")
