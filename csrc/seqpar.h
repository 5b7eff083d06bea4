// The interface of the kernels: plain structs of raw pointers, sizes and strides.
// No torch and no Python anywhere under csrc/ except bindings.cpp. Strides are in elements; columns are contiguous.
#pragma once

#include <cstdint>

namespace seqpar {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, e4m3 = 4 };
enum class Norm : int32_t { none = 0, layer = 1, rms = 2 };
enum class Status : int32_t { ok = 0, unsupported = 1, bad_argument = 2, launch_failed = 3 };

// Which row of the unsharded tensor a local row is: (r / block) * stride + r % block + offset.
// [B, S/t, H] on a rank that holds rows [s0, s0 + n): block = n, stride = S, offset = s0.
// [S/t, B, H]: block = rows, stride = 0, offset = s0 * B.   Unsharded: block = rows, stride = 0, offset = 0.
struct RowMap {
    int64_t block, stride, offset;
};

// Philox dropout (philox.h). Off when seed is null. An element is kept where its 16 bits >= threshold
// (0..65536) and then multiplied by scale. seed is read where the kernel runs, so a graph replays with new seeds.
struct Dropout {
    const int64_t* seed;
    uint32_t threshold;
    double scale;
    RowMap rows;
};

// z = row_scale * dropout(x + x_bias) + residual;  y = norm(z) * weight + bias;  y2 = norm(z) * weight2 + bias2
// Arithmetic is fp32 (fp64 when x is f64); each output is rounded once. y is the norm of z as stored: the backward
// reads the z that the forward normalised, even where a row hardly varies and rounding z changes its statistics.
// Norm::none stores z alone. Null pointers switch a term off.
// With `shards` > 1, x is the sum of that many partial results, shard_stride elements apart, summed in their order and
// not rounded before z is: the end of a reduce-scatter and the norm after it, in one pass.
struct NormForward {
    int64_t rows, cols;
    Norm norm;
    bool zero_centered;  // the scale is 1 + weight
    double eps;
    DType x_dtype, z_dtype, y_dtype, w_dtype;  // z_dtype: residual and z. w_dtype: every [cols] vector
    const void* x;
    int64_t x_stride;
    int32_t shards;
    int64_t shard_stride;
    const void* x_bias;      // [cols]
    const float* row_scale;  // [rows]
    const void* residual;
    int64_t residual_stride;
    Dropout dropout;
    const void *weight, *bias, *weight2, *bias2;  // [cols]
    void* z;
    int64_t z_stride;
    void* y;
    int64_t y_stride;
    void* y2;
    int64_t y2_stride;
    const float* y_scale;  // e4m3 outputs only: y is multiplied by it before the store, which saturates
    void *mean, *rstd;     // [rows] f32 (f64 when x is f64); mean is unused by rms
};

// g = d(norm)(dy, dy2) + dz;  dresidual = g;  dx = row_scale * dropout'(g);  dx_bias = column sums of dx.
// dweight = column sums of dy * xhat, dbias = column sums of dy, with xhat = (z - mean) * rstd. Partial sums are
// f32 (f64) and reduced in an order fixed by the shape alone, so two runs agree bit for bit.
struct NormBackward {
    int64_t rows, cols;
    Norm norm;
    bool zero_centered;
    DType x_dtype, z_dtype, y_dtype, w_dtype;  // x_dtype: dx. z_dtype: z, dz, dresidual. y_dtype: dy, dy2
    const void* dy;
    int64_t dy_stride;
    const void* dy2;
    int64_t dy2_stride;
    const void* dz;
    int64_t dz_stride;
    const void* z;
    int64_t z_stride;
    const void *mean, *rstd;
    const float* row_scale;
    Dropout dropout;
    const void *weight, *weight2;
    void* dx;
    int64_t dx_stride;
    void* dresidual;
    int64_t dresidual_stride;
    void *dweight, *dbias, *dweight2, *dbias2, *dx_bias;  // [cols] w_dtype
    void* workspace;  // at least norm_backward_workspace() bytes, 256-byte aligned, contents free
};

// out[r, c] = parts[0, r, c] + parts[1, r, c] + ... + parts[count - 1, r, c] (+ bias[c]), summed in that order in f32
// (f64), rounded once. Part i starts part_stride * i elements after `parts`.
struct ReduceShards {
    int64_t rows, cols;
    int32_t count;
    DType dtype, bias_dtype;
    const void* parts;
    int64_t part_stride, row_stride;
    const void* bias;
    void* out;
    int64_t out_stride;
};

// A tensor [batch, rows, heads, columns] with strides; columns are contiguous.
struct HeadView {
    void* data;
    int64_t batch, row, head;
};

// Scores of one block of queries against one block of keys, shared by forward and backward:
// s = scale * q k^T;  s = softcap * tanh(s / softcap) where softcap > 0;  s += bias.
// Row i sees key j where i + shift - left <= j <= i + shift + right (a negative bound is none; causal: right = 0),
// where first[i] <= j < last[i], and where the mask is not zero. shift is the position of the first query less that of
// the first key. Query head h reads key head h / (q_heads / kv_heads). A weight is dropped by (seed, row, column) as in
// philox.h, with
//   row = ((first_batch + b) * all_heads + first_head + h) * all_rows + position of i,   column = position of j.
struct AttentionScores {
    int64_t batch, q_rows, k_rows, q_heads, kv_heads, head_dim, value_dim;
    DType dtype;  // of q, k, v, out and dout
    HeadView q, k, v;
    double scale, softcap;
    int64_t shift, left, right;
    const int32_t *first, *last;  // [batch, q_rows], or null for both
    int64_t interval_batch;       // their stride
    const void* bias;             // dtype or f32 (f64)
    DType bias_dtype;
    int64_t bias_batch, bias_head, bias_row, bias_key;
    const uint8_t* mask;
    int64_t mask_batch, mask_head, mask_row, mask_key;
    const int64_t* seed;  // null: no dropout
    uint32_t threshold;
    double dropout_scale;
    int64_t first_batch, all_heads, first_head, all_rows;
    int64_t q_offset, k_offset;                // positions of row 0 and key 0, the rest follow
    const int64_t *q_positions, *k_positions;  // or one for each
};

// With p = exp2(s * log2(e) - m), m an integer no smaller than any rounded s * log2(e) so far: acc = sum of p v,
// l = sum of p. Rescaling by powers of two is exact, and a row's sums run key by key: keys given in several calls that
// resume give the bits of a single call, as long as they were cut at multiples of 8.
// out = acc / l and lse = log(l) + m log(2); out is 0 and lse -inf where a row sees no key.
struct AttentionForward {
    AttentionScores scores;
    bool resume;     // start from the state instead of from nothing
    HeadView acc;    // f32 (f64), or null: the state is not kept
    double* maxima;  // m and l, [batch, q_heads, q_rows] each, or null with acc
    double* sums;
    HeadView out;  // null: nothing is finished
    void* lse;     // f32 (f64) [batch, q_heads, q_rows]
};

// p = dropout'(exp(s - lse)) with the lse of all keys the rows ever see, in this block or in another;
// ds = p * (dout v^T - delta + dlse);  dq = scale * ds k;  dk = scale * ds^T q;  dv = p^T dout.
// Gradients that are null are not computed. Sums run query by query and key by key in f32 (f64). With accumulate the
// gradients are added to the buffers, which are then f32 (f64).
struct AttentionBackward {
    AttentionScores scores;
    HeadView out;  // read for delta = rowsum(dout * out) where delta is null
    HeadView dout;
    const void *lse, *delta, *dlse;  // f32 (f64) [batch, q_heads, q_rows]
    bool accumulate;
    DType grad_dtype;  // of dq, dk and dv: dtype or f32 (f64)
    HeadView dq, dk, dv;
};

// out = sum of exp(lse_i - lse) out_i, lse = log(sum of exp(lse_i)), summed in the order given, in f32 (f64). A part
// whose lse is -inf is ignored, whatever its out holds.
struct AttentionPart {
    HeadView out;
    const void* lse;
};
struct AttentionMerge {
    int64_t batch, rows, heads, columns;
    DType dtype, out_dtype;  // of the parts; of the result: dtype or f32 (f64)
    int32_t count;
    const AttentionPart* parts;
    HeadView out;
    void* lse;
};

namespace cpu {
Status norm_forward(const NormForward& args, int threads);
Status norm_backward(const NormBackward& args, int threads);
int64_t norm_backward_workspace(const NormBackward& args);
Status reduce_shards(const ReduceShards& args, int threads);
Status attention_forward(const AttentionForward& args, int threads);
Status attention_backward(const AttentionBackward& args, int threads);
Status attention_merge(const AttentionMerge& args, int threads);
const char* isa();        // the instruction set chosen for this machine: "avx512", "avx2", "neon", "baseline"
const char* threading();  // "openmp" (the runtime torch has loaded) or "std::thread"
// Sets the bound in bytes above which norms store their results past the cache; returns the former bound. The first
// bound is half of the last-level cache.
int64_t stream_beyond(int64_t bytes);
}  // namespace cpu

namespace cuda {
// sm_margin: multiprocessors left free for communication running beside the kernel.
Status norm_forward(const NormForward& args, int sm_margin, void* stream);
Status norm_backward(const NormBackward& args, int sm_margin, void* stream);
int64_t norm_backward_workspace(const NormBackward& args, int sm_margin);
Status reduce_shards(const ReduceShards& args, void* stream);
const char* archs();  // what the kernels were compiled for, e.g. "80;90a;100a"
}  // namespace cuda

}  // namespace seqpar
