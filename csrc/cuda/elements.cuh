// Elements in memory and as floats: packed vectors for the fast kernels, single elements of any dtype for the rest.
#pragma once

#include <type_traits>

#include "ptx.cuh"
#include "seqpar.h"

namespace seqpar {
namespace cuda {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct e4m3 {
    uint8_t bits;
};

// Elements of a unit, which a thread moves in one access. 16-bit rows take 8, which is 16 bytes. As soon as one of a
// kernel's rows is f32 it is 4, so that neighbouring threads touch neighbouring bytes in every row.
template <class X, class Z>
constexpr int kWidth = sizeof(X) == 2 && sizeof(Z) == 2 ? 8 : 4;

// kWidth consecutive elements of a row.
template <class T, int kWidth>
using Vec = Words<kWidth* static_cast<int>(sizeof(T)) / 4>;

template <class T, int kWidth>
SEQPAR_DEVICE void unpack(const Vec<T, kWidth>& packed, float (&values)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        if constexpr (sizeof(T) == 4) {
            values[i] = bits_float(packed.word[i]);
        } else if constexpr (std::is_same_v<T, bf16>) {
            const uint32_t word = packed.word[i / 2];
            values[i] = bits_float(i % 2 ? word & 0xFFFF0000u : word << 16);
        } else if (i % 2 == 0) {
            unpack_f16(packed.word[i / 2], values[i], values[i + 1]);
        }
    }
}

template <class T, int kWidth>
SEQPAR_DEVICE Vec<T, kWidth> pack(const float (&values)[kWidth]) {
    Vec<T, kWidth> packed;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) packed.word[i] = float_bits(values[i]);
    } else if constexpr (std::is_same_v<T, e4m3>) {
#pragma unroll
        for (int i = 0; i < kWidth / 4; ++i) {
            packed.word[i] =
                pack_e4m3(values[4 * i], values[4 * i + 1]) | pack_e4m3(values[4 * i + 2], values[4 * i + 3]) << 16;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) {
            packed.word[i] = std::is_same_v<T, bf16> ? pack_bf16(values[2 * i], values[2 * i + 1])
                                                     : pack_f16(values[2 * i], values[2 * i + 1]);
        }
    }
    return packed;
}

template <class T>
SEQPAR_DEVICE const T* element(const void* base, int64_t index) {
    return static_cast<const T*>(base) + index;
}

template <class T>
SEQPAR_DEVICE T* element(void* base, int64_t index) {
    return static_cast<T*>(base) + index;
}

// kWidth elements of a [cols] vector that is f32 or has x's dtype T.
template <class T, int kWidth>
SEQPAR_DEVICE void load_vector(float (&values)[kWidth], const void* base, bool is_f32, int column) {
    if (std::is_same_v<T, float> || is_f32) {
        Vec<float, kWidth> packed;
        load_cached(packed, element<float>(base, column));
        unpack<float, kWidth>(packed, values);
    } else {
        Vec<T, kWidth> packed;
        load_cached(packed, element<T>(base, column));
        unpack<T, kWidth>(packed, values);
    }
}

// values += parts[0] + parts[1] + ..., in that order, `stride` elements apart; kInFlight of them are loaded before the
// first is added.
template <int kInFlight, class T, int kWidth>
SEQPAR_DEVICE void add_shards(float (&values)[kWidth], const T* part, int64_t stride, int count) {
#pragma unroll 1
    for (int first = 0; first < count; first += kInFlight) {
        Vec<T, kWidth> packed[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (first + i < count) load_stream(packed[i], part);
            part += stride;
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (first + i >= count) continue;
            float added[kWidth];
            unpack<T>(packed[i], added);
#pragma unroll
            for (int k = 0; k < kWidth; ++k) values[k] += added[k];
        }
    }
}

// rsqrt to about the last bit: the instruction may miss by two.
SEQPAR_DEVICE float reciprocal_sqrt(float v) {
    const float y = rsqrtf(v);
    const float error = fmaf(-v * y, y, 1.0f);
    return v > 1.0e-37f && v < 1.0e37f ? fmaf(0.5f * y, error, y) : y;
}

SEQPAR_DEVICE double reciprocal_sqrt(double v) {
    const double y = rsqrt(v);
    const double error = fma(-v * y, y, 1.0);
    return v > 1.0e-300 && v < 1.0e300 ? fma(0.5 * y, error, y) : y;
}

// Whether the mean of a LayerNorm row must be computed again. Sums have an error of a few roundings of the mean. This
// is negligible where the values spread about zero. It dominates where they hardly differ (a constant row, times
// 1/sqrt(eps)).
template <class Acc>
SEQPAR_DEVICE bool hides_spread(Acc mean, Acc variance) {
    return variance < mean * mean * Acc(0.0625);
}

// ---- Any dtype, one element at a time -----------------------------------------------------------------------------

template <class Acc>
SEQPAR_DEVICE Acc load_element(const void* base, DType dtype, int64_t index) {
    float value, unused;
    switch (dtype) {
        case DType::f64:
            return static_cast<Acc>(*element<double>(base, index));
        case DType::bf16:
            return bits_float(static_cast<uint32_t>(*element<uint16_t>(base, index)) << 16);
        case DType::f16:
            unpack_f16(*element<uint16_t>(base, index), value, unused);
            return value;
        default:
            return *element<float>(base, index);
    }
}

template <class Acc>
SEQPAR_DEVICE void store_element(void* base, DType dtype, int64_t index, Acc value) {
    switch (dtype) {
        case DType::f64:
            *element<double>(base, index) = value;
            break;
        case DType::bf16:
            *element<uint16_t>(base, index) = static_cast<uint16_t>(pack_bf16(static_cast<float>(value), 0.0f));
            break;
        case DType::f16:
            *element<uint16_t>(base, index) = static_cast<uint16_t>(pack_f16(static_cast<float>(value), 0.0f));
            break;
        case DType::e4m3:
            *element<uint8_t>(base, index) = static_cast<uint8_t>(pack_e4m3(static_cast<float>(value), 0.0f));
            break;
        default:
            *element<float>(base, index) = static_cast<float>(value);
    }
}

}  // namespace cuda
}  // namespace seqpar
