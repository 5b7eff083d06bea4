// Element types and the vocabulary of the vector layer. Everything that the kernels inline lives in the namespace of
// the instruction set it is compiled for (SEQPAR_ISA), so that the linker can never pick AVX-512 code for an older
// machine. For the same reason these files use no function templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "seqpar.h"

namespace seqpar::cpu::SEQPAR_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// How the elements of a Pack lie in its two registers a and b. `natural`: a holds the first half, b the second.
// `unpacked`: what widening 16-bit elements by unpacklo/unpackhi gives, within each 128 bits of memory the first four
// in a, the last four in b. It makes loading and storing bf16 two and three instructions cheaper; every vector of a
// kernel (weights, column sums, the row kept in scratch) has the same order, so nothing has to be put back in place.
enum class Order { natural, unpacked };

// A lane count that is known to be the whole Pack; loads and stores take either this or an int.
struct Whole {};

template <class T>
struct Accumulate {
    using Type = float;
};
template <>
struct Accumulate<double> {
    using Type = double;
};
template <class T>
using Acc = typename Accumulate<T>::Type;

template <class T>
constexpr T smaller(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
    return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

template <class T>
T* row_of(void* base, int64_t row, int64_t stride) {
    return base ? static_cast<T*>(base) + row * stride : nullptr;
}
template <class T>
const T* row_of(const void* base, int64_t row, int64_t stride) {
    return base ? static_cast<const T*>(base) + row * stride : nullptr;
}

}  // namespace seqpar::cpu::SEQPAR_ISA
