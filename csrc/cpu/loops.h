// Loops over the columns of a row, and the [cols] vectors widened once a call.
#pragma once

#include "kernels.h"
#include "simd.h"

// Lambdas here are loop bodies, called at two places: for whole Packs and for the tail.
#define SEQPAR_BODY __attribute__((always_inline))

namespace seqpar::cpu::SEQPAR_ISA {

// Row sums start afresh after so many columns and are then added up, which keeps their error small for wide rows. A
// multiple of kDropoutColumns.
constexpr int64_t kSumColumns = 1024;

// body(column, n) for each Pack of [begin, end), n being Whole or the number of columns left.
template <int lanes, class Body>
inline void for_packs(int64_t begin, int64_t end, Body body) {
    int64_t c = begin;
    for (; c + lanes <= end; c += lanes) body(c, Whole{});
    if (c < end) body(c, static_cast<int>(end - c));
}

// x where a column exists, zero beyond the end of the row.
template <Order O, class P>
inline P present(P x, Whole) {
    return x;
}
template <Order O, class P>
inline P present(P x, int n) {
    return select(first<O>(x, n), x);
}

// Calls f with a value of the element type; combinations that were refused before do not come here.
template <class A, class F>
inline void with_vector_type(DType dtype, F f) {
    if constexpr (sizeof(A) == sizeof(double)) {
        f(double{});
    } else {
        switch (dtype) {
            case DType::bf16:
                if constexpr (order_of<bf16> == Order::natural || F::order == Order::unpacked) f(bf16{});
                break;
            case DType::f16:
                if constexpr (F::order == Order::natural) f(f16{});
                break;
            default:
                f(float{});
        }
    }
}

template <Order O, class A>
struct Widen {
    static constexpr Order order = O;
    const void* from;
    int64_t cols;
    A add;
    A* to;
    template <class T>
    void operator()(T) const {
        using P = typename PackFor<A>::Pack;
        const T* const p = static_cast<const T*>(from);
        for_packs<P::lanes>(
            0, cols, [&](int64_t c, auto n) SEQPAR_BODY { store_scratch(to + c, load<O>(p + c, n) + splat(add)); });
    }
};
// `vector` + add as A, in the order of the kernel and padded to whole Packs; null stays null.
template <Order O, class A>
inline const A* widen_vector(const void* vector, DType dtype, int64_t cols, A add, A*& free) {
    if (!vector) return nullptr;
    A* const to = free;
    free += padded_columns(cols);
    with_vector_type<A>(dtype, Widen<O, A>{vector, cols, add, to});
    return to;
}

// The inverse: one Pack of a [cols] vector, rounded and put back in the order of memory.
template <Order O, class P, class N>
struct Narrow {
    static constexpr Order order = O;
    void* to;
    int64_t column;
    P value;
    N n;
    template <class T>
    void operator()(T) const {
        store<O>(static_cast<T*>(to) + column, value, n);
    }
};
template <Order O, class P, class N>
inline void store_vector(void* vector, DType dtype, int64_t column, P value, N n) {
    with_vector_type<typename P::Scalar>(dtype, Narrow<O, P, N>{vector, column, value, n});
}

template <class T>
struct Type {};

// Calls f(Type<X>, Type<Z>) for the dtypes of x and z, checked before.
template <class F>
inline Status with_types(DType x, DType z, F f) {
    switch (x) {
        case DType::f32:
            return f(Type<float>{}, Type<float>{});
        case DType::bf16:
            return z == x ? f(Type<bf16>{}, Type<bf16>{}) : f(Type<bf16>{}, Type<float>{});
        case DType::f16:
            return z == x ? f(Type<f16>{}, Type<f16>{}) : f(Type<f16>{}, Type<float>{});
        case DType::f64:
            return f(Type<double>{}, Type<double>{});
        default:
            return Status::unsupported;
    }
}

}  // namespace seqpar::cpu::SEQPAR_ISA
