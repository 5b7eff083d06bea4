"""The sum over shards that ends a reduce-scatter: in rank order, in fp32, rounded once."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows",))
def reduce_shards_kernel(
    p_parts, p_bias, p_out, part_stride, row_stride, out_stride, rows, cols,
    COUNT: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, c] = parts[0, r, c] + ... + parts[COUNT - 1, r, c] (+ bias[c]) for one [R, BLOCK] tile."""
    blocks = tl.cdiv(cols, BLOCK)
    i_r, i_c = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_r = i_r.to(tl.int64) * R + tl.arange(0, R)
    o_c = i_c * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < cols
    m = (o_r < rows)[:, None] & m_c[None, :]
    p = p_parts + o_r[:, None] * row_stride + o_c[None, :]
    b_sum = tl.load(p, m, other=0.0).to(ACC)
    for _ in tl.static_range(1, COUNT):  # unrolled: the loads of all shards are under way before the first is added
        p += part_stride
        b_sum += tl.load(p, m, other=0.0).to(ACC)
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_c, m_c, other=0.0).to(ACC)[None, :]
    tl.store(p_out + o_r[:, None] * out_stride + o_c[None, :], b_sum.to(p_out.dtype.element_ty), m)
