// The matrix products of attention on tiles in cache: one register-blocked kernel, and how rows get into and out of the
// scratch it works on. Everything there is T (f32, or f64 for f64), row-major, and padded with zeros to whole vectors
// and to kRowsAtOnce rows, so that no product has a tail.
#pragma once

#include "attention_vector.h"
#include "loops.h"

namespace seqpar::cpu::SEQPAR_ISA {

constexpr int kRowsAtOnce = 6;  // 6 x 2 accumulators, 2 vectors and 1 number: 15 of 16 registers, and enough in flight
constexpr int kVectorsAtOnce = 2;

inline int64_t rounded_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

// Where the elements of a left factor lie: A(row, k) = a[row * ld + k], or a[k * ld + row].
enum class Left { rows, columns };

// c[row, column] = factors[row] * c[row, column] + sum over k of A(row, k) b[k, column], one k after the other, for
// kRowsAtOnce rows and kVectors vectors of columns. Without factors they are 1; `fresh` starts from 0 instead.
template <class T, int kVectors, Left kLeft>
__attribute__((noinline)) void multiply_block(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                                              int64_t ldc, bool fresh, const T* factors) {
    using V = Vec<T>;
    constexpr int lanes = kLanes<T>;
    V sum[kRowsAtOnce][kVectors];
    if (fresh) {
        const V zero = all_lanes(T(0));
#pragma GCC unroll 6
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sum[r][v] = zero;
        }
    } else {
#pragma GCC unroll 6
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sum[r][v] = load_vec(c + r * ldc + v * lanes);
        }
        if (factors) {
#pragma GCC unroll 6
            for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) sum[r][v] = sum[r][v] * all_lanes(factors[r]);
            }
        }
    }
    const int64_t across = kLeft == Left::rows ? lda : 1, along = kLeft == Left::rows ? 1 : lda;
    const T *upper = a, *lower = a + 3 * across;
    do {  // depth is never 0
        V right[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) right[v] = load_vec(b + v * lanes);
#pragma GCC unroll 6
        for (int r = 0; r < kRowsAtOnce; ++r) {
            const V left = all_lanes(r < 3 ? upper[r * across] : lower[(r - 3) * across]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(left, right[v], sum[r][v]);
        }
        upper += along;
        lower += along;
        b += ldb;
    } while (--depth > 0);
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store_vec(c + r * ldc + v * lanes, sum[r][v]);
    }
}

// The same for all `columns`, a whole number of vectors.
template <class T, Left kLeft>
inline void multiply_rows(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                          int64_t columns, bool fresh = false, const T* factors = nullptr) {
    constexpr int64_t both = kVectorsAtOnce * kLanes<T>;
    int64_t column = 0;
    for (; column + both <= columns; column += both) {
        multiply_block<T, kVectorsAtOnce, kLeft>(depth, a, lda, b + column, ldb, c + column, ldc, fresh, factors);
    }
    if (column < columns) {
        multiply_block<T, 1, kLeft>(depth, a, lda, b + column, ldb, c + column, ldc, fresh, factors);
    }
}

constexpr int64_t kRowsAhead = 8;

// Rows of X widened to T, zeros up to `padded` columns and up to `padded_rows` rows.
template <class X, class T>
void widen_rows(const X* from, int64_t stride, int64_t rows, int64_t padded_rows, int64_t cols, int64_t padded, T* to) {
    constexpr Order O = order_of<X>;
    for (int64_t r = 0; r < padded_rows; ++r, to += padded) {
        const int64_t present = r < rows ? cols : 0;
        // Rows of one head lie far apart, where the hardware does not look ahead.
        if (r + kRowsAhead < rows) {
            const char* const ahead = reinterpret_cast<const char*>(from + (r + kRowsAhead) * stride);
            for (int64_t byte = 0; byte < cols * static_cast<int64_t>(sizeof(X)); byte += 64)
                __builtin_prefetch(ahead + byte);
        }
        const X* const row = from + r * stride;
        for_packs<PackFor<T>::Pack::lanes>(
            0, present, [&](int64_t c, auto n) SEQPAR_BODY { store<O>(to + c, load<O>(row + c, n), n); });
        memset(to + present, 0, static_cast<size_t>(padded - present) * sizeof(T));
    }
}

// One row of T, every element times `factor`, rounded to X.
template <class X, class T>
void store_row(const T* from, int64_t cols, T factor, X* to) {
    constexpr Order O = order_of<X>;
    const auto by = splat(factor);
    for_packs<PackFor<T>::Pack::lanes>(
        0, cols, [&](int64_t c, auto n) SEQPAR_BODY { store<O>(to + c, load<O>(from + c, n) * by, n); });
}

#if SEQPAR_ISA_LEVEL >= 2
// 8 x 8 floats turned over.
inline void transpose_eight(const float* from, int64_t from_ld, float* to, int64_t to_ld) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_ld);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * to_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
inline bool transposes_eight(const float*) {
    return true;
}
#else
inline void transpose_eight(const float*, int64_t, float*, int64_t) {}
inline bool transposes_eight(const float*) {
    return false;
}
#endif
inline void transpose_eight(const double*, int64_t, double*, int64_t) {}
inline bool transposes_eight(const double*) {
    return false;
}

// to[c, r] = from[r, c]
template <class T>
void transpose(const T* from, int64_t from_ld, int64_t rows, int64_t cols, T* to, int64_t to_ld) {
    int64_t c = 0;
    if (transposes_eight(from) && rows % 8 == 0) {
        for (; c + 8 <= cols; c += 8) {
            for (int64_t r = 0; r < rows; r += 8)
                transpose_eight(from + r * from_ld + c, from_ld, to + c * to_ld + r, to_ld);
        }
    }
    for (; c < cols; ++c) {
        for (int64_t r = 0; r < rows; ++r) to[c * to_ld + r] = from[r * from_ld + c];
    }
}

}  // namespace seqpar::cpu::SEQPAR_ISA
