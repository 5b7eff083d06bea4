// Instructions that C++ has no name for. Each is inline PTX under nvcc and plain C++ in the host build that the tests
// run (tests/cuda_shim), so nothing outside this file differs between the two.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace seqpar {
namespace cuda {

#define SEQPAR_DEVICE __device__ __forceinline__

// The data that one thread moves in one access: 4, 8, 16 or 32 bytes of packed elements.
template <int kWords>
struct Words {
    uint32_t word[kWords];
};

// ---- Memory -------------------------------------------------------------------------------------------------------

// Read once, so it shall not push the [cols] vectors out of L1. Volatile keeps a prefetch where it was written.
SEQPAR_DEVICE void load_stream(Words<4>& v, const void* p) {
#ifdef __CUDACC__
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p));
#else
    shim::load(&v, p, sizeof v);
#endif
}

SEQPAR_DEVICE void load_stream(Words<2>& v, const void* p) {
#ifdef __CUDACC__
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p));
#else
    shim::load(&v, p, sizeof v);
#endif
}

// Read again for every row: the [cols] vectors. Volatile, or the compiler would lift them all out of the row loop and
// spill what does not fit.
SEQPAR_DEVICE void load_cached(Words<4>& v, const void* p) {
#ifdef __CUDACC__
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p));
#else
    shim::load(&v, p, sizeof v);
#endif
}

SEQPAR_DEVICE void load_cached(Words<2>& v, const void* p) {
#ifdef __CUDACC__
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p));
#else
    shim::load(&v, p, sizeof v);
#endif
}

SEQPAR_DEVICE void load_cached(Words<8>& v, const void* p) {
    Words<4>(&half)[2] = reinterpret_cast<Words<4>(&)[2]>(v);
    load_cached(half[0], p);
    load_cached(half[1], static_cast<const char*>(p) + 16);
}

SEQPAR_DEVICE void store(void* p, const Words<4>& v) {
#ifdef __CUDACC__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
                 "r"(v.word[3])
                 : "memory");
#else
    shim::store(p, &v, sizeof v);
#endif
}

SEQPAR_DEVICE void store(void* p, const Words<2>& v) {
#ifdef __CUDACC__
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]) : "memory");
#else
    shim::store(p, &v, sizeof v);
#endif
}

SEQPAR_DEVICE void store(void* p, const Words<1>& v) {
#ifdef __CUDACC__
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v.word[0]) : "memory");
#else
    shim::store(p, &v, sizeof v);
#endif
}

// Hides the origin of `value` from the compiler. Without this it keeps every address that depends on the row or the
// thread in a register of its own, from row to row, and spills; computing an address again costs one instruction.
SEQPAR_DEVICE void forget(int& value) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(value));
#else
    (void)value;
#endif
}

SEQPAR_DEVICE void forget(uint64_t& value) {
#ifdef __CUDACC__
    asm volatile("" : "+l"(value));
#else
    (void)value;
#endif
}

// The CTA's dynamic shared memory; the kernels use no other.
SEQPAR_DEVICE char* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(16) char shared_bytes[];
    return shared_bytes;
#else
    return shim::dynamic_shared();
#endif
}

// ---- Conversions --------------------------------------------------------------------------------------------------

// Two floats to one word, rounded to nearest even, `low` in the low half.
SEQPAR_DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return shim::bf16_bits(low) | static_cast<uint32_t>(shim::bf16_bits(high)) << 16;
#endif
}

SEQPAR_DEVICE uint32_t pack_f16(float low, float high) {
#ifdef __CUDACC__
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return shim::f16_bits(low) | static_cast<uint32_t>(shim::f16_bits(high)) << 16;
#endif
}

SEQPAR_DEVICE void unpack_f16(uint32_t word, float& low, float& high) {
#ifdef __CUDACC__
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(word));
#else
    low = shim::f16_value(static_cast<uint16_t>(word));
    high = shim::f16_value(static_cast<uint16_t>(word >> 16));
#endif
}

SEQPAR_DEVICE uint32_t float_bits(float value) {
#ifdef __CUDACC__
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
#endif
}

SEQPAR_DEVICE float bits_float(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

// e4m3 ("fn": no infinity) in integer arithmetic: round to nearest even, saturate at 448; NaN stays NaN.
SEQPAR_DEVICE uint32_t e4m3_bits(float value) {
    const uint32_t sign = float_bits(value) >> 24 & 0x80u;
    uint32_t bits = float_bits(value) & 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return sign | 0x7Fu;
    if (bits >= 0x43E00000u) return sign | 0x7Eu;
    if (bits < 0x3C800000u) {  // below 2^-6 a code counts steps of 2^-9: let a float add round it
        const float aligned = bits_float(bits) + 16384.0f;  // one ulp of 2^14 is 2^-9
        return sign | (float_bits(aligned) & 0xFu);
    }
    bits += 0x7FFFFu + (bits >> 20 & 1u);
    return sign | ((bits >> 20) - (120u << 3));
}

SEQPAR_DEVICE uint32_t pack_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return e4m3_bits(low) | e4m3_bits(high) << 8;
#endif
}

// ---- Synchronisation ----------------------------------------------------------------------------------------------

// A barrier among `threads` threads (whole warps) of the CTA; 16 such barriers exist.
SEQPAR_DEVICE void named_barrier(int id, int threads) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    shim::named_barrier(id, threads);
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

SEQPAR_DEVICE int cluster_rank() {
#if !defined(__CUDACC__)
    return shim::cluster_rank();
#elif __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
#else
    return 0;
#endif
}

// All threads of the cluster, once, before the first of them sends.
SEQPAR_DEVICE void cluster_barrier() {
#if !defined(__CUDACC__)
    shim::cluster_barrier();
#elif __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A barrier in shared memory that counts bytes: it completes a phase when one thread has said how many to expect and as
// many have arrived from the CTAs of the cluster. Unlike the cluster's own barrier it waits for no pending load or
// store of device memory.
SEQPAR_DEVICE void arrivals_init(uint64_t* barrier) {
#if !defined(__CUDACC__)
    shim::arrivals_init(barrier);
#elif __CUDA_ARCH__ >= 900
    const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(here) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

SEQPAR_DEVICE void arrivals_expect(uint64_t* barrier, int bytes) {
#if !defined(__CUDACC__)
    shim::arrivals_expect(barrier, bytes);
#elif __CUDA_ARCH__ >= 900
    const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(here), "r"(bytes) : "memory");
#endif
}

// `parity` is that of the phase waited for: 0 for the first.
SEQPAR_DEVICE void arrivals_wait(uint64_t* barrier, int parity) {
#if !defined(__CUDACC__)
    shim::arrivals_wait(barrier, parity);
#elif __CUDA_ARCH__ >= 900
    const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    uint32_t complete;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
            "p; }"
            : "=r"(complete)
            : "r"(here), "r"(parity)
            : "memory");
    } while (complete == 0);
#endif
}

// Sends `value` into the shared memory of CTA `rank`, at the place that `local` has here, and 4 bytes to its barrier.
SEQPAR_DEVICE void cluster_send(float* local, uint64_t* barrier, int rank, float value) {
#if !defined(__CUDACC__)
    shim::cluster_send(local, barrier, rank, value);
#elif __CUDA_ARCH__ >= 900
    uint32_t there = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t its_barrier = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(its_barrier) : "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there),
                 "f"(value), "r"(its_barrier)
                 : "memory");
#endif
}

}  // namespace cuda
}  // namespace seqpar
