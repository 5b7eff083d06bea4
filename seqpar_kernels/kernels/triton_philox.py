"""Dropout masks in Triton: the bits of ``csrc/philox.h``, computed inside the kernel that uses them."""

import triton
import triton.language as tl


@triton.jit
def global_row(o_r, map_block, map_stride, map_offset):
    """Row of the unsharded tensor for each local row. int64 [R]. ``map_block`` is at least 1."""
    return o_r // map_block * map_stride + o_r % map_block + map_offset


@triton.jit
def philox(i_seed, b_row, o_block):
    """Philox-4x32-10 of counters (column block, row low, row high, 0): four uint32 words, each [R, B].

    ``i_seed``: int64 scalar, ``b_row``: int64 [R], ``o_block``: integer [B]. Products are taken in 64 bits, since one
    wide multiply yields both halves; the key is raised in 64 bits and cut, so that nothing overflows by design.
    """
    b_k0 = i_seed.to(tl.uint32).to(tl.uint64)
    b_k1 = (i_seed >> 32).to(tl.uint32).to(tl.uint64)
    b_c0 = (o_block[None, :] + b_row[:, None] * 0).to(tl.uint32)
    b_c1 = (b_row[:, None] + o_block[None, :] * 0).to(tl.uint32)
    b_c2 = ((b_row[:, None] >> 32) + o_block[None, :] * 0).to(tl.uint32)
    b_c3 = b_c0 * 0
    for i in tl.static_range(10):
        b_p0 = b_c0.to(tl.uint64) * 0xD2511F53
        b_p1 = b_c2.to(tl.uint64) * 0xCD9E8D57
        b_c0 = (b_p1 >> 32).to(tl.uint32) ^ b_c1 ^ (b_k0 + i * 0x9E3779B9).to(tl.uint32)
        b_c2 = (b_p0 >> 32).to(tl.uint32) ^ b_c3 ^ (b_k1 + i * 0xBB67AE85).to(tl.uint32)
        b_c1 = b_p1.to(tl.uint32)
        b_c3 = b_p0.to(tl.uint32)
    return b_c0, b_c1, b_c2, b_c3


@triton.jit
def keep_mask(i_seed, b_row, i_column, threshold, R: tl.constexpr, BLOCK: tl.constexpr):
    """The elements that dropout keeps: bool [R, BLOCK] for columns ``i_column`` (a multiple of 8) onwards.

    A Philox block covers eight columns, so the rounds run on [R, BLOCK / 8] and leave one byte of verdicts each, which
    is then spread over the columns. Where a thread has eight columns, as with 16-bit tensors, spreading moves nothing;
    where it has four (fp32), the compiler runs the rounds in both owners of a block rather than exchange the byte.
    """
    o_block = i_column // 8 + tl.arange(0, BLOCK // 8)
    b_w0, b_w1, b_w2, b_w3 = philox(i_seed, b_row, o_block)
    b_byte = ((b_w0 & 0xFFFF) >= threshold).to(tl.int32)
    b_byte |= ((b_w0 >> 16) >= threshold).to(tl.int32) << 1
    b_byte |= ((b_w1 & 0xFFFF) >= threshold).to(tl.int32) << 2
    b_byte |= ((b_w1 >> 16) >= threshold).to(tl.int32) << 3
    b_byte |= ((b_w2 & 0xFFFF) >= threshold).to(tl.int32) << 4
    b_byte |= ((b_w2 >> 16) >= threshold).to(tl.int32) << 5
    b_byte |= ((b_w3 & 0xFFFF) >= threshold).to(tl.int32) << 6
    b_byte |= ((b_w3 >> 16) >= threshold).to(tl.int32) << 7
    b_spread = tl.broadcast_to(b_byte[:, :, None], [R, BLOCK // 8, 8])
    b_keep = (b_spread >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(b_keep, [R, BLOCK]) != 0


@triton.jit
def dropout(b_x, i_seed, b_row, i_column, threshold, scale_bits, R: tl.constexpr, BLOCK: tl.constexpr):
    """Kept elements times the scale, exact zeros elsewhere. [R, BLOCK] in the dtype of ``b_x``.

    The scale arrives as the bits of a double: Triton would round a Python float to fp32, too coarse for fp64 tensors.
    """
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(b_x.dtype)
    b_keep = keep_mask(i_seed, b_row, i_column, threshold, R, BLOCK)
    return tl.where(b_keep, b_x * scale, tl.zeros([R, BLOCK], b_x.dtype))
