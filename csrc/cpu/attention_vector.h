// Single vector registers for attention. The element-wise kernels use a Pack of several; the matrix kernels count
// registers. Written with the vector extension of gcc and clang, and intrinsics for operations that it lacks.
#pragma once

#include "simd.h"
#include "simd_generic.h"

namespace seqpar::cpu::SEQPAR_ISA {

template <class T>
using Vec = typename GenericPack<T>::Vector;
template <class T>
using VecMask = typename GenericPack<T>::Mask;
template <class T>
constexpr int kLanes = GenericPack<T>::half;

template <class T>
inline Vec<T> load_vec(const T* p) {
    Vec<T> v;
    memcpy(&v, p, sizeof(v));
    return v;
}
template <class T>
inline void store_vec(T* p, Vec<T> v) {
    memcpy(p, &v, sizeof(v));
}

#if SEQPAR_ISA_LEVEL == 3
inline Vec<float> all_lanes(float s) {
    return (Vec<float>)_mm512_set1_ps(s);
}
inline Vec<double> all_lanes(double s) {
    return (Vec<double>)_mm512_set1_pd(s);
}
inline Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> z) {
    return (Vec<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
inline Vec<double> multiply_add(Vec<double> x, Vec<double> y, Vec<double> z) {
    return (Vec<double>)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
}
// The larger of two, and the second where either is NaN.
inline Vec<float> maximum(Vec<float> x, Vec<float> y) {
    return (Vec<float>)_mm512_max_ps((__m512)x, (__m512)y);
}
#elif SEQPAR_ISA_LEVEL == 2
inline Vec<float> all_lanes(float s) {
    return (Vec<float>)_mm256_set1_ps(s);
}
inline Vec<double> all_lanes(double s) {
    return (Vec<double>)_mm256_set1_pd(s);
}
inline Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> z) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
inline Vec<double> multiply_add(Vec<double> x, Vec<double> y, Vec<double> z) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
}
inline Vec<float> maximum(Vec<float> x, Vec<float> y) {
    return (Vec<float>)_mm256_max_ps((__m256)x, (__m256)y);
}
#else
inline Vec<float> all_lanes(float s) {
    return Vec<float>{s, s, s, s};
}
inline Vec<double> all_lanes(double s) {
    return Vec<double>{s, s};
}
inline Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> z) {
    return x * y + z;
}
inline Vec<double> multiply_add(Vec<double> x, Vec<double> y, Vec<double> z) {
    return x * y + z;
}
inline Vec<float> maximum(Vec<float> x, Vec<float> y) {
    return x > y ? x : y;
}
#endif
inline Vec<double> maximum(Vec<double> x, Vec<double> y) {
    return x > y ? x : y;
}

// Scores are kept in units of log 2. What no key may win against, and what a masked score is set to: finite, so that
// their differences are no NaN.
template <class T>
constexpr T kNothing = sizeof(T) == 8 ? T(-1e290) : T(-1e30);
template <class T>
constexpr T kMasked = sizeof(T) == 8 ? T(-1e300) : T(-3e38);
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// The nearest integer, for |x| below 2^22 (2^51); larger numbers come back near enough for a weight of 0.
inline Vec<float> nearest(Vec<float> x) {
    const Vec<float> magic = all_lanes(0x1.8p23f);
    return (x + magic) - magic;
}
inline Vec<double> nearest(Vec<double> x) {
    const Vec<double> magic = all_lanes(0x1.8p52);
    return (x + magic) - magic;
}

// 2^e for an integer e <= 0; 0 below the smallest normal number.
inline Vec<float> power_of_two(Vec<float> e) {
    const Vec<float> shifted = maximum(e, all_lanes(-127.0f)) + all_lanes(0x1.8p23f + 127.0f);
    return (Vec<float>)((VecMask<float>)shifted << 23);
}
inline Vec<double> power_of_two(Vec<double> e) {
    const Vec<double> shifted = maximum(e, all_lanes(-1023.0)) + all_lanes(0x1.8p52 + 1023.0);
    return (Vec<double>)((VecMask<double>)shifted << 52);
}

// 2^f on [-1/2, 1/2], to half a unit in the last place and a little (floats), to one (doubles).
inline Vec<float> exp2_fraction(Vec<float> f) {
    Vec<float> p = all_lanes(1.535336188319500e-4f);
    p = multiply_add(p, f, all_lanes(1.339887440266574e-3f));
    p = multiply_add(p, f, all_lanes(9.618437357674640e-3f));
    p = multiply_add(p, f, all_lanes(5.550332471162809e-2f));
    p = multiply_add(p, f, all_lanes(2.402264791363012e-1f));
    p = multiply_add(p, f, all_lanes(6.931472028550421e-1f));
    return multiply_add(p, f, all_lanes(1.0f));
}
inline Vec<double> exp2_fraction(Vec<double> f) {
    Vec<double> p = all_lanes(0.0);
    double term = 1.0, factors[14];
    for (int i = 0; i < 14; ++i) {
        factors[i] = term;
        term *= kLn2 / (i + 1);
    }
    for (int i = 13; i >= 0; --i) p = multiply_add(p, f, all_lanes(factors[i]));
    return p;
}

// 2^(x - m) for an integer m: the bits are 2^-m times those of 2^x, whatever m is.
template <class V>
inline V exp2_less(V x, V m) {
    const V n = nearest(x);
    return exp2_fraction(x - n) * power_of_two(n - m);
}

// 2^(x y - high - low)
template <class V>
inline V exp2_of_difference(V x, V y, V high, V low) {
    const V difference = multiply_add(x, y, -high), n = nearest(difference);
    return exp2_fraction((difference - n) - low) * power_of_two(n);
}

// tanh. For floats after Cephes: a polynomial where 1 - 2 / (exp(2x) + 1) would cancel.
inline Vec<float> hyperbolic_tangent(Vec<float> x) {
    const VecMask<float> sign = (VecMask<float>)x & (VecMask<float>)all_lanes(-0.0f);
    const Vec<float> size = (Vec<float>)((VecMask<float>)x ^ sign), square = x * x;
    Vec<float> p = all_lanes(-5.70498872745e-3f);
    p = multiply_add(p, square, all_lanes(2.06390887954e-2f));
    p = multiply_add(p, square, all_lanes(-5.37397155531e-2f));
    p = multiply_add(p, square, all_lanes(1.33314422036e-1f));
    p = multiply_add(p, square, all_lanes(-3.33332819422e-1f));
    const Vec<float> small = multiply_add(p * square, x, x);
    const Vec<float> e = exp2_less(size * all_lanes(static_cast<float>(-2.0 * kLog2e)), all_lanes(0.0f));
    const Vec<float> large = (Vec<float>)((VecMask<float>)((1.0f - e) / (1.0f + e)) | sign);
    return size < all_lanes(0.625f) ? small : large;
}
inline Vec<double> hyperbolic_tangent(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
}

}  // namespace seqpar::cpu::SEQPAR_ISA
