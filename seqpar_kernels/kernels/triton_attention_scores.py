"""What the forward and backward attention kernels share: tiles of memory, which keys a row sees, scores, dropout.

Scores are in base 2: score * log2(e). A score is rounded alike whether its tile is masked or not (multiply-adds are
written out, so that the compiler has none to choose), so a row's bits do not depend on the rows beside it.

``scale`` is split into ``fraction`` * ``power``, a power of two: gradients of scores times ``fraction`` stay in the
range of fp16, and sums that are added to in several calls are multiplied by ``power`` without rounding.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import triton
import triton.language as tl

from .triton_philox import keep_mask, philox

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(p, stride, o_r, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
              CHECKED: tl.constexpr):  # fmt: skip
    """[R, WIDTH]: columns FIRST onwards of rows ``o_r``; zeros from COLUMNS on and, where CHECKED, from ``rows`` on."""
    o_c = FIRST + tl.arange(0, WIDTH)
    p_tile = p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
    if FIRST + WIDTH > COLUMNS:
        return tl.load(p_tile, (o_r < rows)[:, None] & (o_c < COLUMNS)[None, :], other=0.0)
    elif CHECKED:
        return tl.load(p_tile, (o_r < rows)[:, None], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store_tile(p, b, stride, o_r, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """What :func:`load_tile` reads, written, rounded once."""
    o_c = FIRST + tl.arange(0, WIDTH)
    m = (o_r < rows)[:, None]
    if FIRST + WIDTH > COLUMNS:
        m = m & (o_c < COLUMNS)[None, :]
    tl.store(p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], b.to(p.dtype.element_ty), m)


@triton.jit
def spans_of(p_first, p_last, o_r, q_rows, k_rows, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """Row i sees no keys but first[i] .. last[i] - 1. int32 [R] each, within 0 .. ``k_rows``.

    Bounds by offset: row i sees keys i + low .. i + high - 1. Rows that do not exist see what the last row does.
    """
    o_i = tl.minimum(o_r, q_rows - 1)
    b_first = o_i * 0
    b_last = b_first + k_rows
    if HAS_LOW:
        b_first = tl.minimum(tl.maximum(b_first, o_i + low), k_rows)
    if HAS_HIGH:
        b_last = tl.maximum(tl.minimum(b_last, o_i + high), 0)
    if p_first is not None:
        b_first = tl.maximum(b_first, tl.load(p_first + o_i))
        b_last = tl.minimum(b_last, tl.load(p_last + o_i))
    return b_first, b_last


@triton.jit
def tiles_seen(b_first, b_last, k_rows, BN: tl.constexpr):
    """Keys that the rows of a tile see: (begin, first full, after the full, end).

    Tiles of BN keys from ``begin`` to ``end`` are computed; all rows see all keys of those between the middle two.
    """
    m_some = b_first < b_last
    begin = tl.min(tl.where(m_some, b_first, k_rows), 0) // BN * BN
    end = tl.max(tl.where(m_some, b_last, 0), 0)
    full = tl.cdiv(tl.max(b_first, 0), BN) * BN
    after = tl.min(b_last, 0) // BN * BN
    some = full < after
    return begin, tl.where(some, full, begin), tl.where(some, after, begin), end


@triton.jit
def tanh(b_x):
    """In fp32, to two units in the last place; the polynomial is Cephes' tanhf."""
    b_z = b_x * b_x
    b_small = (-5.70498872745e-3 * b_z + 2.06390887954e-2) * b_z - 5.37397155531e-2
    b_small = (b_small * b_z + 1.33314422036e-1) * b_z - 3.33332819422e-1
    b_small = b_small * b_z * b_x + b_x
    b_large = 1.0 - 2.0 / (tl.exp2(b_x * (2 * LOG2E)) + 1.0)
    return tl.where(tl.abs(b_x) < 0.625, b_small, b_large)


@triton.jit
def added(p_bias, o_r, o_n, m, bias_row, bias_key):
    """The bias in base 2, fp32, of rows ``o_r`` and keys ``o_n``: [R, 1] and [1, N], or [1, R] and [N, 1]."""
    p = p_bias + o_r.to(tl.int64) * bias_row + o_n.to(tl.int64) * bias_key
    return tl.load(p, m, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def seen(p_mask, o_r, o_n, m, mask_row, mask_key, b_first, b_last, MASKED: tl.constexpr):
    """Which of the keys ``o_n`` each of the rows ``o_r`` sees; shapes as in :func:`added`."""
    if p_mask is None:
        return (o_n >= b_first) & (o_n < b_last)
    else:
        b_mask = tl.load(p_mask + o_r.to(tl.int64) * mask_row + o_n.to(tl.int64) * mask_key, m, other=0)
        m_seen = b_mask != 0
        if MASKED:
            m_seen = m_seen & (o_n >= b_first) & (o_n < b_last)
        return m_seen


@triton.jit
def scores_of(b_x, b_added, m_seen, factor):
    """x * factor + added, -inf where not seen."""
    b_s = b_x * factor if b_added is None else tl.fma(b_x, tl.zeros_like(b_x) + factor, b_added)
    return b_s if m_seen is None else tl.where(m_seen, b_s, float("-inf"))


@triton.jit
def weights_of(b_x, b_added, m_seen, factor, b_shift):
    """exp2(x * factor + added - shift), 0 where not seen."""
    b_factor = tl.zeros_like(b_x) + factor
    if b_added is None:
        b_s = tl.fma(b_x, b_factor, tl.zeros_like(b_x) - b_shift)
    else:
        b_s = tl.fma(b_x, b_factor, b_added) - b_shift
    b_p = tl.exp2(b_s)
    return b_p if m_seen is None else tl.where(m_seen, b_p, 0.0)


@triton.jit
def first_row(i_b, i_h, first_batch: tl.int64, all_heads: tl.int64, first_head: tl.int64, all_rows: tl.int64):
    """What is added to a row's position for its row of the dropout mask."""
    return ((first_batch + i_b) * all_heads + first_head + i_h) * all_rows


@triton.jit
def kept(i_seed, i_base, p_q_positions, p_k_positions, o_r, i_n, q_rows, k_rows, q_offset, k_offset, threshold,
         ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Which weights of rows ``o_r`` and keys ``i_n`` onwards dropout keeps. bool [BM, BN]

    ALIGNED: positions of keys are consecutive from a multiple of 8 on, so that eight share their random words.
    """
    if p_q_positions is None:
        b_row = i_base + q_offset + o_r
    else:
        b_row = i_base + tl.load(p_q_positions + o_r, o_r < q_rows, other=0)
    if ALIGNED:
        return keep_mask(i_seed, b_row, k_offset + i_n, threshold, BM, BN)
    else:
        o_n = i_n + tl.arange(0, BN)
        if p_k_positions is None:
            b_column = k_offset + o_n
        else:
            b_column = tl.load(p_k_positions + o_n, o_n < k_rows, other=0)
        b_w0, b_w1, b_w2, b_w3 = philox(i_seed, b_row, b_column // 8)
        b_pair = (b_column % 8 // 2)[None, :]
        b_low, b_high = tl.where(b_pair == 0, b_w0, b_w1), tl.where(b_pair == 2, b_w2, b_w3)
        b_word = tl.where(b_pair < 2, b_low, b_high)
        return ((b_word >> (b_column % 2 * 16).to(tl.uint32)[None, :]) & 0xFFFF) >= threshold


@triton.jit
def row_shift(b_lse):
    """lse in base 2; for rows that see nothing, whose weights are 0, inf."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def products_gradient(b_p, b_dp, b_delta, b_x, m_kept, keep_scale, fraction, SOFTCAP: tl.constexpr):
    """Gradient of the products q k^T, by ``power``; ``b_dp``: gradient of the weights that v is summed with."""
    if m_kept is not None:
        b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
    b_ds = b_p * (b_dp - b_delta) * fraction
    return b_ds * (1.0 - b_x * b_x) if SOFTCAP else b_ds
