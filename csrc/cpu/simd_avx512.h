// A Pack of 32 floats in two 512-bit registers. Needs AVX-512 F, BW, DQ, VL and BMI2 (Skylake-SP and later).
#pragma once

#include <immintrin.h>

#include "types.h"

namespace seqpar::cpu::SEQPAR_ISA {

constexpr int kVectorBytes = 64;
constexpr bool kStreams = true;

struct Pack {
    using Scalar = float;
    static constexpr int lanes = 32;
    __m512 a, b;
};

// One bit an element: kept by dropout, or present in a partial Pack.
struct Keep {
    __mmask16 a, b;
};

template <class X>
constexpr Order order_of = Order::natural;
template <>
constexpr Order order_of<bf16> = Order::unpacked;

template <Order O>
inline Keep split_mask(uint32_t bits) {
    if (O == Order::natural) return {static_cast<__mmask16>(bits), static_cast<__mmask16>(bits >> 16)};
    return {static_cast<__mmask16>(_pext_u32(bits, 0x0F0F0F0Fu)), static_cast<__mmask16>(_pext_u32(bits, 0xF0F0F0F0u))};
}

constexpr uint32_t first_bits(int n) {
    return (1u << n) - 1;
}  // n < 32
template <Order O>
inline Keep first(const Pack&, int n) {
    return split_mask<O>(first_bits(n));
}

inline Pack splat(float s) {
    return {_mm512_set1_ps(s), _mm512_set1_ps(s)};
}
inline Pack operator+(Pack x, Pack y) {
    return {_mm512_add_ps(x.a, y.a), _mm512_add_ps(x.b, y.b)};
}
inline Pack operator-(Pack x, Pack y) {
    return {_mm512_sub_ps(x.a, y.a), _mm512_sub_ps(x.b, y.b)};
}
inline Pack operator*(Pack x, Pack y) {
    return {_mm512_mul_ps(x.a, y.a), _mm512_mul_ps(x.b, y.b)};
}
inline Pack fma(Pack x, Pack y, Pack z) {
    return {_mm512_fmadd_ps(x.a, y.a, z.a), _mm512_fmadd_ps(x.b, y.b, z.b)};
}

// x * y + z where kept, z elsewhere.
inline Pack keep_fma(Keep k, Pack x, Pack y, Pack z) {
    return {_mm512_mask3_fmadd_ps(x.a, y.a, z.a, k.a), _mm512_mask3_fmadd_ps(x.b, y.b, z.b, k.b)};
}
// x * y where kept, zero elsewhere.
inline Pack keep_mul(Keep k, Pack x, Pack y) {
    return {_mm512_maskz_mul_ps(k.a, x.a, y.a), _mm512_maskz_mul_ps(k.b, x.b, y.b)};
}
inline Pack select(Keep k, Pack x) {
    return {_mm512_maskz_mov_ps(k.a, x.a), _mm512_maskz_mov_ps(k.b, x.b)};
}

inline float sum(Pack x) {
    return _mm512_reduce_add_ps(_mm512_add_ps(x.a, x.b));
}

// Scratch rows hold whole Packs, in the order of the kernel.
inline Pack load_scratch(const float* p) {
    return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)};
}
inline void store_scratch(float* p, Pack x) {
    _mm512_storeu_ps(p, x.a);
    _mm512_storeu_ps(p + 16, x.b);
}

template <Order O>
inline Pack from_natural(__m512 v0, __m512 v1) {
    if (O == Order::natural) return {v0, v1};
    return {_mm512_shuffle_f32x4(v0, v1, 0x88), _mm512_shuffle_f32x4(v0, v1, 0xDD)};
}
template <Order O>
inline Pack to_natural(Pack x) {
    if (O == Order::natural) return x;
    const __m512i head = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  tail = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d a = _mm512_castps_pd(x.a), b = _mm512_castps_pd(x.b);
    return {_mm512_castpd_ps(_mm512_permutex2var_pd(a, head, b)), _mm512_castpd_ps(_mm512_permutex2var_pd(a, tail, b))};
}

template <Order O>
inline Pack load(const float* p, Whole) {
    return from_natural<O>(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16));
}
template <Order O>
inline Pack load(const float* p, int n) {
    const Keep k = split_mask<Order::natural>(first_bits(n));
    return from_natural<O>(_mm512_maskz_loadu_ps(k.a, p), _mm512_maskz_loadu_ps(k.b, p + 16));
}
template <Order O>
inline void store(float* p, Pack x, Whole) {
    store_scratch(p, to_natural<O>(x));
}
template <Order O>
inline void store(float* p, Pack x, int n) {
    const Keep k = split_mask<Order::natural>(first_bits(n));
    x = to_natural<O>(x);
    _mm512_mask_storeu_ps(p, k.a, x.a);
    _mm512_mask_storeu_ps(p + 16, k.b, x.b);
}

inline Pack widen_bf16(__m512i v) {
    const __m512i zero = _mm512_setzero_si512();
    return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, v)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, v))};
}
// Round to nearest even into the low halves. A NaN is cut off instead: whatever arithmetic returned is quiet, so its
// quiet bit survives, while rounding could carry an all-ones payload over into a zero.
inline __m512i round_bf16(__m512 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    const __mmask16 odd = _mm512_mask_test_epi32_mask(number, u, _mm512_set1_epi32(0x10000));
    const __m512i up = _mm512_mask_add_epi32(u, number, u, _mm512_set1_epi32(0x7FFF));
    return _mm512_srli_epi32(_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1)), 16);
}
inline __m512i narrow_bf16(Pack x) {
    return _mm512_packus_epi32(round_bf16(x.a), round_bf16(x.b));
}

template <Order O>
inline Pack load(const bf16* p, Whole) {
    static_assert(O == Order::unpacked);
    return widen_bf16(_mm512_loadu_si512(p));
}
template <Order O>
inline Pack load(const bf16* p, int n) {
    static_assert(O == Order::unpacked);
    return widen_bf16(_mm512_maskz_loadu_epi16(first_bits(n), p));
}
template <Order O>
inline void store(bf16* p, Pack x, Whole) {
    static_assert(O == Order::unpacked);
    _mm512_storeu_si512(p, narrow_bf16(x));
}
template <Order O>
inline void store(bf16* p, Pack x, int n) {
    static_assert(O == Order::unpacked);
    _mm512_mask_storeu_epi16(p, first_bits(n), narrow_bf16(x));
}

inline Pack widen_f16(__m512i v) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1))};
}
inline __m512i narrow_f16(Pack x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(x.a, nearest)), _mm512_cvtps_ph(x.b, nearest), 1);
}
template <Order O>
inline Pack load(const f16* p, Whole) {
    static_assert(O == Order::natural);
    return widen_f16(_mm512_loadu_si512(p));
}
template <Order O>
inline Pack load(const f16* p, int n) {
    static_assert(O == Order::natural);
    return widen_f16(_mm512_maskz_loadu_epi16(first_bits(n), p));
}
template <Order O>
inline void store(f16* p, Pack x, Whole) {
    static_assert(O == Order::natural);
    _mm512_storeu_si512(p, narrow_f16(x));
}
template <Order O>
inline void store(f16* p, Pack x, int n) {
    static_assert(O == Order::natural);
    _mm512_mask_storeu_epi16(p, first_bits(n), narrow_f16(x));
}

// Stores past the cache, to addresses that are multiples of kVectorBytes; settle() makes them visible to other threads.
template <Order O>
inline void stream(float* p, Pack x) {
    x = to_natural<O>(x);
    _mm512_stream_ps(p, x.a);
    _mm512_stream_ps(p + 16, x.b);
}
template <Order O>
inline void stream(bf16* p, Pack x) {
    static_assert(O == Order::unpacked);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_bf16(x));
}
template <Order O>
inline void stream(f16* p, Pack x) {
    static_assert(O == Order::natural);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_f16(x));
}
inline void settle() {
    _mm_sfence();
}

// For dropout.h: 32-bit words in the low halves of 64-bit lanes; the high halves may hold anything.
using Words = __m512i;
constexpr int kWordLanes = 8;
inline Words splat_word(uint32_t w) {
    return _mm512_set1_epi32(static_cast<int>(w));
}
inline Words multiply(Words x, Words y) {
    return _mm512_mul_epu32(x, y);
}
inline Words upper_half(Words x) {
    return _mm512_shuffle_epi32(x, static_cast<_MM_PERM_ENUM>(0xF5));
}
inline Words exclusive_or(Words x, Words y) {
    return _mm512_xor_si512(x, y);
}
inline Words exclusive_or(Words x, Words y, Words z) {
    return _mm512_ternarylogic_epi64(x, y, z, 0x96);
}
// Column blocks first, first + 1, ..., so placed that compare() below puts them back in order.
inline Words block_counters(uint32_t first) {
    return _mm512_add_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_set1_epi64(first));
}
inline Words join_halves(Words low, Words high) {
    return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, static_cast<_MM_PERM_ENUM>(0xA0));
}
struct Threshold {
    __m512i bits;
    __mmask32 any;  // none is kept at 65536
};
inline Threshold make_threshold(uint32_t t) {
    return {_mm512_set1_epi16(static_cast<int16_t>(smaller(t, 65535u))), t > 65535u ? 0u : ~0u};
}
// The 64 columns of 8 blocks, given their words 0, 1 and 2, 3 as 64-bit lanes.
template <Order O>
inline void compare(Words words01, Words words23, const Threshold& t, Keep out[2]) {
    const __m512i head = _mm512_unpacklo_epi64(words01, words23), tail = _mm512_unpackhi_epi64(words01, words23);
    out[0] = split_mask<O>(_mm512_mask_cmpge_epu16_mask(t.any, head, t.bits));
    out[1] = split_mask<O>(_mm512_mask_cmpge_epu16_mask(t.any, tail, t.bits));
}

}  // namespace seqpar::cpu::SEQPAR_ISA
