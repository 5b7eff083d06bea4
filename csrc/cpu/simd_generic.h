// Packs on the vector extension of gcc and clang: every double, and the floats of machines without AVX2 (any x86-64,
// NEON). SEQPAR_ISA and kVectorBytes come from simd.h.
#pragma once

#include "types.h"

namespace seqpar::cpu::SEQPAR_ISA {

template <class T>
struct MaskInteger {
    using Type = int32_t;
};
template <>
struct MaskInteger<double> {
    using Type = int64_t;
};

template <class T>
struct GenericPack {
    using Scalar = T;
    using Integer = typename MaskInteger<T>::Type;
    typedef T Vector __attribute__((vector_size(kVectorBytes)));
    typedef Integer Mask __attribute__((vector_size(kVectorBytes)));
    static constexpr int half = kVectorBytes / sizeof(T), lanes = 2 * half;
    Vector a, b;
};

// All ones where an element is kept by dropout, or present in a partial Pack.
template <class T>
struct GenericKeep {
    typename GenericPack<T>::Mask a, b;
};

template <class T>
inline GenericPack<T> generic_splat(T s) {
    typename GenericPack<T>::Vector v = {};
    v = v + s;
    return {v, v};
}
template <class T>
inline GenericPack<T> operator+(GenericPack<T> x, GenericPack<T> y) {
    return {x.a + y.a, x.b + y.b};
}
template <class T>
inline GenericPack<T> operator-(GenericPack<T> x, GenericPack<T> y) {
    return {x.a - y.a, x.b - y.b};
}
template <class T>
inline GenericPack<T> operator*(GenericPack<T> x, GenericPack<T> y) {
    return {x.a * y.a, x.b * y.b};
}
template <class T>
inline GenericPack<T> fma(GenericPack<T> x, GenericPack<T> y, GenericPack<T> z) {
    return {x.a * y.a + z.a, x.b * y.b + z.b};
}
template <class T>
inline GenericPack<T> select(GenericKeep<T> k, GenericPack<T> x) {
    using Vector = typename GenericPack<T>::Vector;
    using Mask = typename GenericPack<T>::Mask;
    return {(Vector)((Mask)x.a & k.a), (Vector)((Mask)x.b & k.b)};
}
template <class T>
inline GenericPack<T> keep_mul(GenericKeep<T> k, GenericPack<T> x, GenericPack<T> y) {
    return select(k, x * y);
}
template <class T>
inline GenericPack<T> keep_fma(GenericKeep<T> k, GenericPack<T> x, GenericPack<T> y, GenericPack<T> z) {
    return keep_mul(k, x, y) + z;
}
template <class T>
inline T sum(GenericPack<T> x) {
    const typename GenericPack<T>::Vector s = x.a + x.b;
    T total = 0;
    for (int i = 0; i < GenericPack<T>::half; ++i) total += s[i];
    return total;
}

template <class T>
inline GenericKeep<T> keep_of(const bool* keep) {
    GenericKeep<T> k;
    for (int i = 0; i < GenericPack<T>::half; ++i) {
        k.a[i] = -static_cast<int>(keep[i]);
        k.b[i] = -static_cast<int>(keep[i + GenericPack<T>::half]);
    }
    return k;
}
template <Order, class T>
inline GenericKeep<T> first(const GenericPack<T>&, int n) {
    bool present[GenericPack<T>::lanes];
    for (int i = 0; i < GenericPack<T>::lanes; ++i) present[i] = i < n;
    return keep_of<T>(present);
}

template <class T>
inline GenericPack<T> generic_load(const T* p) {
    GenericPack<T> x;
    memcpy(&x, p, sizeof(x));
    return x;
}
template <class T>
inline void generic_store(T* p, GenericPack<T> x) {
    memcpy(p, &x, sizeof(x));
}
inline GenericPack<double> splat(double s) {
    return generic_splat(s);
}
inline GenericPack<double> load_scratch(const double* p) {
    return generic_load(p);
}
inline void store_scratch(double* p, GenericPack<double> x) {
    generic_store(p, x);
}
template <Order>
inline GenericPack<double> load(const double* p, Whole) {
    return generic_load(p);
}
template <Order>
inline GenericPack<double> load(const double* p, int n) {
    GenericPack<double> x = {};
    memcpy(&x, p, static_cast<size_t>(n) * sizeof(double));
    return x;
}
template <Order>
inline void store(double* p, GenericPack<double> x, Whole) {
    generic_store(p, x);
}
template <Order>
inline void store(double* p, GenericPack<double> x, int n) {
    memcpy(p, &x, static_cast<size_t>(n) * sizeof(double));
}
// Doubles go through the cache: they are here for checking gradients.
template <Order O>
inline void stream(double* p, GenericPack<double> x) {
    store<O>(p, x, Whole{});
}

}  // namespace seqpar::cpu::SEQPAR_ISA
