"""Forward kernels: dropout + add + norm of one tile of rows, held on chip or, where too long, visited in chunks.

A term that is off is None from the arguments down: tests of it are settled when the kernel is compiled. The None comes
from conditional expressions, since a function of Triton 3.4 cannot return it.
"""

import triton
import triton.language as tl

from .triton_philox import dropout, global_row

NONE = tl.constexpr(0)
LAYER = tl.constexpr(1)

# Whatever varies from call to call is left out of Triton's specialisation, so that nothing is compiled twice for it.
_VARYING = ("rows", "threshold", "scale_bits", "map_block", "map_stride", "map_offset")


@triton.jit
def load_vector(p, o_c, m_c):
    """[1, BLOCK] in its own dtype."""
    return tl.load(p + o_c, m_c, other=0.0)[None, :]


@triton.jit
def times_weight(b_x, b_weight, ZERO_CENTERED: tl.constexpr):
    """``b_x`` [R, BLOCK] times the norm's scale, ``weight`` or ``1 + weight``."""
    if b_weight is None:
        return b_x
    elif ZERO_CENTERED:
        return b_x * (b_weight.to(b_x.dtype) + 1)
    else:
        return b_x * b_weight.to(b_x.dtype)


@triton.jit
def _stream(
    p_x, b_x_bias, b_row_scale, p_residual, i_seed, o_r, o_c, m, b_row, i_column,
    x_stride, shard_stride, residual_stride, threshold, scale_bits,
    ACC: tl.constexpr, SHARDS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = row_scale * dropout(x + x_bias) + residual, not rounded yet, x being the sum of its shards. ACC [R, BLOCK].

    Zero outside ``m``.
    """
    p = p_x + o_r[:, None] * x_stride + o_c[None, :]
    b_z = tl.load(p, m, other=0.0).to(ACC)
    for _ in tl.static_range(1, SHARDS):  # unrolled: all shards are under way before the first is added
        p += shard_stride
        b_z += tl.load(p, m, other=0.0).to(ACC)
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_r[:, None] * residual_stride + o_c[None, :], m, other=0.0)
    if b_x_bias is not None:
        b_z += b_x_bias.to(ACC)
    if i_seed is not None:
        b_z = dropout(b_z, i_seed, b_row, i_column, threshold, scale_bits, R, BLOCK)
    if b_row_scale is not None:
        b_z *= b_row_scale[:, None].to(ACC)
    if p_residual is not None:
        b_z += b_residual.to(ACC)
    return b_z


@triton.jit
def _hides_spread(b_mean, b_variance):
    """[R] Whether a LayerNorm row's mean has to be taken again.

    Sums are off by a few roundings of the mean: next to nothing where the values spread about zero, all there is where
    they hardly differ (a constant row, times 1/sqrt(eps)).
    """
    return b_variance < b_mean * b_mean * 0.0625


@triton.jit
def _store_norm(p_y, b_xhat, b_weight, b_bias, b_factor, o_y, o_c, m, ZERO_CENTERED: tl.constexpr):
    """y = (xhat * weight + bias) * factor, rounded once."""
    b_y = times_weight(b_xhat, b_weight, ZERO_CENTERED)
    if b_bias is not None:
        b_y += b_bias.to(b_y.dtype)
    if b_factor is not None:
        b_y *= b_factor.to(b_y.dtype)
    if p_y.dtype.element_ty == tl.float8e4nv:  # saturates; NaN stays NaN
        b_y = tl.where(b_y > 448.0, 448.0, tl.where(b_y < -448.0, -448.0, b_y))
    tl.store(p_y + o_y + o_c[None, :], b_y.to(p_y.dtype.element_ty), m)


@triton.jit(do_not_specialize=_VARYING)
def norm_forward_kernel(
    p_x, p_x_bias, p_row_scale, p_residual, p_seed, p_weight, p_bias, p_weight2, p_bias2, p_y_scale,
    p_z, p_y, p_y2, p_mean, p_rstd,
    x_stride, shard_stride, residual_stride, rows, cols, threshold, scale_bits: tl.int64,
    map_block: tl.int64, map_stride: tl.int64, map_offset: tl.int64,
    KIND: tl.constexpr, ZERO_CENTERED: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    SHARDS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """R whole rows a program, read once and held: BLOCK >= cols."""
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    o_c = tl.arange(0, BLOCK)
    m_r, m_c = o_r < rows, o_c < cols
    m = m_r[:, None] & m_c[None, :]
    o_y = o_r[:, None] * cols

    b_row_scale = tl.load(p_row_scale + o_r, m_r, other=0.0) if p_row_scale is not None else None
    i_seed = tl.load(p_seed) if p_seed is not None else None
    b_row = global_row(o_r, map_block, map_stride, map_offset)
    b_x_bias = load_vector(p_x_bias, o_c, m_c) if p_x_bias is not None else None
    b_z = _stream(
        p_x, b_x_bias, b_row_scale, p_residual, i_seed, o_r, o_c, m, b_row, 0,
        x_stride, shard_stride, residual_stride, threshold, scale_bits, ACC, SHARDS, R, BLOCK,
    )  # fmt: skip
    if EARLY:  # in flight while the statistics wait for the whole row, where there are registers to wait in
        b_weight = load_vector(p_weight, o_c, m_c) if p_weight is not None else None
        b_bias = load_vector(p_bias, o_c, m_c) if p_bias is not None else None
    if p_z is not None:
        b_stored = b_z.to(p_z.dtype.element_ty)
        tl.store(p_z + o_y + o_c[None, :], b_stored, m)
        b_z = b_stored.to(ACC)  # the norm is that of z as stored

    if KIND != NONE:
        b_centred = b_z
        if KIND == LAYER:
            b_mean = tl.sum(b_z, 1) / cols
            b_centred = tl.where(m_c[None, :], b_z - b_mean[:, None], 0.0)
        b_variance = tl.sum(b_centred * b_centred, 1) / cols
        if KIND == LAYER:
            m_hidden = _hides_spread(b_mean, b_variance)
            b_offset = tl.where(m_hidden, tl.sum(b_centred, 1) / cols, 0.0)
            b_exact = b_mean + b_offset
            b_offset = b_exact - b_mean  # without rounding: they are close
            b_variance = tl.maximum(b_variance - b_offset * b_offset, 0.0)
            b_mean = b_exact
            tl.store(p_mean + o_r, b_mean, m_r)
        b_rstd = tl.rsqrt(b_variance + EPS)
        tl.store(p_rstd + o_r, b_rstd, m_r)
        if KIND == LAYER:
            b_centred -= b_offset[:, None]
        b_xhat = b_centred * b_rstd[:, None]
        b_factor = tl.load(p_y_scale) if p_y_scale is not None else None
        if not EARLY:
            b_weight = load_vector(p_weight, o_c, m_c) if p_weight is not None else None
            b_bias = load_vector(p_bias, o_c, m_c) if p_bias is not None else None
        _store_norm(p_y, b_xhat, b_weight, b_bias, b_factor, o_y, o_c, m, ZERO_CENTERED)
        if p_y2 is not None:
            b_weight2 = load_vector(p_weight2, o_c, m_c) if p_weight2 is not None else None
            b_bias2 = load_vector(p_bias2, o_c, m_c) if p_bias2 is not None else None
            _store_norm(p_y2, b_xhat, b_weight2, b_bias2, b_factor, o_y, o_c, m, ZERO_CENTERED)


@triton.jit(do_not_specialize=_VARYING)
def norm_forward_chunked_kernel(
    p_x, p_x_bias, p_row_scale, p_residual, p_seed, p_weight, p_bias, p_weight2, p_bias2, p_y_scale,
    p_z, p_y, p_y2, p_mean, p_rstd,
    x_stride, shard_stride, residual_stride, rows, cols, threshold, scale_bits: tl.int64,
    map_block: tl.int64, map_stride: tl.int64, map_offset: tl.int64,
    KIND: tl.constexpr, ZERO_CENTERED: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    SHARDS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """R rows a program, too long to hold: one walk for the statistics, one that makes z again and stores y.

    Each chunk's mean and centred sum of squares are merged into the row's by Chan's formula, which has the accuracy of
    a centred second walk and spares the reading.
    """
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m_r = o_r < rows
    b_row_scale = tl.load(p_row_scale + o_r, m_r, other=0.0) if p_row_scale is not None else None
    i_seed = tl.load(p_seed) if p_seed is not None else None
    b_row = global_row(o_r, map_block, map_stride, map_offset)

    b_mean, b_squares, b_seen = tl.zeros([R], ACC), tl.zeros([R], ACC), tl.zeros([R], ACC)
    for i_c in range(0, cols, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        m_c = o_c < cols
        m = m_r[:, None] & m_c[None, :]
        b_x_bias = load_vector(p_x_bias, o_c, m_c) if p_x_bias is not None else None
        b_z = _stream(
            p_x, b_x_bias, b_row_scale, p_residual, i_seed, o_r, o_c, m, b_row, i_c,
            x_stride, shard_stride, residual_stride, threshold, scale_bits, ACC, SHARDS, R, BLOCK,
        )  # fmt: skip
        if p_z is not None:
            b_stored = b_z.to(p_z.dtype.element_ty)
            tl.store(p_z + o_r[:, None] * cols + o_c[None, :], b_stored, m)
            b_z = b_stored.to(ACC)  # the norm is that of z as stored
        if KIND == LAYER:
            b_count = tl.zeros([R], ACC) + tl.minimum(cols - i_c, BLOCK)
            b_chunk_mean = tl.sum(b_z, 1) / b_count
            b_centred = tl.where(m_c[None, :], b_z - b_chunk_mean[:, None], 0.0)
            b_delta = b_chunk_mean - b_mean
            b_share = b_count / (b_seen + b_count)
            b_squares += tl.sum(b_centred * b_centred, 1) + b_delta * b_delta * b_seen * b_share
            b_mean += b_delta * b_share
            b_seen += b_count
        elif KIND != NONE:
            b_squares += tl.sum(b_z * b_z, 1)

    if KIND != NONE:
        b_variance = b_squares / cols
        if KIND == LAYER:
            m_hidden = _hides_spread(b_mean, b_variance)
            if tl.max(m_hidden.to(tl.int32), 0) > 0:  # one more walk, about the mean that was found
                b_offset, b_squares = tl.zeros([R], ACC), tl.zeros([R], ACC)
                for i_c in range(0, cols, BLOCK):
                    o_c = i_c + tl.arange(0, BLOCK)
                    m_c = o_c < cols
                    m = m_r[:, None] & m_c[None, :]
                    b_x_bias = load_vector(p_x_bias, o_c, m_c) if p_x_bias is not None else None
                    b_z = _stream(
                        p_x, b_x_bias, b_row_scale, p_residual, i_seed, o_r, o_c, m, b_row, i_c,
                        x_stride, shard_stride, residual_stride, threshold, scale_bits, ACC, SHARDS, R, BLOCK,
                    )  # fmt: skip
                    if p_z is not None:
                        b_z = b_z.to(p_z.dtype.element_ty).to(ACC)
                    b_centred = tl.where(m_c[None, :], b_z - b_mean[:, None], 0.0)
                    b_offset += tl.sum(b_centred, 1)
                    b_squares += tl.sum(b_centred * b_centred, 1)
                b_offset = b_offset / cols
                b_exact = tl.maximum(b_squares / cols - b_offset * b_offset, 0.0)
                b_variance = tl.where(m_hidden, b_exact, b_variance)
                b_mean = tl.where(m_hidden, b_mean + b_offset, b_mean)
            tl.store(p_mean + o_r, b_mean, m_r)
        b_rstd = tl.rsqrt(b_variance + EPS)
        tl.store(p_rstd + o_r, b_rstd, m_r)
        b_factor = tl.load(p_y_scale) if p_y_scale is not None else None
        for i_c in range(0, cols, BLOCK):
            o_c = i_c + tl.arange(0, BLOCK)
            m_c = o_c < cols
            m = m_r[:, None] & m_c[None, :]
            o_y = o_r[:, None] * cols
            b_x_bias = load_vector(p_x_bias, o_c, m_c) if p_x_bias is not None else None
            b_z = _stream(
                p_x, b_x_bias, b_row_scale, p_residual, i_seed, o_r, o_c, m, b_row, i_c,
                x_stride, shard_stride, residual_stride, threshold, scale_bits, ACC, SHARDS, R, BLOCK,
            )  # fmt: skip
            if p_z is not None:
                b_z = b_z.to(p_z.dtype.element_ty).to(ACC)
            b_xhat = (b_z - b_mean[:, None]) * b_rstd[:, None]
            b_weight = load_vector(p_weight, o_c, m_c) if p_weight is not None else None
            b_bias = load_vector(p_bias, o_c, m_c) if p_bias is not None else None
            _store_norm(p_y, b_xhat, b_weight, b_bias, b_factor, o_y, o_c, m, ZERO_CENTERED)
            if p_y2 is not None:
                b_weight2 = load_vector(p_weight2, o_c, m_c) if p_weight2 is not None else None
                b_bias2 = load_vector(p_bias2, o_c, m_c) if p_bias2 is not None else None
                _store_norm(p_y2, b_xhat, b_weight2, b_bias2, b_factor, o_y, o_c, m, ZERO_CENTERED)
