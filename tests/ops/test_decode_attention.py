"""seqpar::decode_attention as PyTorch sees it: opcheck, no derivative, compiled without a break, on ranks too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import attention_native

from ..functional.groups import on_ranks
from ..world import World

if attention_native.unavailable(torch.device("cpu")) is not None:
    pytest.skip(str(attention_native.unavailable(torch.device("cpu"))), allow_module_level=True)


def tensors(rank: int, ranks: int, length: int = 11, new: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, n, h, d, generator=g) for n, h, d in ((new, 4, 8), (length, 2, 8), (length, 2, 4)))
    return q, k[:, rank::ranks], v[:, rank::ranks]


def options_of(length: int = 11) -> dict[str, Any]:
    return dict(kv_seq_len=length, window_size=(4, -1), sinks=torch.ones(4), attn_bias=torch.ones(4, 1, length))


def test_opcheck_and_no_derivative() -> None:
    q, k, v = tensors(0, 1)
    args = (torch.ones(4), torch.ones(1, 4, 1, 11), torch.ones(11, dtype=torch.bool).view(1, 1, 1, 11))
    scalars = (11, 0.3, 2.0, 4, 0, False, "")
    torch.library.opcheck(torch.ops.seqpar.decode_attention.default, (q, k, v, *args, *scalars))
    with pytest.raises(RuntimeError, match="decode_attention has no derivative"):
        torch.ops.seqpar.decode_attention(q.requires_grad_(), k, v, *args, *scalars)


def compile_case(group: dist.ProcessGroup | None) -> None:
    """One op, one graph for all lengths; strided inputs, and lse, give the same bits."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, length: int, sinks: Tensor, bias: Tensor) -> Any:
        options = dict(kv_seq_len=length, window_size=(4, -1), sinks=sinks, attn_bias=bias, return_lse=True)
        return sp.decode_attention(q, k, v, group=group, **options)

    run = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (11, 17, 29):
        inputs, options = tensors(rank, ranks, length), options_of(length)
        args = (length, options["sinks"], options["attn_bias"])
        out, lse = attend(*inputs, *args)
        turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
        for fn, given in ((run, inputs), (attend, turned)):
            again, lse_again = fn(*given, *args)
            assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_compiled_without_a_break() -> None:
    compile_case(None)


def test_compiled_on_ranks(world2: World) -> None:
    world2.run(compile_on_world)


def compile_on_world() -> None:
    compile_case(dist.group.WORLD)


def errors_case(group: dist.ProcessGroup) -> None:
    t, rank = group.size(), group.rank()
    q, k, v = tensors(rank, t)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("k: expected . keys on rank . of .", dict(kv_seq_len=11 + t)),
        ("kv_seq_len: expected a positive int", dict(kv_seq_len=0)),
        (r"q: expected the last rows of kv_seq_len=1, one or more", dict(kv_seq_len=1)),
        ("scale: expected a finite number", dict(kv_seq_len=11, scale=float("inf"))),
        ("attn_bias: expected requires_grad=False", dict(kv_seq_len=11, attn_bias=torch.ones(11, requires_grad=True))),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            sp.decode_attention(q, k, v, group=group, **options)
    dist.barrier(group)
    with pytest.raises(RuntimeError, match="disagree"):
        sp.decode_attention(q, k, v, group=group, kv_seq_len=11, softcap=float(rank))
    dist.barrier(group)
    everything = [torch.empty(2, 2, 4, 4) for _ in range(t)]
    dist.all_gather(everything, sp.decode_attention(q, k, v, group=group, kv_seq_len=11), group)
    alone = sp.decode_attention(*tensors(0, 1), group=None, kv_seq_len=11)
    assert all(torch.equal(t, everything[0]) for t in everything)
    torch.testing.assert_close(everything[0], alone)


def test_errors_on_every_rank(world4: World) -> None:
    world4.run(on_ranks, errors_case)


def test_other_directions_than_causal() -> None:
    """Keys behind a row are seen where the caller says so: cross attention."""
    q, k, v = tensors(0, 1)
    out = sp.decode_attention(q, k, v, group=None, kv_seq_len=11, is_causal=False)
    expected = sp.sequence_parallel_attention(q, k, v, group=None)
    torch.testing.assert_close(out, expected)
    ahead = sp.decode_attention(q, k, v, group=None, kv_seq_len=11, is_causal=False, window_size=(3, 1))
    expected = sp.sequence_parallel_attention(q, k, v, group=None, window_size=(3, 1))
    torch.testing.assert_close(ahead, expected)
