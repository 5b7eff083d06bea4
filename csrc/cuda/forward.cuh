// dropout + add + norm, forward, for rows that fit on the chip with vector accesses; seqpar.h has the formula.
#pragma once

#include "dropout.cuh"
#include "row_group.cuh"

namespace seqpar {
namespace cuda {

// 64 registers a thread: 16 columns of 16-bit rows or 8 of f32 rows, with the next row behind them.
constexpr int kForwardThreads = 1024;

// Shards of x that a thread loads at one time: as many as 64 registers hold beside its columns of z.
template <int kColumns>
constexpr int kShardsInFlight = kColumns > 8 ? 2 : 4;

// The arguments, and what follows from them. Parameters lie in constant memory, where they take no registers.
struct ForwardParams {
    NormForward args;
    Geometry geometry;
    Divider divider;
    int rows, row_units;
    uint32_t drop_limit;
    float scale, inverse_cols, eps;
    bool vectors_f32, is_layer, zero_centered;
};

// y = values * weight + bias, where the vectors are f32 or of dtype X.
template <class X, int kWidth>
SEQPAR_DEVICE void affine(float (&y)[kWidth], const float (&values)[kWidth], const void* weight, const void* bias,
                          const ForwardParams& p, int column) {
    float w[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        w[i] = 1.0f;
        y[i] = 0.0f;
    }
    if (weight != nullptr) load_vector<X>(w, weight, p.vectors_f32, column);
    if (bias != nullptr) load_vector<X>(y, bias, p.vectors_f32, column);
    if (p.zero_centered && weight != nullptr) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) w[i] += 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] = fmaf(values[i], w[i], y[i]);
}

template <class X, int kWidth>
SEQPAR_DEVICE void store_y(void* y, int64_t index, float (&values)[kWidth], const NormForward& a) {
    if (a.y_dtype != DType::e4m3) {
        store(element<X>(y, index), pack<X>(values));
        return;
    }
    if (a.y_scale != nullptr) {
        const float scale = *a.y_scale;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[i] *= scale;
    }
    store(element<e4m3>(y, index), pack<e4m3>(values));
}

template <class X, class Z, int kUnits, bool kDropout, bool kShards>
__global__ void __launch_bounds__(kForwardThreads, 1) forward_kernel(const __grid_constant__ ForwardParams p) {
    constexpr int W = kWidth<X, Z>;
    const NormForward& a = p.args;
    RowGroup group(p.geometry, dynamic_shared());
    const auto unit_of = [&](int u) { return group.thread + u * group.stride(); };
    // Units of a thread are `apart` elements from one another: one address a row, and an addition for each more
    const auto first = [&] { return group.thread * W; };
    const int apart = group.stride() * W;

    uint64_t seed = kDropout ? static_cast<uint64_t>(*a.dropout.seed) : 0;

    Vec<X, W> x[kUnits];
    Vec<Z, W> residual[kUnits];
    const auto load_row = [&](uint32_t local_row) {
        const int64_t row = local_row;
        const X* const x_row = element<X>(a.x, row * a.x_stride + first());
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (unit_of(u) < p.row_units) load_stream(x[u], x_row + u * apart);
        }
        if (a.residual == nullptr) return;
        const Z* const residual_row = element<Z>(a.residual, row * a.residual_stride + first());
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (unit_of(u) < p.row_units) load_stream(residual[u], residual_row + u * apart);
        }
    };

    int row = group.first_row();
    if (!kShards && row < p.rows) load_row(static_cast<uint32_t>(row));
    // Rows side by side in a CTA take the same number of turns, so that whole warps meet in every shuffle
    for (; row - group.index < p.rows; row += p.geometry.row_step) {
        forget(row);
        forget(group.thread);
        forget(seed);
        const bool valid = row < p.rows;
        const int units = valid ? p.row_units : 0;
        const int64_t row64 = static_cast<uint32_t>(row);

        // z [kUnits][W] of the row's [cols]
        float z[kUnits][W];
        uint32_t words[kUnits][W / 2];
        float factor = p.scale;
        if (a.row_scale != nullptr && valid) factor *= a.row_scale[row];
        if constexpr (kDropout) {
            const uint64_t counter = global_row(a.dropout.rows, p.divider, static_cast<uint32_t>(row));
            dropout_words<W>(words, seed, counter, group.thread, group.stride());
        }
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if constexpr (kShards) {
#pragma unroll
                for (int i = 0; i < W; ++i) z[u][i] = 0.0f;
                if (unit_of(u) < units) {
                    const int64_t column = first() + u * apart;
                    if (a.residual != nullptr) {
                        load_stream(residual[u], element<Z>(a.residual, row64 * a.residual_stride + column));
                    }
                    add_shards<kShardsInFlight<kUnits * W>>(z[u], element<X>(a.x, row64 * a.x_stride + column),
                                                            a.shard_stride, a.shards);
                }
            } else {
                unpack<X>(x[u], z[u]);
            }
            if (a.x_bias != nullptr && unit_of(u) < units) {
                float bias[W];
                load_vector<X>(bias, a.x_bias, p.vectors_f32, unit_of(u) * W);
#pragma unroll
                for (int i = 0; i < W; ++i) z[u][i] += bias[i];
            }
            if constexpr (kDropout) drop(z[u], words[u], p.drop_limit);
            float added[W] = {};
            if (a.residual != nullptr) unpack<Z>(residual[u], added);
#pragma unroll
            for (int i = 0; i < W; ++i) z[u][i] = fmaf(z[u][i], factor, added[i]);
        }

        // The next row is under way while this one is reduced; of shards there are too many to hold
        if (!kShards && row + p.geometry.row_step < p.rows) load_row(static_cast<uint32_t>(row + p.geometry.row_step));

        if (a.z != nullptr) {
            Z* const z_row = element<Z>(a.z, row64 * a.z_stride + first());
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                const auto packed = pack<Z>(z[u]);
                if (unit_of(u) < units) store(z_row + u * apart, packed);
                unpack<Z>(packed, z[u]);  // the norm is that of z as stored
            }
        }
        if (a.norm == Norm::none) continue;

        // Statistics, the variance about the mean
        float mean = 0.0f;
        if (p.is_layer) {
            float sum[1] = {};
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                if (unit_of(u) >= units) continue;
#pragma unroll
                for (int i = 0; i < W; ++i) sum[0] += z[u][i];
            }
            group.sum(sum);
            mean = sum[0] * p.inverse_cols;
        }
        float squares[1] = {};
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
            for (int i = 0; i < W; ++i) z[u][i] -= mean;
            if (unit_of(u) >= units) continue;
#pragma unroll
            for (int i = 0; i < W; ++i) squares[0] = fmaf(z[u][i], z[u][i], squares[0]);
        }
        group.sum(squares);
        // Alike for all threads of a row; rows that share a warp go through it together, which changes nothing for
        // those that need it not
        float variance = squares[0] * p.inverse_cols;
        const bool hidden = p.is_layer && hides_spread(mean, variance);
        if (__any_sync(0xFFFFFFFFu, hidden)) {
            float offset[1] = {};
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                if (unit_of(u) >= units) continue;
#pragma unroll
                for (int i = 0; i < W; ++i) offset[0] += z[u][i];
            }
            group.sum(offset);
            const float exact = hidden ? fmaf(offset[0], p.inverse_cols, mean) : mean;
            offset[0] = exact - mean;  // without rounding: they are close
            variance = fmaf(-offset[0], offset[0], variance);
            variance = variance > 0.0f ? variance : 0.0f;
            mean = exact;
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
#pragma unroll
                for (int i = 0; i < W; ++i) z[u][i] -= offset[0];
            }
        }
        const float rstd = reciprocal_sqrt(variance + p.eps);
        if (group.thread == 0 && valid) {
            if (p.is_layer && a.mean != nullptr) *element<float>(a.mean, row) = mean;
            if (a.rstd != nullptr) *element<float>(a.rstd, row) = rstd;
        }

        // y
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (unit_of(u) >= units) continue;
            const int column = unit_of(u) * W;
            float y[W];
#pragma unroll
            for (int i = 0; i < W; ++i) z[u][i] *= rstd;
            if (a.y != nullptr) {
                affine<X>(y, z[u], a.weight, a.bias, p, column);
                store_y<X>(a.y, row64 * a.y_stride + column, y, a);
            }
            if (a.y2 != nullptr) {
                affine<X>(y, z[u], a.weight2, a.bias2, p, column);
                store_y<X>(a.y2, row64 * a.y2_stride + column, y, a);
            }
        }
    }
}

}  // namespace cuda
}  // namespace seqpar
