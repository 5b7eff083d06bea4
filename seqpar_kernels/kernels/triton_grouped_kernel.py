"""Matmuls of runs of rows, each with a weight of its own: device code of :mod:`.triton_grouped`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import triton
import triton.language as tl


@triton.jit
def rows_kernel(
    p_x, p_weight, p_bias, p_out, p_strips, n, k, x_stride, e_stride, n_stride, k_stride, bias_stride, out_stride,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = x @ weight[run].T + bias[run], a program for each strip of rows and block of columns.

    ``p_strips``: int32 [strips, 3]: run, first row, row after the last; at most BM rows, all of one run. One of
    ``n_stride`` and ``k_stride`` is 1.
    """
    i_strip, i_n = tl.program_id(0), tl.program_id(1) * BN
    run = tl.load(p_strips + 3 * i_strip).to(tl.int64)
    o_r = tl.load(p_strips + 3 * i_strip + 1) + tl.arange(0, BM)
    m_r = o_r < tl.load(p_strips + 3 * i_strip + 2)
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < n
    p_rows = p_x + o_r.to(tl.int64)[:, None] * x_stride
    p_cols = p_weight + run * e_stride + o_n.to(tl.int64)[None, :] * n_stride
    b_out = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, k, BK):
        o_k = i_k + tl.arange(0, BK)
        m_x, m_w = m_r[:, None], m_n[None, :]
        if not EVEN:
            m_x, m_w = m_x & (o_k < k)[None, :], m_w & (o_k < k)[:, None]
        b_x = tl.load(p_rows + o_k[None, :], m_x, other=0.0)
        b_weight = tl.load(p_cols + o_k.to(tl.int64)[:, None] * k_stride, m_w, other=0.0)
        b_out = tl.dot(b_x, b_weight, b_out, input_precision=PRECISION)
    if p_bias is not None:
        b_out += tl.load(p_bias + run * bias_stride + o_n, m_n, other=0.0).to(tl.float32)[None, :]
    p = p_out + o_r.to(tl.int64)[:, None] * out_stride + o_n[None, :]
    tl.store(p, b_out.to(p_out.dtype.element_ty), m_r[:, None] & m_n[None, :])


@triton.jit
def weight_kernel(
    p_dy, p_x, p_out, p_ends, n, k, dy_stride, x_stride, e_stride, n_stride, k_stride,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[run] = dy.T @ x over the run's rows, a program for each block of each weight; 0 for a run without rows.

    ``p_ends``: int32 [runs + 1]: the first row of each run, and all rows.
    """
    blocks = tl.cdiv(k, BN)
    run = tl.program_id(1)
    start, stop = tl.load(p_ends + run), tl.load(p_ends + run + 1)
    o_n = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    m_n, m_k = o_n < n, o_k < k
    b_out = tl.zeros([BM, BN], tl.float32)
    for i_r in tl.range(start, stop, BK):
        o_r = i_r + tl.arange(0, BK)
        m_r = o_r < stop
        rows = o_r.to(tl.int64)
        b_dy = tl.load(p_dy + rows[None, :] * dy_stride + o_n[:, None], m_r[None, :] & m_n[:, None], other=0.0)
        b_x = tl.load(p_x + rows[:, None] * x_stride + o_k[None, :], m_r[:, None] & m_k[None, :], other=0.0)
        b_out = tl.dot(b_dy, b_x, b_out, input_precision=PRECISION)
    p = p_out + run.to(tl.int64) * e_stride + o_n.to(tl.int64)[:, None] * n_stride
    p += o_k.to(tl.int64)[None, :] * k_stride
    tl.store(p, b_out.to(p_out.dtype.element_ty), m_n[:, None] & m_k[None, :])
