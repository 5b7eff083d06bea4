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


def test_arguments() -> None:
    assert "layout='zigzag'" in repr(sp.SequenceParallelAttention(None, layout="zigzag"))
    with pytest.raises(ValueError, match="sinks: expected the number of query heads"):
        sp.SequenceParallelAttention(None, sinks=0)
    with pytest.raises(ValueError, match="layout: expected"):
        sp.SequenceParallelAttention(None, layout="striped")
