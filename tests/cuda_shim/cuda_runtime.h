// CUDA on the CPU, as much of it as csrc/cuda uses: the same .cu files compile with a host compiler against this header
// and run with the threads of a block (of a cluster, where there is one) as fibers on one operating-system thread.
// A fiber runs until it waits at a barrier or a shuffle; a round in which nobody gets further is a deadlock and ends
// the process with a message. Memory checks are up to the caller (poisoned outputs and guard bytes).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time; not in clusters
#define __align__(n) alignas(n)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- Runtime API --------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
    int ptxVersion;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

// ---- Inside a kernel ----------------------------------------------------------------------------------------------

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = 0xFFFFFFFFu);

namespace shim {

// Every lane gives 8 bytes and gets those of lane `source`. The whole warp has to come.
uint64_t exchange(uint64_t value, int source, const char* what);
int lane();

template <class T>
T exchanged(T value, int source, const char* what) {
    static_assert(sizeof(T) <= 8, "one shuffle moves at most 8 bytes here");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, source, what);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

unsigned ballot(bool predicate);

char* dynamic_shared();
void named_barrier(int id, int threads);
int cluster_rank();
void cluster_barrier();

// A shared-memory barrier that expects one arrival and as many bytes as that arrival announces.
void arrivals_init(uint64_t* barrier);
void arrivals_expect(uint64_t* barrier, int bytes);
void arrivals_wait(uint64_t* barrier, int parity);
void cluster_send(float* local, uint64_t* barrier, int rank, float value);

// Vector accesses, which fault on a GPU when they are not aligned.
void misaligned(const void* p, size_t bytes);

inline void load(void* value, const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) misaligned(p, bytes);
    std::memcpy(value, p, bytes);
}

inline void store(void* p, const void* value, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) misaligned(p, bytes);
    std::memcpy(p, value, bytes);
}

uint16_t bf16_bits(float value);
uint16_t f16_bits(float value);
float f16_value(uint16_t bits);

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);

}  // namespace shim

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
    const int base = shim::lane() & ~(width - 1);
    return shim::exchanged(value, base + (source & (width - 1)), "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    const int source = shim::lane() ^ mask, limit = (shim::lane() & ~(width - 1)) + width;
    return shim::exchanged(value, source < limit ? source : shim::lane(), "__shfl_xor_sync");
}

template <class T>
T __shfl_down_sync(unsigned, T value, int delta, int width = 32) {
    const int source = shim::lane() + delta, limit = (shim::lane() & ~(width - 1)) + width;
    return shim::exchanged(value, source < limit ? source : shim::lane(), "__shfl_down_sync");
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    return shim::ballot(predicate) & mask;
}
inline bool __any_sync(unsigned mask, bool predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
    return __ballot_sync(mask, predicate) == mask;
}

// Fibers take turns only where they wait, so nothing comes between the read and the write.
template <class T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}

template <class T>
T atomicMax(T* address, T value) {
    const T old = *address;
    if (value > old) *address = value;
    return old;
}

template <class T>
T atomicCAS(T* address, T compare, T value) {
    const T old = *address;
    if (old == compare) *address = value;
    return old;
}

inline void __threadfence() {}
inline float rsqrtf(float v) {
    return 1.0f / std::sqrt(v);
}
inline double rsqrt(double v) {
    return 1.0 / std::sqrt(v);
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
    return shim::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
