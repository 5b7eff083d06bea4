// The same operations for everything the planned kernels do not take: fp64, columns or strides that vectors do not fit,
// mixtures of dtypes, rows longer than the chip holds, more rows than 32 bits count. One element to an access.
#pragma once

#include "dropout.cuh"
#include "partials.cuh"
#include "row_group.cuh"

namespace seqpar {
namespace cuda {

struct GenericForwardParams {
    NormForward args;
    Geometry geometry;
    double inverse_cols;
    int scratch;    // bytes of shared memory before the held rows
    bool hold_row;  // shared memory has room for z
};

struct GenericBackwardParams {
    NormBackward args;
    Geometry geometry;
    double inverse_cols;
    int slot[5];  // which column sum each gradient is, in the order of NormBackward; -1 where it is not wanted
    int slots;
    void* partials;  // [row_step][slots][cols] of Acc
};

SEQPAR_DEVICE uint64_t global_row(const RowMap& map, int64_t row) {
    const int64_t block = map.block > 0 ? map.block : 1;
    return static_cast<uint64_t>(row / block * map.stride + row % block + map.offset);
}

// Sets dropped ones of 8 columns to zero.
template <class Acc>
SEQPAR_DEVICE void drop_block(Acc (&values)[8], const Dropout& dropout, uint64_t seed, int64_t row, int owner) {
    const Bits128 block = philox(seed, global_row(dropout.rows, row), static_cast<uint32_t>(owner));
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = dropout_bits(block, i) >= dropout.threshold ? values[i] : Acc(0);
}

template <class Acc>
SEQPAR_DEVICE void load_block(Acc (&values)[8], const void* base, DType dtype, int64_t index, int count) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < count ? load_element<Acc>(base, dtype, index + i) : Acc(0);
}

template <class Acc>
SEQPAR_DEVICE void store_block(void* base, DType dtype, int64_t index, int count, const Acc (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < count) store_element<Acc>(base, dtype, index + i, values[i]);
    }
}

// z of columns 8 * owner ..., as it is stored
template <class Acc>
SEQPAR_DEVICE void compute_z(Acc (&z)[8], const NormForward& a, uint64_t seed, int64_t row, int owner, int count) {
    const int64_t column = int64_t{owner} * 8;
    load_block(z, a.x, a.x_dtype, row * a.x_stride + column, count);
    Acc other[8];
    for (int shard = 1; shard < a.shards; ++shard) {
        load_block(other, a.x, a.x_dtype, shard * a.shard_stride + row * a.x_stride + column, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i] += other[i];
    }
    if (a.x_bias != nullptr) {
        load_block(other, a.x_bias, a.w_dtype, column, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i] += other[i];
    }
    if (a.dropout.seed != nullptr) {
        drop_block(z, a.dropout, seed, row, owner);
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i] *= static_cast<Acc>(a.dropout.scale);
    }
    if (a.row_scale != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i] *= static_cast<Acc>(a.row_scale[row]);
    }
    if (a.residual != nullptr) {
        load_block(other, a.residual, a.z_dtype, row * a.residual_stride + column, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i] += other[i];
    }
    if (a.z != nullptr) {  // stored, and read back: the norm is that of z as stored
        store_block(a.z, a.z_dtype, row * a.z_stride + column, count, z);
        load_block(z, a.z, a.z_dtype, row * a.z_stride + column, count);
    }
}

template <class Acc>
SEQPAR_DEVICE void store_affine(void* y, int64_t index, int64_t column, int count, const Acc (&xhat)[8],
                                const void* weight, const void* bias, const NormForward& a) {
    Acc values[8], other[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = xhat[i];
    if (weight != nullptr) {
        load_block(other, weight, a.w_dtype, column, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= a.zero_centered ? Acc(1) + other[i] : other[i];
    }
    if (bias != nullptr) {
        load_block(other, bias, a.w_dtype, column, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += other[i];
    }
    if (a.y_dtype == DType::e4m3 && a.y_scale != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= static_cast<Acc>(*a.y_scale);
    }
    store_block(y, a.y_dtype, index, count, values);
}

template <class Acc>
__global__ void __launch_bounds__(256, 2) generic_forward_kernel(const __grid_constant__ GenericForwardParams p) {
    const NormForward& a = p.args;
    RowGroup group(p.geometry, dynamic_shared());
    const int owners = static_cast<int>((a.cols + 7) / 8);
    const bool is_layer = a.norm == Norm::layer;
    const Acc inverse_cols = static_cast<Acc>(p.inverse_cols);
    const uint64_t seed = a.dropout.seed != nullptr ? static_cast<uint64_t>(*a.dropout.seed) : 0;
    Acc* const held = reinterpret_cast<Acc*>(dynamic_shared() + p.scratch) + int64_t{group.index} * owners * 8;

    for (int64_t base = group.first_row() - group.index; base < a.rows; base += p.geometry.row_step) {
        const int64_t row = base + group.index;
        const int mine = row < a.rows ? owners : 0;
        bool in_shared = false;
        // Calls visit(owner, count, z) for the thread's columns. The first walk over a row may hold it.
        const auto for_columns = [&](auto visit) {
            for (int owner = group.thread; owner < mine; owner += group.stride()) {
                const int64_t left = a.cols - int64_t{owner} * 8;
                const int count = left < 8 ? static_cast<int>(left) : 8;
                Acc z[8];
                if (in_shared) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) z[i] = held[owner * 8 + i];
                } else {
                    compute_z(z, a, seed, row, owner, count);
                    if (p.hold_row) {
#pragma unroll
                        for (int i = 0; i < 8; ++i) held[owner * 8 + i] = z[i];
                    }
                }
                visit(owner, count, z);
            }
            in_shared = p.hold_row;
        };

        Acc mean = 0, rstd = 0;
        if (is_layer) {
            Acc sum[1] = {};
            for_columns([&](int, int count, const Acc(&z)[8]) {
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[0] += i < count ? z[i] : Acc(0);
            });
            group.sum(sum);
            mean = sum[0] * inverse_cols;
        }
        if (a.norm != Norm::none) {
            Acc squares[1] = {};
            for_columns([&](int, int count, const Acc(&z)[8]) {
#pragma unroll
                for (int i = 0; i < 8; ++i) squares[0] += i < count ? (z[i] - mean) * (z[i] - mean) : Acc(0);
            });
            group.sum(squares);
            const bool hidden = is_layer && hides_spread(mean, squares[0] * inverse_cols);
            if (__any_sync(0xFFFFFFFFu, hidden)) {  // see forward.cuh
                Acc offset[1] = {};
                for_columns([&](int, int count, const Acc(&z)[8]) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) offset[0] += i < count ? z[i] - mean : Acc(0);
                });
                group.sum(offset);
                if (hidden) mean += offset[0] * inverse_cols;
                squares[0] = 0;
                for_columns([&](int, int count, const Acc(&z)[8]) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) squares[0] += i < count ? (z[i] - mean) * (z[i] - mean) : Acc(0);
                });
                group.sum(squares);
            }
            rstd = reciprocal_sqrt(squares[0] * inverse_cols + static_cast<Acc>(a.eps));
            if (group.thread == 0 && mine > 0) {
                if (is_layer && a.mean != nullptr) *element<Acc>(a.mean, row) = mean;
                if (a.rstd != nullptr) *element<Acc>(a.rstd, row) = rstd;
            }
        }
        for_columns([&](int owner, int count, Acc(&z)[8]) {
            const int64_t column = int64_t{owner} * 8;
            if (a.norm == Norm::none) return;
#pragma unroll
            for (int i = 0; i < 8; ++i) z[i] = (z[i] - mean) * rstd;
            if (a.y != nullptr) store_affine(a.y, row * a.y_stride + column, column, count, z, a.weight, a.bias, a);
            if (a.y2 != nullptr)
                store_affine(a.y2, row * a.y2_stride + column, column, count, z, a.weight2, a.bias2, a);
        });
    }
}

template <class Acc>
SEQPAR_DEVICE void add_to_sums(void* partials, int64_t index, int count, const Acc (&values)[8]) {
    Acc* const sums = static_cast<Acc*>(partials) + index;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < count) sums[i] += values[i];
    }
}

// xhat and dxhat of columns 8 * owner ...; with kSums also the row's share of dweight and dbias
template <bool kSums, class Acc>
SEQPAR_DEVICE void compute_dxhat(Acc (&xhat)[8], Acc (&dxhat)[8], const GenericBackwardParams& p, int64_t row,
                                 int64_t sums_row, int owner, int count) {
    const NormBackward& a = p.args;
    const int64_t column = int64_t{owner} * 8;
    const Acc rstd = *element<Acc>(a.rstd, row);
    const Acc mean = a.norm == Norm::layer ? *element<Acc>(a.mean, row) : Acc(0);
    load_block(xhat, a.z, a.z_dtype, row * a.z_stride + column, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        xhat[i] = i < count ? (xhat[i] - mean) * rstd : Acc(0);
        dxhat[i] = 0;
    }
#pragma unroll
    for (int second = 0; second < 2; ++second) {
        const void* const grad = second ? a.dy2 : a.dy;
        const void* const weight = second ? a.weight2 : a.weight;
        if (grad == nullptr) continue;
        Acc dy[8], w[8];
        load_block(dy, grad, a.y_dtype, row * (second ? a.dy2_stride : a.dy_stride) + column, count);
        if (weight != nullptr) load_block(w, weight, a.w_dtype, column, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            dxhat[i] += weight == nullptr ? dy[i] : dy[i] * (a.zero_centered ? Acc(1) + w[i] : w[i]);
            w[i] = dy[i] * xhat[i];
        }
        if (!kSums) continue;
        const int dweight = p.slot[2 * second], dbias = p.slot[2 * second + 1];
        if (dweight >= 0) add_to_sums(p.partials, (sums_row + dweight) * a.cols + column, count, w);
        if (dbias >= 0) add_to_sums(p.partials, (sums_row + dbias) * a.cols + column, count, dy);
    }
}

template <class Acc>
__global__ void __launch_bounds__(256, 2) generic_backward_kernel(const __grid_constant__ GenericBackwardParams p) {
    const NormBackward& a = p.args;
    RowGroup group(p.geometry, dynamic_shared());
    const int owners = static_cast<int>((a.cols + 7) / 8);
    const bool has_norm = a.norm != Norm::none;
    const Acc inverse_cols = static_cast<Acc>(p.inverse_cols);
    const uint64_t seed = a.dropout.seed != nullptr ? static_cast<uint64_t>(*a.dropout.seed) : 0;
    const int64_t sums_row = int64_t{group.first_row()} * p.slots;
    const auto columns_of = [&](int owner) {
        const int64_t left = a.cols - int64_t{owner} * 8;
        return left < 8 ? static_cast<int>(left) : 8;
    };
    for (int slot = 0; slot < p.slots; ++slot) {
        for (int owner = group.thread; owner < owners; owner += group.stride()) {
            Acc* const sums = static_cast<Acc*>(p.partials) + (sums_row + slot) * a.cols + int64_t{owner} * 8;
            for (int i = 0; i < columns_of(owner); ++i) sums[i] = 0;
        }
    }

    for (int64_t base = group.first_row() - group.index; base < a.rows; base += p.geometry.row_step) {
        const int64_t row = base + group.index;
        const int mine = row < a.rows ? owners : 0;
        Acc xhat[8], dxhat[8];
        Acc dot[2] = {};  // dxhat * xhat, dxhat
        if (has_norm) {
            for (int owner = group.thread; owner < mine; owner += group.stride()) {
                compute_dxhat<true>(xhat, dxhat, p, row, sums_row, owner, columns_of(owner));
#pragma unroll
                for (int i = 0; i < 8; ++i) {  // zeros past the last column
                    dot[0] += dxhat[i] * xhat[i];
                    dot[1] += dxhat[i];
                }
            }
            group.sum(dot);
            dot[0] *= inverse_cols;
            dot[1] = a.norm == Norm::layer ? dot[1] * inverse_cols : Acc(0);
        }
        for (int owner = group.thread; owner < mine; owner += group.stride()) {
            const int count = columns_of(owner);
            const int64_t column = int64_t{owner} * 8;
            Acc g[8] = {};
            if (a.dz != nullptr) load_block(g, a.dz, a.z_dtype, row * a.dz_stride + column, count);
            if (has_norm) {
                const Acc rstd = *element<Acc>(a.rstd, row);
                compute_dxhat<false>(xhat, dxhat, p, row, sums_row, owner, count);
#pragma unroll
                for (int i = 0; i < 8; ++i) g[i] += rstd * (dxhat[i] - xhat[i] * dot[0] - dot[1]);
            }
            if (a.dresidual != nullptr) {
                store_block(a.dresidual, a.z_dtype, row * a.dresidual_stride + column, count, g);
            }
            if (a.dropout.seed != nullptr) {
                drop_block(g, a.dropout, seed, row, owner);
#pragma unroll
                for (int i = 0; i < 8; ++i) g[i] *= static_cast<Acc>(a.dropout.scale);
            }
            if (a.row_scale != nullptr) {
#pragma unroll
                for (int i = 0; i < 8; ++i) g[i] *= static_cast<Acc>(a.row_scale[row]);
            }
            if (a.dx != nullptr) store_block(a.dx, a.x_dtype, row * a.dx_stride + column, count, g);
            if (p.slot[4] >= 0) add_to_sums(p.partials, (sums_row + p.slot[4]) * a.cols + column, count, g);
        }
    }
}

}  // namespace cuda
}  // namespace seqpar
