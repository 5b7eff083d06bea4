// Shared by the host code of the kernels: dtypes and alignment.
#pragma once

#include <cstdint>

#include "seqpar.h"

namespace seqpar {
namespace cuda {

constexpr int64_t kMaxCols = int64_t{1} << 28;  // of the generic kernels, whose column arithmetic is 32-bit

inline int size_of(DType dtype) {
    switch (dtype) {
        case DType::f64:
            return 8;
        case DType::f32:
            return 4;
        case DType::e4m3:
            return 1;
        default:
            return 2;
    }
}

inline bool known(DType dtype) {
    return dtype >= DType::f32 && dtype <= DType::e4m3;
}

// Can be read and computed with in the arithmetic of x.
inline bool computable(DType dtype, DType x) {
    return known(dtype) && dtype != DType::e4m3 && (dtype != DType::f64 || x == DType::f64);
}

// Whether rows at `base`, `stride` elements apart, can be accessed `width` elements at a time.
inline bool aligned(const void* base, int64_t stride, int64_t rows, DType dtype, int width) {
    const int64_t size = size_of(dtype), bytes = width * size < 16 ? width * size : 16;
    return base == nullptr ||
           (reinterpret_cast<uintptr_t>(base) % bytes == 0 && (rows <= 1 || stride * size % bytes == 0));
}

inline bool aligned_vector(const void* base, DType dtype, int width) {
    return aligned(base, 0, 1, dtype, width);
}

// The smallest dropped 32-bit word, less one: see drop() in dropout.cuh. Meaningless at threshold 0.
inline uint32_t drop_limit(const Dropout& dropout) {
    return static_cast<uint32_t>((uint64_t{dropout.threshold} << 16) - 1);
}

inline bool drops(const Dropout& dropout) {
    return dropout.seed != nullptr && dropout.threshold > 0;
}

inline float dropout_scale(const Dropout& dropout) {
    return dropout.seed != nullptr ? static_cast<float>(dropout.scale) : 1.0f;
}

}  // namespace cuda
}  // namespace seqpar
