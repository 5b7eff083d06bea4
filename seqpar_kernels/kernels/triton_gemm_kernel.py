"""The matmul kernel that waits for its rows or signals them: device code of :mod:`.triton_gemm`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import triton
import triton.language as tl

# Arguments that vary from call to call are not specialised, so that Triton does not compile again for them.
_VARYING = ("epoch", "polls", "chunks", "flag")


@triton.jit
def _reached(p_flag, epoch, polls):
    """Polls until the flag has reached ``epoch``; False when the polls ran out.

    One thread polls and broadcasts to the block, so that all warps leave the loop together and see all writes before
    the flag was raised. Epochs are compared by their difference, which may wrap around.
    """
    missing = epoch - tl.atomic_add(p_flag, 0, sem="acquire", scope="sys")
    while (missing > 0) & (polls > 0):
        missing = epoch - tl.atomic_add(p_flag, 0, sem="acquire", scope="sys")
        polls -= 1
    return missing <= 0


@triton.jit
def _raise(p_flag, p_count, epoch, done, tiles):
    """Adds the block's tiles to the finished ones; the block that adds the last raises the flag and resets the count.

    Release and acquire make the tiles of other blocks visible to this block, and its own release makes all tiles
    visible to any reader of the flag, on this device or another.
    """
    tl.debug_barrier()  # all warps have stored their parts
    if tl.atomic_add(p_count, done, sem="acq_rel", scope="gpu") + done == tiles:
        tl.atomic_xchg(p_count, 0, sem="relaxed", scope="gpu")
        tl.atomic_xchg(p_flag, epoch, sem="release", scope="sys")


@triton.jit
def _place(i_tile, strips, blocks, GROUP: tl.constexpr):
    """Strip and column block of a tile: GROUP strips share each block of the weight while it lies in the L2 cache."""
    i_first = i_tile // (GROUP * blocks) * GROUP
    height = tl.minimum(strips - i_first, GROUP)
    i_inside = i_tile % (GROUP * blocks)
    return i_first + i_inside % height, i_inside // height


@triton.jit
def _load_x(x, i_row, i_k, stop, k, x_stride, TMA: tl.constexpr, EVEN: tl.constexpr,
            BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """[BM, BK]. Rows from ``stop`` on belong to another chunk: TMA may load them too early, and they are not stored."""
    if TMA:
        return x.load([i_row, i_k])
    else:
        o_r = i_row + tl.arange(0, BM)
        o_k = i_k + tl.arange(0, BK)
        m = (o_r < stop)[:, None] if EVEN else (o_r < stop)[:, None] & (o_k < k)[None, :]
        return tl.load(x + o_r.to(tl.int64)[:, None] * x_stride + o_k[None, :], m, other=0.0)


@triton.jit
def _load_weight(weight, i_n, i_k, n, k, n_stride, k_stride, TMA: tl.constexpr, EVEN: tl.constexpr,
                 TRANSPOSED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """[BK, BN] of a weight [N, K] that lies in memory as it is, or TRANSPOSED."""
    if TMA and TRANSPOSED:
        return weight.load([i_k, i_n])
    elif TMA:
        return weight.load([i_n, i_k]).T
    else:
        o_n = i_n + tl.arange(0, BN)
        o_k = i_k + tl.arange(0, BK)
        m = (o_n < n)[None, :] if EVEN else (o_n < n)[None, :] & (o_k < k)[:, None]
        p = weight + o_n.to(tl.int64)[None, :] * n_stride + o_k.to(tl.int64)[:, None] * k_stride
        return tl.load(p, m, other=0.0)


@triton.jit
def _store(p_out, p_bias, b_out, i_row, i_n, stop, n, out_stride, BM: tl.constexpr, BN: tl.constexpr):
    """out = b_out + bias, rounded once.

    Not by TMA: its stores are not complete where a thread releases, and the chunk may end inside the tile.
    """
    o_r = i_row + tl.arange(0, BM)
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < n
    if p_bias is not None:
        b_out += tl.load(p_bias + o_n, m_n, other=0.0).to(tl.float32)[None, :]
    p = p_out + o_r.to(tl.int64)[:, None] * out_stride + o_n[None, :]
    tl.store(p, b_out.to(p_out.dtype.element_ty), (o_r < stop)[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=_VARYING)
def await_kernel(p_flags, p_status, flag, epoch, polls):
    """Ends when the flag has reached ``epoch``; later work of the stream sees the data that the flag guards."""
    if not _reached(p_flags + flag, epoch, polls):
        tl.atomic_cas(p_status, 0, flag + 1, sem="relaxed", scope="gpu")


@triton.jit(do_not_specialize=_VARYING)
def gemm_kernel(
    x, weight, p_bias, p_out, p_chunks, p_flags, p_counts, p_epoch, p_status,
    epoch, polls, chunks, n, k, x_stride, n_stride, k_stride, out_stride,
    TMA: tl.constexpr, FENCE: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = x @ weight.T + bias, chunk after chunk; the programs deal all tiles among themselves in that order.

    ``p_chunks``: int32 [chunks, 4]: first row, row after the last, flag (-1: none), strips of BM rows of all chunks
    with that flag. With ``p_status`` a chunk is begun when its flag has reached the epoch; with ``p_counts`` its flag
    is raised when all of its tiles are stored. ``x`` and ``weight`` are tensor descriptors with TMA, else pointers.
    """
    programs = tl.num_programs(0)
    blocks = tl.cdiv(n, BN)
    if p_epoch is not None:
        epoch = tl.load(p_epoch)
    in_time = True
    i_first = tl.program_id(0)  # of this program's tiles, counted from the first tile of the chunk
    i_chunk = 0
    while i_chunk < chunks:  # a while loop, since Triton would flatten a for loop
        start, stop = tl.load(p_chunks + 4 * i_chunk), tl.load(p_chunks + 4 * i_chunk + 1)
        flag = tl.load(p_chunks + 4 * i_chunk + 2)
        strips = tl.cdiv(stop - start, BM)
        tiles = strips * blocks
        mine = tl.cdiv(tl.maximum(tiles - i_first, 0), programs)
        if p_status is not None:  # noqa: SIM102 (settled when compiled; the next when run)
            if in_time & (flag >= 0) & (mine > 0):
                in_time = _reached(p_flags + flag, epoch, polls)
                if not in_time:
                    tl.atomic_cas(p_status, 0, flag + 1, sem="relaxed", scope="gpu")
                if FENCE:  # orders later TMA loads after this thread's acquire
                    tl.inline_asm_elementwise(
                        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
                    )
        last = tiles if in_time else 0  # rows that did not arrive are not multiplied
        for i_tile in tl.range(i_first, last, programs, flatten=FLATTEN):
            i_m, i_b = _place(i_tile, strips, blocks, GROUP)
            i_row, i_n = start + i_m * BM, i_b * BN
            b_out = tl.zeros([BM, BN], tl.float32)
            for i_k in range(0, k, BK):
                b_x = _load_x(x, i_row, i_k, stop, k, x_stride, TMA, EVEN, BM, BK)
                b_weight = _load_weight(weight, i_n, i_k, n, k, n_stride, k_stride, TMA, EVEN, TRANSPOSED, BN, BK)
                b_out = tl.dot(b_x, b_weight, b_out, input_precision=PRECISION)
            # In halves, which need less shared memory for the layout conversion.
            b_halves = tl.permute(tl.reshape(b_out, [BM, 2, BN // 2]), [0, 2, 1])
            b_left, b_right = tl.split(b_halves)
            _store(p_out, p_bias, b_left, i_row, i_n, stop, n, out_stride, BM, BN // 2)
            _store(p_out, p_bias, b_right, i_row, i_n + BN // 2, stop, n, out_stride, BM, BN // 2)
        if p_counts is not None:  # noqa: SIM102
            if (flag >= 0) & (mine > 0):
                all_strips = tl.load(p_chunks + 4 * i_chunk + 3)
                _raise(p_flags + flag, p_counts + flag, epoch, mine, all_strips * blocks)
        i_first += mine * programs - tiles
        i_chunk += 1
