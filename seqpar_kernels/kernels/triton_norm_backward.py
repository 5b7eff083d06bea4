"""Backward kernels: a persistent grid whose programs keep fp32 sums for the vector gradients, and the sum of those.

A program takes tiles of rows ``program, program + programs, ...``; its partial sums are row ``program`` of each
[programs, cols] slot of the workspace. Which tile goes where and the order of every sum follow from shape and grid
alone, so two runs agree bit for bit.
"""
# What is None is settled when a kernel is compiled, which a type checker cannot see.
# mypy: disable-error-code="union-attr"

import triton
import triton.language as tl

from .triton_norm_forward import LAYER, NONE, load_vector, times_weight
from .triton_philox import dropout, global_row

_VARYING = ("rows", "threshold", "scale_bits", "map_block", "map_stride", "map_offset")


@triton.jit
def _load(p, stride, o_r, o_c, m):
    """[R, BLOCK] in its own dtype."""
    return tl.load(p + o_r[:, None] * stride + o_c[None, :], m, other=0.0)


@triton.jit
def _dxhat(b_dy, b_dy2, b_weight, b_weight2, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr):
    """Gradient with respect to the normalised row, from either norm or both. ACC [R, BLOCK]."""
    if b_dy2 is None:
        return times_weight(b_dy.to(ACC), b_weight, ZERO_CENTERED)
    elif b_dy is None:
        return times_weight(b_dy2.to(ACC), b_weight2, ZERO_CENTERED)
    else:
        b_first = times_weight(b_dy.to(ACC), b_weight, ZERO_CENTERED)
        return b_first + times_weight(b_dy2.to(ACC), b_weight2, ZERO_CENTERED)


@triton.jit
def _dnorm(b_dxhat, b_xhat, b_dot, b_sum, b_rstd, cols, KIND: tl.constexpr):
    """Gradient with respect to z, given the row sums of dxhat * xhat and of dxhat."""
    b_dnorm = b_dxhat - b_xhat * (b_dot / cols)[:, None]
    if KIND == LAYER:
        b_dnorm -= (b_sum / cols)[:, None]
    return b_dnorm * b_rstd[:, None]


@triton.jit
def _row_sums(b_dxhat, b_xhat, KIND: tl.constexpr):
    """Row sums of dxhat * xhat and, for the layer norm, of dxhat: joined, so that the threads meet once."""
    if KIND == LAYER:
        b_dot, b_sum = tl.split(tl.sum(tl.join(b_dxhat * b_xhat, b_dxhat), 1))
        return b_dot, b_sum
    else:
        b_dot = tl.sum(b_dxhat * b_xhat, 1)
        return b_dot, b_dot


@triton.jit
def _store_streams(
    p_dx, p_dresidual, b_g, b_row_scale, i_seed, b_row, i_column, o, m, threshold, scale_bits,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dresidual = g; dx = row_scale * dropout'(g). Returns dx unrounded."""
    if p_dresidual is not None:
        tl.store(p_dresidual + o, b_g.to(p_dresidual.dtype.element_ty), m)
    if b_row_scale is not None:
        b_g *= b_row_scale[:, None].to(b_g.dtype)
    if i_seed is not None:
        b_g = dropout(b_g, i_seed, b_row, i_column, threshold, scale_bits, R, BLOCK)
    if p_dx is not None:
        tl.store(p_dx + o, b_g.to(p_dx.dtype.element_ty), m)
    return b_g


@triton.jit
def _store_partial(p_partials, SLOT: tl.constexpr, b_sums, cols, o_c, m_c):
    if SLOT >= 0:
        p = p_partials + (SLOT * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * cols
        tl.store(p + o_c, tl.sum(b_sums, 0), m_c)


@triton.jit
def _add_partial(p_partials, SLOT: tl.constexpr, b_tile, cols, o_c, m_c, m_old):
    if SLOT >= 0:
        p = p_partials + (SLOT * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * cols
        b_old = tl.load(p + o_c, m_old, other=0.0)
        tl.store(p + o_c, b_old + tl.sum(b_tile, 0), m_c)


@triton.jit(do_not_specialize=_VARYING)
def norm_backward_kernel(
    p_dy, p_dy2, p_dz, p_z, p_mean, p_rstd, p_row_scale, p_seed, p_weight, p_weight2, p_dx, p_dresidual, p_partials,
    dy_stride, dy2_stride, dz_stride, z_stride, rows, cols, threshold, scale_bits: tl.int64,
    map_block: tl.int64, map_stride: tl.int64, map_offset: tl.int64,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, DWEIGHT2: tl.constexpr, DBIAS2: tl.constexpr, DX_BIAS: tl.constexpr,
    KIND: tl.constexpr, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of R whole rows held on chip (BLOCK >= cols); the vector gradients stay in registers across tiles.

    DWEIGHT and the like are the slots of the partial sums, -1 for one not wanted.
    """
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < cols
    if EARLY:  # once for all tiles, where there are registers to keep them in
        b_weight = load_vector(p_weight, o_c, m_c) if p_weight is not None else None
        b_weight2 = load_vector(p_weight2, o_c, m_c) if p_weight2 is not None else None
    b_dweight, b_dbias = tl.zeros([R, BLOCK], ACC), tl.zeros([R, BLOCK], ACC)
    b_dweight2, b_dbias2 = tl.zeros([R, BLOCK], ACC), tl.zeros([R, BLOCK], ACC)
    b_dx_bias = tl.zeros([R, BLOCK], ACC)
    for i_t in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        o_r = (i_t * R + tl.arange(0, R)).to(tl.int64)
        m_r = o_r < rows
        m = m_r[:, None] & m_c[None, :]
        b_g = _load(p_dz, dz_stride, o_r, o_c, m) if p_dz is not None else None
        if KIND != NONE:
            b_xhat = _load(p_z, z_stride, o_r, o_c, m).to(ACC)
            b_dy = _load(p_dy, dy_stride, o_r, o_c, m) if p_dy is not None else None
            b_dy2 = _load(p_dy2, dy2_stride, o_r, o_c, m) if p_dy2 is not None else None
            b_rstd = tl.load(p_rstd + o_r, m_r, other=0.0)
            if KIND == LAYER:
                b_xhat -= tl.load(p_mean + o_r, m_r, other=0.0)[:, None]
            b_xhat *= b_rstd[:, None]
            if not EARLY:
                b_weight = load_vector(p_weight, o_c, m_c) if p_weight is not None else None
                b_weight2 = load_vector(p_weight2, o_c, m_c) if p_weight2 is not None else None
            b_dxhat = _dxhat(b_dy, b_dy2, b_weight, b_weight2, ZERO_CENTERED, ACC)
            b_dot, b_sum = _row_sums(b_dxhat, b_xhat, KIND)
            b_dnorm = _dnorm(b_dxhat, b_xhat, b_dot, b_sum, b_rstd, cols, KIND)
            b_g = b_dnorm if b_g is None else b_dnorm + b_g.to(ACC)
            if DWEIGHT >= 0:
                b_dweight += b_dy.to(ACC) * b_xhat
            if DBIAS >= 0:
                b_dbias += b_dy.to(ACC)
            if DWEIGHT2 >= 0:
                b_dweight2 += b_dy2.to(ACC) * b_xhat
            if DBIAS2 >= 0:
                b_dbias2 += b_dy2.to(ACC)
        b_row_scale = tl.load(p_row_scale + o_r, m_r, other=0.0) if p_row_scale is not None else None
        i_seed = tl.load(p_seed) if p_seed is not None else None
        b_row = global_row(o_r, map_block, map_stride, map_offset)
        b_dx = _store_streams(
            p_dx, p_dresidual, b_g.to(ACC), b_row_scale, i_seed, b_row, 0, o_r[:, None] * cols + o_c[None, :], m,
            threshold, scale_bits, R, BLOCK,
        )  # fmt: skip
        if DX_BIAS >= 0:
            b_dx_bias += b_dx
    _store_partial(p_partials, DWEIGHT, b_dweight, cols, o_c, m_c)
    _store_partial(p_partials, DBIAS, b_dbias, cols, o_c, m_c)
    _store_partial(p_partials, DWEIGHT2, b_dweight2, cols, o_c, m_c)
    _store_partial(p_partials, DBIAS2, b_dbias2, cols, o_c, m_c)
    _store_partial(p_partials, DX_BIAS, b_dx_bias, cols, o_c, m_c)


@triton.jit(do_not_specialize=_VARYING)
def norm_backward_chunked_kernel(
    p_dy, p_dy2, p_dz, p_z, p_mean, p_rstd, p_row_scale, p_seed, p_weight, p_weight2, p_dx, p_dresidual, p_partials,
    dy_stride, dy2_stride, dz_stride, z_stride, rows, cols, threshold, scale_bits: tl.int64,
    map_block: tl.int64, map_stride: tl.int64, map_offset: tl.int64,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, DWEIGHT2: tl.constexpr, DBIAS2: tl.constexpr, DX_BIAS: tl.constexpr,
    KIND: tl.constexpr, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of R rows in chunks of BLOCK columns: one walk for the row sums, one for the gradients.

    Rows this long leave no registers for vector gradients: the partial sums stay in the workspace, where a tile of R
    rows adds to each once. The second walk and the workspace are both meant to be found in the L2 cache.
    """
    i_p = tl.program_id(0).to(tl.int64)
    for i_t in range(i_p, tl.cdiv(rows, R), tl.num_programs(0)):
        o_r = (i_t * R + tl.arange(0, R)).to(tl.int64)
        m_r = o_r < rows
        b_row_scale = tl.load(p_row_scale + o_r, m_r, other=0.0) if p_row_scale is not None else None
        i_seed = tl.load(p_seed) if p_seed is not None else None
        b_row = global_row(o_r, map_block, map_stride, map_offset)
        if KIND != NONE:
            b_rstd = tl.load(p_rstd + o_r, m_r, other=0.0)
            b_mean = tl.zeros([R], ACC)
            if KIND == LAYER:
                b_mean = tl.load(p_mean + o_r, m_r, other=0.0)
            b_dot, b_sum = tl.zeros([R], ACC), tl.zeros([R], ACC)
            for i_c in tl.range(0, cols, BLOCK, num_stages=STAGES):
                o_c = i_c + tl.arange(0, BLOCK)
                m_c = o_c < cols
                m = m_r[:, None] & m_c[None, :]
                b_xhat = (_load(p_z, z_stride, o_r, o_c, m).to(ACC) - b_mean[:, None]) * b_rstd[:, None]
                b_dy = _load(p_dy, dy_stride, o_r, o_c, m) if p_dy is not None else None
                b_dy2 = _load(p_dy2, dy2_stride, o_r, o_c, m) if p_dy2 is not None else None
                b_weight = load_vector(p_weight, o_c, m_c) if p_weight is not None else None
                b_weight2 = load_vector(p_weight2, o_c, m_c) if p_weight2 is not None else None
                b_dxhat = _dxhat(b_dy, b_dy2, b_weight, b_weight2, ZERO_CENTERED, ACC)
                b_chunk_dot, b_chunk_sum = _row_sums(b_dxhat, b_xhat, KIND)
                b_dot += b_chunk_dot
                b_sum += b_chunk_sum
        for i_c in tl.range(0, cols, BLOCK, num_stages=STAGES):
            o_c = i_c + tl.arange(0, BLOCK)
            m_c = o_c < cols
            m = m_r[:, None] & m_c[None, :]
            m_old = m_c & (tl.zeros([BLOCK], tl.int64) + i_t > i_p)
            b_g = _load(p_dz, dz_stride, o_r, o_c, m) if p_dz is not None else None
            if KIND != NONE:
                b_xhat = (_load(p_z, z_stride, o_r, o_c, m).to(ACC) - b_mean[:, None]) * b_rstd[:, None]
                b_dy = _load(p_dy, dy_stride, o_r, o_c, m) if p_dy is not None else None
                b_dy2 = _load(p_dy2, dy2_stride, o_r, o_c, m) if p_dy2 is not None else None
                b_weight = load_vector(p_weight, o_c, m_c) if p_weight is not None else None
                b_weight2 = load_vector(p_weight2, o_c, m_c) if p_weight2 is not None else None
                b_dxhat = _dxhat(b_dy, b_dy2, b_weight, b_weight2, ZERO_CENTERED, ACC)
                b_dnorm = _dnorm(b_dxhat, b_xhat, b_dot, b_sum, b_rstd, cols, KIND)
                b_g = b_dnorm if b_g is None else b_dnorm + b_g.to(ACC)
                if b_dy is not None:
                    b_dy = b_dy.to(ACC)
                    _add_partial(p_partials, DWEIGHT, b_dy * b_xhat, cols, o_c, m_c, m_old)
                    _add_partial(p_partials, DBIAS, b_dy, cols, o_c, m_c, m_old)
                if b_dy2 is not None:
                    b_dy2 = b_dy2.to(ACC)
                    _add_partial(p_partials, DWEIGHT2, b_dy2 * b_xhat, cols, o_c, m_c, m_old)
                    _add_partial(p_partials, DBIAS2, b_dy2, cols, o_c, m_c, m_old)
            b_dx = _store_streams(
                p_dx, p_dresidual, b_g.to(ACC), b_row_scale, i_seed, b_row, i_c, o_r[:, None] * cols + o_c[None, :], m,
                threshold, scale_bits, R, BLOCK,
            )  # fmt: skip
            _add_partial(p_partials, DX_BIAS, b_dx, cols, o_c, m_c, m_old)
        tl.debug_barrier()  # the next tile's threads read the sums that this one's wrote


@triton.jit
def sum_partials_kernel(
    p_partials, p_out0, p_out1, p_out2, p_out3, p_out4, programs, cols,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Column sums of each [programs, cols] slot, in one fixed order, rounded once into the slot's vector [cols]."""
    i_slot = tl.program_id(1)
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < cols
    b_sums = tl.zeros([ROWS, BLOCK], p_partials.dtype.element_ty)
    for i_r in range(0, programs, ROWS):
        o_r = i_r + tl.arange(0, ROWS)
        o = (i_slot * programs + o_r).to(tl.int64)[:, None] * cols + o_c[None, :]
        b_sums += tl.load(p_partials + o, (o_r < programs)[:, None] & m_c[None, :], other=0.0)
    b_sum = tl.sum(b_sums, 0)
    # Nested, since a pointer that is None can be left out only by a test of its own.
    if i_slot == 0:
        tl.store(p_out0 + o_c, b_sum.to(p_out0.dtype.element_ty), m_c)
    if p_out1 is not None:  # noqa: SIM102
        if i_slot == 1:
            tl.store(p_out1 + o_c, b_sum.to(p_out1.dtype.element_ty), m_c)
    if p_out2 is not None:  # noqa: SIM102
        if i_slot == 2:
            tl.store(p_out2 + o_c, b_sum.to(p_out2.dtype.element_ty), m_c)
    if p_out3 is not None:  # noqa: SIM102
        if i_slot == 3:
            tl.store(p_out3 + o_c, b_sum.to(p_out3.dtype.element_ty), m_c)
    if p_out4 is not None:  # noqa: SIM102
        if i_slot == 4:
            tl.store(p_out4 + o_c, b_sum.to(p_out4.dtype.element_ty), m_c)
