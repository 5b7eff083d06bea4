"""Several NCCL ranks: one GPU each where there are enough, else all on one (function only, never timing)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp

from .processes import exit_codes, join

pytestmark = pytest.mark.gpu


def _rank(rank: int, ranks: int, store: str, fused: bool) -> None:
    group = join(rank, ranks, store)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    x = torch.randn(2, 64 * ranks + 1, 128).to(device).requires_grad_()
    up, down = torch.randn(256 * ranks, 128).to(device), torch.randn(128, 256 * ranks).to(device)
    gamma = torch.randn(128).to(device).requires_grad_()

    def layer(part: torch.Tensor, g: object, cut: slice) -> torch.Tensor:
        length = x.shape[1] if g else None
        h = sp.all_gather_linear(part, up[cut], group=g, chunks=2, seq_len=length)
        options = {"p": 0.1, "seed": 5, "group": g}
        if fused:
            last = sp.linear_reduce_scatter_dropout_add_norm
            y, _ = last(h.tanh(), down[:, cut], residual=part, norm="rms", norm_weight=gamma, chunks=2, **options)
        else:
            z = sp.linear_reduce_scatter(h.tanh(), down[:, cut], group=g, chunks=2)
            y = sp.dropout_add_rms_norm(z, part, gamma, seq_len=length, **options)
        return y

    whole = layer(x, None, slice(None))
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (x, gamma), grad)
    shard = sp.scatter_sequence(x, group)
    y = layer(shard, group, slice(rank * 256, rank * 256 + 256))
    got = torch.autograd.grad(y, (x, gamma), grad.tensor_split(ranks, 1)[rank])
    torch.testing.assert_close(y, whole.tensor_split(ranks, 1)[rank], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.multigpu)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_over_nccl(ranks: int, fused: bool) -> None:
    if ranks > 2 and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    assert exit_codes(_rank, ranks, fused) == [0] * ranks
