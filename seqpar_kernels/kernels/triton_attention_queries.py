"""The kernel of dq: a tile of rows of one head a program, past the tiles of keys that some of them see.

Weights are made again from lse. A row's gradient depends on no other row, and sums that are added to in several calls,
cut at multiples of BN keys, come to the bits of one call.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import triton
import triton.language as tl

from .triton_attention_forward import VARYING
from .triton_attention_scores import (
    added,
    first_row,
    kept,
    load_tile,
    products_gradient,
    row_shift,
    seen,
    spans_of,
    store_tile,
    tanh,
    tiles_seen,
    weights_of,
)


@triton.jit
def _walk_keys(
    b_dq1, b_dq2, b_q1, b_q2, b_dout, b_shift, b_delta, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions,
    i_seed, i_base, begin, end, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
    q_rows, k_rows, inner, factor, fraction, threshold, keep_scale, q_offset, k_offset,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq by ``power`` after the keys ``begin`` .. ``end``. Where not MASKED all rows see all of them."""
    for i_n in range(begin, end, BN):
        o_n = i_n + tl.arange(0, BN)
        b_k1 = load_tile(p_k, k_row, o_n, k_rows, 0, D1, D, MASKED)
        b_dot = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
        if D2 > 0:
            b_k2 = load_tile(p_k, k_row, o_n, k_rows, D1, D2, D, MASKED)
            b_dot = tl.dot(b_q2, tl.trans(b_k2), b_dot, input_precision=PRECISION)
        b_v = load_tile(p_v, v_row, o_n, k_rows, 0, WV, DV, MASKED)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_x = tanh(b_dot * inner) if SOFTCAP else b_dot
        o_r, o_c = o_m[:, None], o_n[None, :]
        m = (o_r < q_rows) & (o_c < k_rows)
        b_added = added(p_bias, o_r, o_c, m, bias_row, bias_key) if p_bias is not None else None
        m_seen = (
            seen(p_mask, o_r, o_c, m, mask_row, mask_key, b_first[:, None], b_last[:, None], MASKED)
            if MASKED or p_mask is not None
            else None
        )
        b_p = weights_of(b_x, b_added, m_seen, factor, b_shift[:, None])
        m_kept = (
            kept(
                i_seed, i_base, p_q_positions, p_k_positions, o_m, i_n, q_rows, k_rows, q_offset, k_offset, threshold,
                ALIGNED, BM, BN,
            )
            if i_seed is not None
            else None
        )  # fmt: skip
        b_ds = products_gradient(b_p, b_dp, b_delta[:, None], b_x, m_kept, keep_scale, fraction, SOFTCAP).to(b_k1.dtype)
        b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
        if D2 > 0:
            b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)
    return b_dq1, b_dq2


@triton.jit(do_not_specialize=VARYING)
def attention_queries_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_bias, p_mask, p_first, p_last, p_seed, p_q_positions, p_k_positions,
    p_dq,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    dq_batch, dq_row, dq_head, bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    span_batch, q_rows, k_rows, q_heads, group, low, high, inner, factor, fraction, power, inverse,
    threshold, keep_scale, first_batch: tl.int64, all_heads: tl.int64, first_head: tl.int64, all_rows: tl.int64,
    q_offset: tl.int64, k_offset: tl.int64,
    ADD: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq, or with ADD what is there already plus dq. Sizes as in the forward; lse and delta [B, Hq, Sq]."""
    tiles = tl.cdiv(q_rows, BM)
    i_m = tiles - 1 - tl.program_id(0) % tiles  # of a causal mask the longest rows first
    i_b, i_h = tl.program_id(0) // tiles // q_heads, tl.program_id(0) // tiles % q_heads
    i_b64, i_h64, i_kh = i_b.to(tl.int64), i_h.to(tl.int64), (i_h // group).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_rows = (i_b64 * q_heads + i_h64) * q_rows + o_m
    m_m = o_m < q_rows

    if p_first is not None:
        p_first += i_b * span_batch
        p_last += i_b * span_batch
    b_first, b_last = spans_of(p_first, p_last, o_m, q_rows, k_rows, low, high, HAS_LOW, HAS_HIGH)
    begin, full, after, end = tiles_seen(b_first, b_last, k_rows, BN)

    p_q += i_b64 * q_batch + i_h64 * q_head
    p_k += i_b64 * k_batch + i_kh * k_head
    p_v += i_b64 * v_batch + i_kh * v_head
    p_dout += i_b64 * dout_batch + i_h64 * dout_head
    p_dq += i_b64 * dq_batch + i_h64 * dq_head
    if p_bias is not None:
        p_bias += i_b64 * bias_batch + i_h64 * bias_head
    if p_mask is not None:
        p_mask += i_b64 * mask_batch + i_h64 * mask_head
    i_seed = tl.load(p_seed) if p_seed is not None else None
    i_base = first_row(i_b, i_h, first_batch, all_heads, first_head, all_rows)
    b_q1 = load_tile(p_q, q_row, o_m, q_rows, 0, D1, D, True)
    b_q2 = load_tile(p_q, q_row, o_m, q_rows, D1, D2, D, True) if D2 > 0 else b_q1
    b_dout = load_tile(p_dout, dout_row, o_m, q_rows, 0, WV, DV, True)
    b_shift = row_shift(tl.load(p_lse + o_rows, m_m, other=float("-inf")))
    b_delta = tl.load(p_delta + o_rows, m_m, other=0.0)
    b_dq1, b_dq2 = tl.zeros([BM, D1], tl.float32), tl.zeros([BM, D2 if D2 > 0 else 1], tl.float32)
    if ADD:
        b_dq1 = load_tile(p_dq, dq_row, o_m, q_rows, 0, D1, D, True) * inverse
        if D2 > 0:
            b_dq2 = load_tile(p_dq, dq_row, o_m, q_rows, D1, D2, D, True) * inverse

    if HAS_LOW or p_first is not None:
        b_dq1, b_dq2 = _walk_keys(
            b_dq1, b_dq2, b_q1, b_q2, b_dout, b_shift, b_delta, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions,
            i_seed, i_base, begin, full, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
            q_rows, k_rows, inner, factor, fraction, threshold, keep_scale, q_offset, k_offset,
            SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, True,
        )  # fmt: skip
    b_dq1, b_dq2 = _walk_keys(
        b_dq1, b_dq2, b_q1, b_q2, b_dout, b_shift, b_delta, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions,
        i_seed, i_base, full, after, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
        q_rows, k_rows, inner, factor, fraction, threshold, keep_scale, q_offset, k_offset,
        SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, False,
    )  # fmt: skip
    b_dq1, b_dq2 = _walk_keys(
        b_dq1, b_dq2, b_q1, b_q2, b_dout, b_shift, b_delta, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions,
        i_seed, i_base, after, end, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
        q_rows, k_rows, inner, factor, fraction, threshold, keep_scale, q_offset, k_offset,
        SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, True,
    )  # fmt: skip

    store_tile(p_dq, b_dq1 * power, dq_row, o_m, q_rows, 0, D1, D)
    if D2 > 0:
        store_tile(p_dq, b_dq2 * power, dq_row, o_m, q_rows, D1, D2, D)
