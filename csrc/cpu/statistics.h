// Mean and spread of a row in scratch memory.
#pragma once

#include "loops.h"

namespace seqpar::cpu::SEQPAR_ISA {

// Statistics of the values themselves, not of their squares, in fp64 for every dtype.
struct Statistics {
    double mean, squares;  // squares: the sum of (z - mean)^2
};

// Sums start afresh after so many columns, and go on in double: equal values, or squares, are rounded in the same
// direction at every step. A multiple of kDropoutColumns.
constexpr int64_t kStatisticsColumns = 256;

// The sum of (z - mean)^2. Two accumulators, since one addition after the other would wait for its latency.
template <Order O, class A>
double spread(const A* row, int64_t cols, A mean) {
    using P = typename PackFor<A>::Pack;
    const P centre = splat(mean), zero = splat(A(0));
    double total = 0;
    for (int64_t begin = 0; begin < cols; begin += kStatisticsColumns) {
        const int64_t end = smaller(cols, begin + kStatisticsColumns);
        P even = zero, odd = zero;
        int64_t c = begin;
        for (; c + 2 * P::lanes <= end; c += 2 * P::lanes) {
            const P first = load_scratch(row + c) - centre, second = load_scratch(row + c + P::lanes) - centre;
            even = fma(first, first, even);
            odd = fma(second, second, odd);
        }
        for_packs<P::lanes>(c, end, [&](int64_t tail, auto n) SEQPAR_BODY {
            const P d = present<O>(load_scratch(row + tail) - centre, n);
            even = fma(d, d, even);
        });
        total += sum(even + odd);
    }
    return total;
}

// Whether the plain sums are not accurate enough. A sum has an error of a few roundings of the mean. This is negligible
// where the values spread about zero. It dominates where they hardly differ (a constant row, times 1/sqrt(eps)). And
// the squares of large values are not finite.
template <class A>
bool hides_spread(double mean, double squares, double count) {
    constexpr double kLargest = sizeof(A) == sizeof(float) ? 3.4028234e38 : 1.7976931348623157e308;
    return squares < count * (mean * mean) * 0x1p-4 || !(squares <= kLargest);
}

// Calls body(lane, value, present) for every column, in double, lane by lane, so that it can be vectorized; present is
// 1, or 0 beyond the end of the row.
template <Order O, class A, class Body>
inline __attribute__((always_inline)) void for_doubles(const A* row, int64_t cols, Body body) {
    using P = typename PackFor<A>::Pack;
    A values[P::lanes];
    int64_t c = 0;
    for (; c + P::lanes <= cols; c += P::lanes) {
        memcpy(values, row + c, sizeof(values));
        for (int i = 0; i < P::lanes; ++i) body(i, static_cast<double>(values[i]), 1.0);
    }
    if (c == cols) return;
    A exists[P::lanes];
    const int n = static_cast<int>(cols - c);
    store_scratch(values, present<O>(load_scratch(row + c), n));
    store_scratch(exists, present<O>(splat(A(1)), n));
    for (int i = 0; i < P::lanes; ++i) body(i, static_cast<double>(values[i]), static_cast<double>(exists[i]));
}

template <int lanes>
inline double sum_lanes(const double (&sums)[lanes]) {
    double total = 0;
    for (int i = 0; i < lanes; ++i) total += sums[i];
    return total;
}

// The statistics in double, with the mean taken twice: the second time about the first, which makes the mean of a
// constant row exact. It costs half a forward, and few rows need it. About zero for Norm::rms.
template <Order O, bool kMean, class A>
__attribute__((noinline)) Statistics careful_statistics(const A* row, int64_t cols) {
    constexpr int lanes = PackFor<A>::Pack::lanes;
    double mean = 0;
    for (int turn = 0; kMean && turn < 2; ++turn) {
        double total = 0;
        for (int64_t begin = 0; begin < cols; begin += kStatisticsColumns) {
            double sums[lanes] = {};
            for_doubles<O>(row + begin, smaller(cols - begin, kStatisticsColumns),
                           [&](int i, double v, double exists) SEQPAR_BODY { sums[i] += (v - mean) * exists; });
            total += sum_lanes(sums);
        }
        mean += total / static_cast<double>(cols);
    }
    double total = 0;
    for (int64_t begin = 0; begin < cols; begin += kStatisticsColumns) {
        double sums[lanes] = {};
        for_doubles<O>(row + begin, smaller(cols - begin, kStatisticsColumns),
                       [&](int i, double v, double exists) SEQPAR_BODY {
                           const double d = (v - mean) * exists;
                           sums[i] += d * d;
                       });
        total += sum_lanes(sums);
    }
    return {mean, total};
}

}  // namespace seqpar::cpu::SEQPAR_ISA
