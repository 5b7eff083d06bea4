// Backward of dropout + add + norm, for rows that fit on the chip with vector accesses; seqpar.h has the formula.
//
// A persistent grid: every CTA walks over rows and keeps the column sums (dweight, dbias, ...) of the rows it has seen
// in shared memory, each thread those of its own columns. At its end it writes them to its own row of the workspace,
// which reduce_partials (partials.cuh) adds up. Nothing is atomic, so the order of every sum is fixed.
#pragma once

#include "dropout.cuh"
#include "row_group.cuh"

namespace seqpar {
namespace cuda {

// The [cols] gradients, in the order of NormBackward.
enum { kDWeight, kDBias, kDWeight2, kDBias2, kDXBias, kVectors };

// 128 registers a thread: with fewer, the two rows on their way and the one being reduced do not fit.
constexpr int kBackwardThreads = 512;

// A barrier that no row's group uses: there are at most kBackwardThreads / 64 groups with a barrier of their own.
constexpr int kWholeCta = 15;
static_assert(kBackwardThreads / 64 <= kWholeCta, "");

// The next row is under way while one is reduced, but for 16 columns of f32 a thread there is no room left.
template <class X, class Z, int kUnits>
constexpr bool kBackwardPrefetch = kUnits * kWidth<X, Z> * static_cast<int>(sizeof(Z)) <= 32;

struct BackwardParams {
    NormBackward args;
    Geometry geometry;
    Divider divider;
    int rows, row_units;
    uint32_t drop_limit;
    float scale, inverse_cols;
    bool vectors_f32, is_layer, zero_centered;
    int scratch;         // bytes of shared memory before the column sums
    int slot[kVectors];  // which column sum each gradient is, -1 where it is not wanted
    int slots;
    float* partials;  // [geometry.partials][slots][cols]
};

// The column sums of one CTA in shared memory, [slots][kParts][threads] of 4 columns: no two threads share an entry,
// and neighbours lie side by side.
template <int kParts>
class ColumnSums {
  public:
    SEQPAR_DEVICE ColumnSums(char* base, int slots) : sums_(reinterpret_cast<float4*>(base)) {
        for (int i = 0; i < slots * kParts; ++i) *at(i) = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }

    // Adds values * factors.
    template <int kColumns>
    SEQPAR_DEVICE void add(int slot, int first_part, const float (&values)[kColumns],
                           const float (&factors)[kColumns]) {
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
            float4* const entry = at(slot * kParts + first_part + i);
            float4 sum = *entry;
            sum.x = fmaf(values[4 * i], factors[4 * i], sum.x);
            sum.y = fmaf(values[4 * i + 1], factors[4 * i + 1], sum.y);
            sum.z = fmaf(values[4 * i + 2], factors[4 * i + 2], sum.z);
            sum.w = fmaf(values[4 * i + 3], factors[4 * i + 3], sum.w);
            *entry = sum;
        }
    }

    template <int kColumns>
    SEQPAR_DEVICE void add(int slot, int first_part, const float (&values)[kColumns]) {
        float ones[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) ones[i] = 1.0f;
        add(slot, first_part, values, ones);
    }

    // Sum of an entry over the rows side by side, in their order.
    SEQPAR_DEVICE float4 over_rows(int slot, int part) const {
        const float4* entry = sums_ + (slot * kParts + part) * threads() + threadIdx.x;
        float4 sum = *entry;
        for (unsigned r = 1; r < blockDim.y; ++r) {
            entry += blockDim.x;
            sum.x += entry->x;
            sum.y += entry->y;
            sum.z += entry->z;
            sum.w += entry->w;
        }
        return sum;
    }

  private:
    SEQPAR_DEVICE static int threads() { return static_cast<int>(blockDim.x * blockDim.y); }
    SEQPAR_DEVICE float4* at(int entry) const {
        return sums_ + entry * threads() + static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    }

    float4* sums_;
};

// Adds dy * weight to dxhat and the row's share of dweight and dbias to the column sums.
template <class X, int kWidth, class Sums>
SEQPAR_DEVICE void through_affine(float (&dxhat)[kWidth], const float (&xhat)[kWidth], const Vec<X, kWidth>& packed,
                                  const void* weight, int dweight, int dbias, Sums& sums, int part,
                                  const BackwardParams& p, int column) {
    float dy[kWidth];
    unpack<X>(packed, dy);
    if (dbias >= 0) sums.add(dbias, part, dy);
    if (dweight >= 0) sums.add(dweight, part, dy, xhat);
    if (weight == nullptr) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) dxhat[i] += dy[i];
        return;
    }
    float w[kWidth];
    load_vector<X>(w, weight, p.vectors_f32, column);
    if (p.zero_centered) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) w[i] += 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dxhat[i] = fmaf(dy[i], w[i], dxhat[i]);
}

template <class X, class Z, int kUnits, bool kDropout>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_kernel(const __grid_constant__ BackwardParams p) {
    constexpr int W = kWidth<X, Z>;
    constexpr int kParts = kUnits * W / 4;
    constexpr bool kPrefetch = kBackwardPrefetch<X, Z, kUnits>;
    const NormBackward& a = p.args;
    RowGroup group(p.geometry, dynamic_shared());
    ColumnSums<kParts> sums(dynamic_shared() + p.scratch, p.slots);
    const auto unit_of = [&](int u) { return group.thread + u * group.stride(); };
    // Units of a thread are `apart` elements from one another: one address a row, and an addition for each more
    const auto first = [&] { return group.thread * W; };
    const int apart = group.stride() * W;
    const bool has_norm = a.norm != Norm::none;
    uint64_t seed = kDropout ? static_cast<uint64_t>(*a.dropout.seed) : 0;

    Vec<X, W> dy[kUnits];
    Vec<Z, W> z[kUnits], dz[kUnits];
    float mean = 0.0f, rstd = 0.0f;
    const auto load_row = [&](uint32_t local_row) {
        const int64_t row = local_row;
        if (has_norm) {
            rstd = *element<float>(a.rstd, row);
            if (p.is_layer) mean = *element<float>(a.mean, row);
            const Z* const z_row = element<Z>(a.z, row * a.z_stride + first());
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                if (unit_of(u) < p.row_units) load_stream(z[u], z_row + u * apart);
            }
            if (a.dy != nullptr) {
                const X* const dy_row = element<X>(a.dy, row * a.dy_stride + first());
#pragma unroll
                for (int u = 0; u < kUnits; ++u) {
                    if (unit_of(u) < p.row_units) load_stream(dy[u], dy_row + u * apart);
                }
            }
        }
        if (a.dz == nullptr) return;
        const Z* const dz_row = element<Z>(a.dz, row * a.dz_stride + first());
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (unit_of(u) < p.row_units) load_stream(dz[u], dz_row + u * apart);
        }
    };

    int row = group.first_row();
    if (kPrefetch && row < p.rows) load_row(static_cast<uint32_t>(row));
    // Rows side by side in a CTA take the same number of turns, so that whole warps meet in every shuffle
    for (; row - group.index < p.rows; row += p.geometry.row_step) {
        forget(row);
        forget(group.thread);
        forget(seed);
        const bool valid = row < p.rows;
        const int units = valid ? p.row_units : 0;
        const int64_t row64 = static_cast<uint32_t>(row);
        if (!kPrefetch && valid) load_row(static_cast<uint32_t>(row));

        // xhat and dxhat, and their sums over the row. [kUnits][W] of the row's [cols]
        float xhat[kUnits][W], dxhat[kUnits][W];
        float dot[2] = {};  // dxhat * xhat, dxhat
        const float row_rstd = rstd;
        if (has_norm) {
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                if (unit_of(u) >= units) continue;
                const int column = unit_of(u) * W;
                unpack<Z>(z[u], xhat[u]);
#pragma unroll
                for (int i = 0; i < W; ++i) {
                    xhat[u][i] = (xhat[u][i] - mean) * rstd;
                    dxhat[u][i] = 0.0f;
                }
                if (a.dy != nullptr) {
                    through_affine<X>(dxhat[u], xhat[u], dy[u], a.weight, p.slot[kDWeight], p.slot[kDBias], sums,
                                      u * W / 4, p, column);
                }
                if (a.dy2 != nullptr) {
                    Vec<X, W> dy2;
                    load_stream(dy2, element<X>(a.dy2, row64 * a.dy2_stride + column));
                    through_affine<X>(dxhat[u], xhat[u], dy2, a.weight2, p.slot[kDWeight2], p.slot[kDBias2], sums,
                                      u * W / 4, p, column);
                }
#pragma unroll
                for (int i = 0; i < W; ++i) {
                    dot[0] = fmaf(dxhat[u][i], xhat[u][i], dot[0]);
                    dot[1] += dxhat[u][i];
                }
            }
        }
        Vec<Z, W> row_dz[kUnits];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) row_dz[u] = dz[u];

        // The next row is under way while this one is reduced
        if (kPrefetch && row + p.geometry.row_step < p.rows) load_row(static_cast<uint32_t>(row + p.geometry.row_step));

        if (has_norm) group.sum(dot);
        const float along = dot[0] * p.inverse_cols, shift = p.is_layer ? dot[1] * p.inverse_cols : 0.0f;
        float factor = p.scale;
        if (a.row_scale != nullptr && valid) factor *= a.row_scale[row];
        uint32_t words[kUnits][W / 2];
        if constexpr (kDropout) {
            const uint64_t counter = global_row(a.dropout.rows, p.divider, static_cast<uint32_t>(row));
            dropout_words<W>(words, seed, counter, group.thread, group.stride());
        }

        // g, which is dresidual, and dx
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (unit_of(u) >= units) continue;
            const int column = unit_of(u) * W;
            float g[W] = {};
            if (a.dz != nullptr) unpack<Z>(row_dz[u], g);
            if (has_norm) {
#pragma unroll
                for (int i = 0; i < W; ++i) {
                    g[i] = fmaf(row_rstd, dxhat[u][i] - fmaf(xhat[u][i], along, shift), g[i]);
                }
            }
            if (a.dresidual != nullptr) store(element<Z>(a.dresidual, row64 * a.dresidual_stride + column), pack<Z>(g));
            if constexpr (kDropout) drop(g, words[u], p.drop_limit);
#pragma unroll
            for (int i = 0; i < W; ++i) g[i] *= factor;
            if (a.dx != nullptr) store(element<X>(a.dx, row64 * a.dx_stride + column), pack<X>(g));
            if (p.slot[kDXBias] >= 0) sums.add(p.slot[kDXBias], u * W / 4, g);
        }
    }

    // This CTA's share of the column sums. Not __syncthreads: that is barrier 0, where the first row's group may still
    // be
    named_barrier(kWholeCta, static_cast<int>(blockDim.x * blockDim.y));
    if (threadIdx.y != 0) return;
    for (int slot = 0; slot < p.slots; ++slot) {
        float* const partial = p.partials + (static_cast<int64_t>(group.partial_row()) * p.slots + slot) * a.cols;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const int unit = unit_of(part * 4 / W);
            if (unit >= p.row_units) continue;
            *reinterpret_cast<float4*>(partial + unit * W + part * 4 % W) = sums.over_rows(slot, part);
        }
    }
}

}  // namespace cuda
}  // namespace seqpar
