#include <algorithm>

#include "launch.h"
#include "partials.cuh"

#ifndef SEQPAR_ARCHS
#define SEQPAR_ARCHS "unknown"
#endif

namespace seqpar {
namespace cuda {
namespace {

constexpr int kMaxDevices = 64;

// PTX version of the code this device was given: a device with clusters may still run code compiled without them.
int code_version() {
    cudaFuncAttributes attributes{};
    const auto kernel = &reduce_partials_kernel<float>;
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) != cudaSuccess) return 0;
    return attributes.ptxVersion;
}

bool query(Device& device, int ordinal) {
    int major = 0;
    const auto get = [&](int& value, cudaDeviceAttr attribute) {
        return cudaDeviceGetAttribute(&value, attribute, ordinal) == cudaSuccess;
    };
    if (!get(device.multiprocessors, cudaDevAttrMultiProcessorCount) ||
        !get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
        !get(device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor) ||
        !get(major, cudaDevAttrComputeCapabilityMajor)) {
        return false;
    }
    const int version = code_version();
    device.clusters = major >= 9 && version >= 90;
    return version > 0;
}

}  // namespace

bool current_device(Device& device, int& ordinal) {
    static Device known[kMaxDevices];
    static std::atomic<int> state[kMaxDevices];  // 0 unknown, 1 being written, 2 known
    if (cudaGetDevice(&ordinal) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    const bool cached = ordinal < kMaxDevices;
    if (cached && state[ordinal].load(std::memory_order_acquire) == 2) {
        device = known[ordinal];
        return true;
    }
    if (!query(device, ordinal)) {
        cudaGetLastError();
        return false;
    }
    int unknown = 0;
    if (cached && state[ordinal].compare_exchange_strong(unknown, 1)) {
        known[ordinal] = device;
        state[ordinal].store(2, std::memory_order_release);
    }
    return true;
}

const char* archs() {
    return SEQPAR_ARCHS;
}

}  // namespace cuda
}  // namespace seqpar
