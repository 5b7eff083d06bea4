// Floats where neither AVX2 nor AVX-512 is at hand: 128-bit vectors (SSE2, NEON) and conversions in plain C++.
#pragma once

#include "simd_generic.h"

namespace seqpar::cpu::SEQPAR_ISA {

using Pack = GenericPack<float>;
using Keep = GenericKeep<float>;

template <class X>
constexpr Order order_of = Order::natural;

inline float float_of_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}
inline uint32_t bits_of_float(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    return u;
}

inline float widen(float x) {
    return x;
}
inline float widen(bf16 x) {
    return float_of_bits(static_cast<uint32_t>(x.bits) << 16);
}
#if defined(__aarch64__)
inline float widen(f16 x) {
    __fp16 h;
    memcpy(&h, &x, sizeof(h));
    return h;
}
#else
inline float widen(f16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 0x3FFu;
    if (exponent == 0) {  // zero and subnormals: a multiple of 2^-24, exact in fp32
        return float_of_bits(sign | bits_of_float(static_cast<float>(mantissa) * 0x1p-24f));
    }
    return float_of_bits(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

#endif

inline void narrow(float x, float* out) {
    *out = x;
}
inline void narrow(float x, bf16* out) {
    const uint32_t u = bits_of_float(x);
    const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
    out->bits = static_cast<uint16_t>(nan ? u >> 16 | 0x40u : (u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}
#if defined(__aarch64__)
inline void narrow(float x, f16* out) {
    const __fp16 h = static_cast<__fp16>(x);
    memcpy(out, &h, sizeof(h));
}
#else
inline void narrow(float x, f16* out) {
    const uint32_t u = bits_of_float(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
    uint32_t h;
    if (magnitude > 0x7F800000u) {  // NaN: kept quiet, with the payload that fits
        h = 0x7E00u | (magnitude >> 13 & 0x3FFu);
    } else if (magnitude >= 0x47800000u) {  // 65536 and more
        h = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: the last bit of 0.5f + x is worth one subnormal
        h = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        h = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | h);
}
#endif

inline Pack splat(float s) {
    return generic_splat(s);
}
inline Pack load_scratch(const float* p) {
    return generic_load(p);
}
inline void store_scratch(float* p, Pack x) {
    generic_store(p, x);
}

// Out of line, or every kernel would hold these loops many times over.
template <class T>
__attribute__((noinline)) Pack widen_some(const T* p, int n) {
    float buffer[Pack::lanes] = {};
    for (int i = 0; i < n; ++i) buffer[i] = widen(p[i]);
    return generic_load(static_cast<const float*>(buffer));
}
template <class T>
__attribute__((noinline)) Pack widen_all(const T* p) {
    float buffer[Pack::lanes];
    for (int i = 0; i < Pack::lanes; ++i) buffer[i] = widen(p[i]);
    return generic_load(static_cast<const float*>(buffer));
}
template <class T>
__attribute__((noinline)) void narrow_some(T* p, Pack x, int n) {
    float buffer[Pack::lanes];
    generic_store(static_cast<float*>(buffer), x);
    for (int i = 0; i < n; ++i) narrow(buffer[i], p + i);
}
template <class T>
__attribute__((noinline)) void narrow_all(T* p, Pack x) {
    float buffer[Pack::lanes];
    generic_store(static_cast<float*>(buffer), x);
    for (int i = 0; i < Pack::lanes; ++i) narrow(buffer[i], p + i);
}

template <Order, class T>
inline Pack load(const T* p, int n) {
    return widen_some(p, n);
}
template <Order, class T>
inline void store(T* p, Pack x, int n) {
    narrow_some(p, x, n);
}
template <Order, class T>
inline Pack load(const T* p, Whole) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return generic_load(p);
    } else {
        return widen_all(p);
    }
}
template <Order, class T>
inline void store(T* p, Pack x, Whole) {
    if constexpr (sizeof(T) == sizeof(float)) {
        generic_store(p, x);
    } else {
        narrow_all(p, x);
    }
}
template <Order O, class T>
inline void stream(T* p, Pack x) {
    store<O>(p, x, Whole{});
}
inline void settle() {}

}  // namespace seqpar::cpu::SEQPAR_ISA
