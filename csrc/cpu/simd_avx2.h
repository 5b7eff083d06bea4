// A Pack of 16 floats in two 256-bit registers. Needs AVX2, FMA and F16C (Haswell, Zen and later).
#pragma once

#include <immintrin.h>

#include "types.h"

namespace seqpar::cpu::SEQPAR_ISA {

constexpr int kVectorBytes = 32;
constexpr bool kStreams = true;

struct Pack {
    using Scalar = float;
    static constexpr int lanes = 16;
    __m256 a, b;
};

// All ones where an element is kept by dropout, or present in a partial Pack.
struct Keep {
    __m256 a, b;
};

template <class X>
constexpr Order order_of = Order::natural;
template <>
constexpr Order order_of<bf16> = Order::unpacked;

// Sixteen 16-bit masks in the order of memory, widened to the lanes of a Pack.
template <Order O>
inline Keep widen_mask(__m256i m) {
    if (O == Order::unpacked) {
        return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(m, m)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(m, m))};
    }
    return {_mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(m))),
            _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(m, 1)))};
}
template <Order O>
inline Keep first(const Pack&, int n) {
    const __m256i lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return widen_mask<O>(_mm256_cmpgt_epi16(_mm256_set1_epi16(static_cast<int16_t>(n)), lane));
}

inline Pack splat(float s) {
    return {_mm256_set1_ps(s), _mm256_set1_ps(s)};
}
inline Pack operator+(Pack x, Pack y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline Pack operator-(Pack x, Pack y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline Pack operator*(Pack x, Pack y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Pack fma(Pack x, Pack y, Pack z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Pack select(Keep k, Pack x) {
    return {_mm256_and_ps(k.a, x.a), _mm256_and_ps(k.b, x.b)};
}

// x * y + z where kept, z elsewhere.
inline Pack keep_fma(Keep k, Pack x, Pack y, Pack z) {
    return {_mm256_blendv_ps(z.a, _mm256_fmadd_ps(x.a, y.a, z.a), k.a),
            _mm256_blendv_ps(z.b, _mm256_fmadd_ps(x.b, y.b, z.b), k.b)};
}
// x * y where kept, zero elsewhere.
inline Pack keep_mul(Keep k, Pack x, Pack y) {
    return select(k, x * y);
}

inline float sum(Pack x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

// Scratch rows hold whole Packs, in the order of the kernel.
inline Pack load_scratch(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline void store_scratch(float* p, Pack x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}

// Memory order to the order of the kernel and back: exchanging the middle quarters is its own inverse.
template <Order O>
inline Pack reorder(Pack x) {
    if (O == Order::natural) return x;
    return {_mm256_permute2f128_ps(x.a, x.b, 0x20), _mm256_permute2f128_ps(x.a, x.b, 0x31)};
}

template <Order O>
inline Pack load(const float* p, Whole) {
    return reorder<O>(load_scratch(p));
}
template <Order O>
inline void store(float* p, Pack x, Whole) {
    store_scratch(p, reorder<O>(x));
}

inline __m256i round_bf16(__m256 v) {
    // See the AVX-512 twin for why a NaN is cut off rather than rounded.
    const __m256i u = _mm256_castps_si256(v);
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    return _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_and_si256(up, number)), 16);
}
inline __m256i narrow_bf16(Pack x) {
    return _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
}
template <Order O>
inline Pack load(const bf16* p, Whole) {
    static_assert(O == Order::unpacked);
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), zero = _mm256_setzero_si256();
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, v)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, v))};
}
template <Order O>
inline void store(bf16* p, Pack x, Whole) {
    static_assert(O == Order::unpacked);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}

template <Order O>
inline Pack load(const f16* p, Whole) {
    static_assert(O == Order::natural);
    const __m128i* const halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
template <Order O>
inline void store(f16* p, Pack x, Whole) {
    static_assert(O == Order::natural);
    __m128i* const halves = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(halves, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

// Stores past the cache, to addresses that are multiples of kVectorBytes; settle() makes them visible to other threads.
template <Order O>
inline void stream(float* p, Pack x) {
    x = reorder<O>(x);
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
}
template <Order O>
inline void stream(bf16* p, Pack x) {
    static_assert(O == Order::unpacked);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
template <Order O>
inline void stream(f16* p, Pack x) {
    static_assert(O == Order::natural);
    const __m128i a = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT),
                  b = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(b, a));
}
inline void settle() {
    _mm_sfence();
}

// Partial Packs go through a buffer: AVX2 cannot mask 16-bit elements, and a tail comes once a row.
template <Order O, class T>
__attribute__((noinline)) Pack load(const T* p, int n) {
    T buffer[Pack::lanes] = {};
    memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
    return load<O>(static_cast<const T*>(buffer), Whole{});
}
template <Order O, class T>
__attribute__((noinline)) void store(T* p, Pack x, int n) {
    T buffer[Pack::lanes];
    store<O>(static_cast<T*>(buffer), x, Whole{});
    memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// For dropout.h: 32-bit words in the low halves of 64-bit lanes; the high halves may hold anything.
using Words = __m256i;
constexpr int kWordLanes = 4;
inline Words splat_word(uint32_t w) {
    return _mm256_set1_epi32(static_cast<int>(w));
}
inline Words multiply(Words x, Words y) {
    return _mm256_mul_epu32(x, y);
}
inline Words upper_half(Words x) {
    return _mm256_srli_epi64(x, 32);
}
inline Words exclusive_or(Words x, Words y) {
    return _mm256_xor_si256(x, y);
}
inline Words exclusive_or(Words x, Words y, Words z) {
    return _mm256_xor_si256(_mm256_xor_si256(x, y), z);
}
// Column blocks first, first + 1, ..., so placed that compare() below puts them back in order.
inline Words block_counters(uint32_t first) {
    return _mm256_add_epi64(_mm256_setr_epi64x(0, 2, 1, 3), _mm256_set1_epi64x(first));
}
inline Words join_halves(Words low, Words high) {
    return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
struct Threshold {
    __m256i bits, any;  // any: none is kept at 65536
};
inline Threshold make_threshold(uint32_t t) {
    return {_mm256_set1_epi16(static_cast<int16_t>(smaller(t, 65535u))), _mm256_set1_epi16(t > 65535u ? 0 : -1)};
}
inline __m256i at_least(__m256i bits, const Threshold& t) {
    return _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_max_epu16(bits, t.bits), bits), t.any);
}
// The 32 columns of 4 blocks, given their words 0, 1 and 2, 3 as 64-bit lanes.
template <Order O>
inline void compare(Words words01, Words words23, const Threshold& t, Keep out[2]) {
    out[0] = widen_mask<O>(at_least(_mm256_unpacklo_epi64(words01, words23), t));
    out[1] = widen_mask<O>(at_least(_mm256_unpackhi_epi64(words01, words23), t));
}

}  // namespace seqpar::cpu::SEQPAR_ISA
