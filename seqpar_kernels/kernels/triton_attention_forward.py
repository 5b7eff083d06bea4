"""The forward attention kernel: a tile of rows of one head a program, past the tiles of keys that some of them see.

Dao 2023 (arXiv 2307.08691, FlashAttention-2). A tile of keys is one step of every sum, so a call that resumes where
another has ended, at a multiple of BN keys, goes on with the very bits. Maxima are not rounded to integers, as those of
the CPU kernels are: the weight of a row's largest score is 1 only so, which 16 bits can tell.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import triton
import triton.language as tl

from .triton_attention_scores import (
    LN2,
    added,
    first_row,
    kept,
    load_tile,
    scores_of,
    seen,
    spans_of,
    store_tile,
    tanh,
    tiles_seen,
    weights_of,
)

# Whatever varies from call to call is left out of Triton's specialisation, so that nothing is compiled twice for it.
VARYING = (
    *("q_rows", "k_rows", "q_heads", "group", "low", "high", "inner", "factor", "threshold", "keep_scale"),
    *("first_batch", "all_heads", "first_head", "all_rows", "q_offset", "k_offset", "span_batch", "fraction"),
    *("power", "inverse"),
)


@triton.jit
def _walk(
    b_acc, b_max, b_sum, b_q1, b_q2, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions, i_seed, i_base,
    begin, end, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
    q_rows, k_rows, inner, factor, threshold, keep_scale, q_offset, k_offset,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state after the keys ``begin`` .. ``end``. Where not MASKED all rows see all of them."""
    for i_n in range(begin, end, BN):
        o_n = i_n + tl.arange(0, BN)
        b_k1 = load_tile(p_k, k_row, o_n, k_rows, 0, D1, D, MASKED)
        b_dot = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
        if D2 > 0:
            b_k2 = load_tile(p_k, k_row, o_n, k_rows, D1, D2, D, MASKED)
            b_dot = tl.dot(b_q2, tl.trans(b_k2), b_dot, input_precision=PRECISION)
        b_x = tanh(b_dot * inner) if SOFTCAP else b_dot
        o_r, o_c = o_m[:, None], o_n[None, :]
        m = (o_r < q_rows) & (o_c < k_rows)
        b_added = added(p_bias, o_r, o_c, m, bias_row, bias_key) if p_bias is not None else None
        m_seen = (
            seen(p_mask, o_r, o_c, m, mask_row, mask_key, b_first[:, None], b_last[:, None], MASKED)
            if MASKED or p_mask is not None
            else None
        )
        b_new = tl.maximum(b_max, tl.max(scores_of(b_x, b_added, m_seen, factor), 1))
        b_p = weights_of(b_x, b_added, m_seen, factor, b_new[:, None])
        b_alpha = tl.exp2(b_max - b_new)
        b_sum = tl.fma(b_sum, b_alpha, tl.sum(b_p, 1))
        b_acc = b_acc * b_alpha[:, None]
        b_max = b_new
        if i_seed is not None:
            m_kept = kept(
                i_seed, i_base, p_q_positions, p_k_positions, o_m, i_n, q_rows, k_rows, q_offset, k_offset, threshold,
                ALIGNED, BM, BN,
            )  # fmt: skip
            b_p = tl.where(m_kept, b_p * keep_scale, 0.0)
        b_v = load_tile(p_v, v_row, o_n, k_rows, 0, WV, DV, MASKED)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    p_q, p_k, p_v, p_bias, p_mask, p_first, p_last, p_seed, p_q_positions, p_k_positions,
    p_acc, p_maxima, p_sums, p_out, p_lse,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, acc_batch, acc_row, acc_head,
    out_batch, out_row, out_head, bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    span_batch, q_rows, k_rows, q_heads, group, low, high, inner, factor, threshold, keep_scale,
    first_batch: tl.int64, all_heads: tl.int64, first_head: tl.int64, all_rows: tl.int64,
    q_offset: tl.int64, k_offset: tl.int64,
    RESUME: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q [B, Sq, Hq, D], k, v [B, Sk, Hkv, D or DV]: D in two parts, D1 and D2 (0: none) wide; WV >= DV.

    The state begins anew or, with RESUME, where ``p_acc``, ``p_maxima`` and ``p_sums`` have it. It is stored where
    these are given; out and lse where ``p_out`` is.
    """
    tiles = tl.cdiv(q_rows, BM)
    i_m = tiles - 1 - tl.program_id(0) % tiles  # of a causal mask the longest rows first
    i_b, i_h = tl.program_id(0) // tiles // q_heads, tl.program_id(0) // tiles % q_heads
    i_b64, i_h64, i_kh = i_b.to(tl.int64), i_h.to(tl.int64), (i_h // group).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_rows = (i_b64 * q_heads + i_h64) * q_rows + o_m  # of what is [B, Hq, Sq]
    m_m = o_m < q_rows

    if p_first is not None:
        p_first += i_b * span_batch
        p_last += i_b * span_batch
    b_first, b_last = spans_of(p_first, p_last, o_m, q_rows, k_rows, low, high, HAS_LOW, HAS_HIGH)
    begin, full, after, end = tiles_seen(b_first, b_last, k_rows, BN)

    p_q += i_b64 * q_batch + i_h64 * q_head
    p_k += i_b64 * k_batch + i_kh * k_head
    p_v += i_b64 * v_batch + i_kh * v_head
    if p_bias is not None:
        p_bias += i_b64 * bias_batch + i_h64 * bias_head
    if p_mask is not None:
        p_mask += i_b64 * mask_batch + i_h64 * mask_head
    i_seed = tl.load(p_seed) if p_seed is not None else None
    i_base = first_row(i_b, i_h, first_batch, all_heads, first_head, all_rows)
    b_q1 = load_tile(p_q, q_row, o_m, q_rows, 0, D1, D, True)
    b_q2 = load_tile(p_q, q_row, o_m, q_rows, D1, D2, D, True) if D2 > 0 else None
    if p_acc is not None:
        p_acc += i_b64 * acc_batch + i_h64 * acc_head
    if RESUME:
        b_acc = load_tile(p_acc, acc_row, o_m, q_rows, 0, WV, DV, True)
        b_max = tl.load(p_maxima + o_rows, m_m, other=0.0).to(tl.float32)
        b_sum = tl.load(p_sums + o_rows, m_m, other=0.0).to(tl.float32)
    else:
        b_acc = tl.zeros([BM, WV], tl.float32)
        b_max = tl.zeros([BM], tl.float32) - 1e30
        b_sum = tl.zeros([BM], tl.float32)

    if HAS_LOW or p_first is not None:
        b_acc, b_max, b_sum = _walk(
            b_acc, b_max, b_sum, b_q1, b_q2, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions, i_seed, i_base,
            begin, full, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
            q_rows, k_rows, inner, factor, threshold, keep_scale, q_offset, k_offset,
            SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, True,
        )  # fmt: skip
    b_acc, b_max, b_sum = _walk(
        b_acc, b_max, b_sum, b_q1, b_q2, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions, i_seed, i_base,
        full, after, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
        q_rows, k_rows, inner, factor, threshold, keep_scale, q_offset, k_offset,
        SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, False,
    )  # fmt: skip
    b_acc, b_max, b_sum = _walk(
        b_acc, b_max, b_sum, b_q1, b_q2, p_k, p_v, p_bias, p_mask, p_q_positions, p_k_positions, i_seed, i_base,
        after, end, o_m, b_first, b_last, k_row, v_row, bias_row, bias_key, mask_row, mask_key,
        q_rows, k_rows, inner, factor, threshold, keep_scale, q_offset, k_offset,
        SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, True,
    )  # fmt: skip

    if p_acc is not None:
        store_tile(p_acc, b_acc, acc_row, o_m, q_rows, 0, WV, DV)
        tl.store(p_maxima + o_rows, b_max.to(tl.float64), m_m)
        tl.store(p_sums + o_rows, b_sum.to(tl.float64), m_m)
    if p_out is not None:
        m_none = b_sum == 0.0
        b_total = tl.where(m_none, 1.0, b_sum)
        p_out += i_b64 * out_batch + i_h64 * out_head
        store_tile(p_out, b_acc / b_total[:, None], out_row, o_m, q_rows, 0, WV, DV)
        b_lse = tl.where(m_none, float("-inf"), (b_max + tl.log2(b_total)) * LN2)
        tl.store(p_lse + o_rows, b_lse, m_m)
