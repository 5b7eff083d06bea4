"""The kernels that figures are claimed of, each launched once, for a profiler: ``ncu ... python -m tests.gpu.profile``.

``make gpu`` runs it under Nsight Compute where there is one (.ci/gpu.py), which reads bytes, occupancy and stalls.
"""

from __future__ import annotations

import torch

from seqpar_kernels.kernels import NormGiven, NormKind, NormSpec, NormTensors, NormWants, RowMap, select, why_not

SHAPES = [(16384, 4096), (16384, 16384), (8192, 1024), (4096, 32768)]  # [rows, hidden], tensors beyond the cache
SHARDS = (8, 2048, 8192)
ATTENTION = (8192, 32, 8, 128)  # rows, query heads, key heads, features: a layer of Llama-8B
MATMUL = (8192, 7168, 8192)  # M, N, K: gate and up of Llama-70B on 8 ranks
DTYPE = torch.bfloat16


def norms(backend: str, device: torch.device, shapes: list[tuple[int, int]]) -> None:
    """dropout + residual + LayerNorm, forward and backward with both vector gradients."""
    kernels, seed = select(backend, device), torch.tensor(7, device=device)
    spec = NormSpec(NormKind.LAYER, False, 1e-5, 0.1, RowMap(0, 0, 0), *[DTYPE] * 4)
    for rows, cols in shapes:
        x, residual, dy = (torch.randn(rows, cols, device=device).to(DTYPE) for _ in range(3))
        weight, bias = (torch.randn(cols, device=device).to(DTYPE) for _ in range(2))
        own = spec._replace(rows=RowMap(rows, 0, 0))
        out = kernels.norm_forward(NormTensors(x, residual, weight, bias, seed=seed), own)
        wants = NormWants(True, True, True, True, False, False, False)
        given = NormGiven(dy, None, dy, out.z, out.statistics, None, weight, None, seed)
        kernels.norm_backward(given, own, wants)


def sums(backend: str, device: torch.device, shape: tuple[int, int, int]) -> None:
    select(backend, device).reduce_shards(torch.randn(shape, device=device).to(DTYPE), None)


def matmul(device: torch.device, sizes: tuple[int, int, int]) -> None:
    from seqpar_kernels.kernels.triton_gemm import matmul, unavailable

    if unavailable(device) is None:
        m, n, k = sizes
        matmul(torch.randn(m, k, device=device).to(DTYPE), torch.randn(n, k, device=device).to(DTYPE))


def attention(device: torch.device, sizes: tuple[int, int, int, int]) -> None:
    """Causal attention, forward and backward; nothing where the device has no kernel."""
    from seqpar_kernels.kernels.attention import backward, forward, row_dots, select_attention
    from seqpar_kernels.kernels.attention_spec import NO_MASKS, AttentionSpec

    try:
        select_attention(device)
    except RuntimeError:
        return
    rows, heads, kv_heads, head_dim = sizes
    q, k, v, dout = (
        torch.randn(1, rows, count, head_dim, device=device).to(DTYPE) for count in (heads, kv_heads, kv_heads, heads)
    )
    spec = AttentionSpec(head_dim**-0.5, right=0)
    out, lse, _ = forward(q, k, v, spec, NO_MASKS)
    assert out is not None and lse is not None
    backward(dout, q, k, v, lse, row_dots(dout, out), spec, NO_MASKS)


if __name__ == "__main__":
    cuda = torch.device("cuda", 0)
    for name in ("native", "triton"):
        if why_not(name, cuda) is None:
            norms(name, cuda, SHAPES)
            sums(name, cuda, SHARDS)
    matmul(cuda, MATMUL)
    attention(cuda, ATTENTION)
    torch.cuda.synchronize()
