"""The kernel of dk and dv: a tile of keys of one head a program, past the rows that see some of them, head after head
of those that read it, in one order.
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
    weights_of,
)


@triton.jit
def _walk_rows(
    b_dk1, b_dk2, b_dv, b_k1, b_k2, b_v, p_q, p_dout, p_lse, p_delta, p_bias, p_mask, p_first, p_last,
    p_q_positions, p_k_positions, i_seed, i_base, begin, end, i_n, o_n, q_row, dout_row,
    bias_row, bias_key, mask_row, mask_key, q_rows, k_rows, low, high, inner, factor, fraction, threshold, keep_scale,
    q_offset, k_offset,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk by ``power`` and dv after the rows ``begin`` .. ``end``. Where not MASKED all of them see all of the keys.

    Scores are [BN, BM] here, so that they are the left operand of what is summed.
    """
    for i_m in range(begin, end, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < q_rows
        b_q1 = load_tile(p_q, q_row, o_m, q_rows, 0, D1, D, True)
        b_dot = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)
        if D2 > 0:
            b_q2 = load_tile(p_q, q_row, o_m, q_rows, D1, D2, D, True)
            b_dot = tl.dot(b_k2, tl.trans(b_q2), b_dot, input_precision=PRECISION)
        b_x = tanh(b_dot * inner) if SOFTCAP else b_dot
        b_shift = row_shift(tl.load(p_lse + o_m, m_m, other=float("-inf")))
        b_delta = tl.load(p_delta + o_m, m_m, other=0.0)
        o_r, o_c = o_m[None, :], o_n[:, None]
        m = (o_r < q_rows) & (o_c < k_rows)
        b_added = added(p_bias, o_r, o_c, m, bias_row, bias_key) if p_bias is not None else None
        b_first, b_last = spans_of(p_first, p_last, o_m, q_rows, k_rows, low, high, HAS_LOW, HAS_HIGH)
        m_seen = (
            seen(p_mask, o_r, o_c, m, mask_row, mask_key, b_first[None, :], b_last[None, :], MASKED)
            if MASKED or p_mask is not None
            else None
        )
        b_p = weights_of(b_x, b_added, m_seen, factor, b_shift[None, :])
        m_kept = (
            tl.trans(
                kept(
                    i_seed, i_base, p_q_positions, p_k_positions, o_m, i_n, q_rows, k_rows, q_offset, k_offset,
                    threshold, ALIGNED, BM, BN,
                )
            )
            if i_seed is not None
            else None
        )  # fmt: skip
        b_dropped = b_p if m_kept is None else tl.where(m_kept, b_p * keep_scale, 0.0)
        b_dout = load_tile(p_dout, dout_row, o_m, q_rows, 0, WV, DV, True)
        b_dv = tl.dot(b_dropped.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_ds = products_gradient(b_p, b_dp, b_delta[None, :], b_x, m_kept, keep_scale, fraction, SOFTCAP).to(b_q1.dtype)
        b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
        if D2 > 0:
            b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)
    return b_dk1, b_dk2, b_dv


@triton.jit
def _rows_seeing(p_tile_rows, i_n, k_rows, q_rows, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Rows that see some of a tile of keys: (begin, first full, after the full, end), multiples of BM but the last.

    ``p_tile_rows``, where spans say who sees what, has begin and end; then none are known to see all of the keys.
    """
    last = tl.minimum(i_n + BN, k_rows)
    begin, end, full, after = 0, q_rows, 0, q_rows
    if HAS_LOW:  # row i sees keys from i + low on
        end = tl.minimum(end, last - low)
        after = tl.minimum(after, i_n - low + 1)
    if HAS_HIGH:  # and keys before i + high
        begin = tl.maximum(begin, i_n - high + 1)
        full = tl.maximum(full, last - high)
    if p_tile_rows is not None:
        begin, end = tl.maximum(begin, tl.load(p_tile_rows)), tl.minimum(end, tl.load(p_tile_rows + 1))
        after = 0
    begin = begin // BM * BM
    full = tl.cdiv(full, BM) * BM
    # Rows of the last tile that do not exist see what the last row does.
    after = tl.where(after >= q_rows, tl.cdiv(q_rows, BM), tl.maximum(after, 0) // BM) * BM
    some = full < after
    none = end if HAS_HIGH else begin  # which leaves them all to the first walk, or to the last
    return begin, tl.where(some, full, none), tl.where(some, after, none), end


@triton.jit(do_not_specialize=VARYING)
def attention_keys_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_bias, p_mask, p_first, p_last, p_seed, p_q_positions, p_k_positions,
    p_tile_rows, p_dk, p_dv,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    span_batch, q_rows, k_rows, q_heads, group, low, high, inner, factor, fraction, power, inverse,
    threshold, keep_scale, first_batch: tl.int64, all_heads: tl.int64, first_head: tl.int64, all_rows: tl.int64,
    q_offset: tl.int64, k_offset: tl.int64,
    ADD: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv, either or both, or with ADD what is there already plus these.

    ``p_tile_rows``: int32 [B or 1, tiles of keys, 2], the first row that sees a tile of BN keys and the one after the
    last, where there are spans. Other arguments as for dq.
    """
    tiles, kv_heads = tl.cdiv(k_rows, BN), q_heads // group
    i_t = tl.program_id(0) % tiles
    i_b, i_kh = tl.program_id(0) // tiles // kv_heads, tl.program_id(0) // tiles % kv_heads
    i_b64, i_kh64, i_n = i_b.to(tl.int64), i_kh.to(tl.int64), i_t * BN
    o_n = i_n + tl.arange(0, BN)

    if p_first is not None:
        p_tile_rows += ((i_b * tiles if span_batch > 0 else 0) + i_t) * 2
        p_first += i_b * span_batch
        p_last += i_b * span_batch
    begin, full, after, end = _rows_seeing(p_tile_rows, i_n, k_rows, q_rows, low, high, HAS_LOW, HAS_HIGH, BM, BN)

    p_k += i_b64 * k_batch + i_kh64 * k_head
    p_v += i_b64 * v_batch + i_kh64 * v_head
    b_k1 = load_tile(p_k, k_row, o_n, k_rows, 0, D1, D, True)
    b_k2 = load_tile(p_k, k_row, o_n, k_rows, D1, D2, D, True) if D2 > 0 else b_k1
    b_v = load_tile(p_v, v_row, o_n, k_rows, 0, WV, DV, True)
    b_dk1, b_dv = tl.zeros([BN, D1], tl.float32), tl.zeros([BN, WV], tl.float32)
    b_dk2 = tl.zeros([BN, D2 if D2 > 0 else 1], tl.float32)
    if p_dk is not None:
        p_dk += i_b64 * dk_batch + i_kh64 * dk_head
        if ADD:
            b_dk1 = load_tile(p_dk, dk_row, o_n, k_rows, 0, D1, D, True) * inverse
            if D2 > 0:
                b_dk2 = load_tile(p_dk, dk_row, o_n, k_rows, D1, D2, D, True) * inverse
    if p_dv is not None:
        p_dv += i_b64 * dv_batch + i_kh64 * dv_head
        if ADD:
            b_dv = load_tile(p_dv, dv_row, o_n, k_rows, 0, WV, DV, True)
    i_seed = tl.load(p_seed) if p_seed is not None else None

    for i_g in range(group):
        i_h = i_kh * group + i_g
        i_h64 = i_h.to(tl.int64)
        i_rows = (i_b64 * q_heads + i_h64) * q_rows
        p_qh = p_q + i_b64 * q_batch + i_h64 * q_head
        p_douth = p_dout + i_b64 * dout_batch + i_h64 * dout_head
        p_biash = p_bias + i_b64 * bias_batch + i_h64 * bias_head if p_bias is not None else None
        p_maskh = p_mask + i_b64 * mask_batch + i_h64 * mask_head if p_mask is not None else None
        i_base = first_row(i_b, i_h, first_batch, all_heads, first_head, all_rows)
        if HAS_HIGH or p_first is not None:
            b_dk1, b_dk2, b_dv = _walk_rows(
                b_dk1, b_dk2, b_dv, b_k1, b_k2, b_v, p_qh, p_douth, p_lse + i_rows, p_delta + i_rows, p_biash, p_maskh,
                p_first, p_last, p_q_positions, p_k_positions, i_seed, i_base,
                begin, full if p_first is None else end, i_n, o_n, q_row, dout_row,
                bias_row, bias_key, mask_row, mask_key, q_rows, k_rows, low, high, inner, factor, fraction,
                threshold, keep_scale, q_offset, k_offset,
                HAS_LOW, HAS_HIGH, SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, True,
            )  # fmt: skip
        if p_first is None:
            b_dk1, b_dk2, b_dv = _walk_rows(
                b_dk1, b_dk2, b_dv, b_k1, b_k2, b_v, p_qh, p_douth, p_lse + i_rows, p_delta + i_rows, p_biash, p_maskh,
                p_first, p_last, p_q_positions, p_k_positions, i_seed, i_base, full, after, i_n, o_n, q_row, dout_row,
                bias_row, bias_key, mask_row, mask_key, q_rows, k_rows, low, high, inner, factor, fraction,
                threshold, keep_scale, q_offset, k_offset,
                HAS_LOW, HAS_HIGH, SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, False,
            )  # fmt: skip
        if HAS_LOW and p_first is None:
            b_dk1, b_dk2, b_dv = _walk_rows(
                b_dk1, b_dk2, b_dv, b_k1, b_k2, b_v, p_qh, p_douth, p_lse + i_rows, p_delta + i_rows, p_biash, p_maskh,
                p_first, p_last, p_q_positions, p_k_positions, i_seed, i_base, after, end, i_n, o_n, q_row, dout_row,
                bias_row, bias_key, mask_row, mask_key, q_rows, k_rows, low, high, inner, factor, fraction,
                threshold, keep_scale, q_offset, k_offset,
                HAS_LOW, HAS_HIGH, SOFTCAP, ALIGNED, PRECISION, D, D1, D2, DV, WV, BM, BN, True,
            )  # fmt: skip

    if p_dk is not None:
        store_tile(p_dk, b_dk1 * power, dk_row, o_n, k_rows, 0, D1, D)
        if D2 > 0:
            store_tile(p_dk, b_dk2 * power, dk_row, o_n, k_rows, D1, D2, D)
    if p_dv is not None:
        store_tile(p_dv, b_dv, dv_row, o_n, k_rows, 0, WV, DV)
