// Device properties and kernel launches. No allocation and no synchronisation: all of it may be captured into a graph.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "geometry.h"

namespace seqpar {
namespace cuda {

// The current device; queried once for each. False when there is none.
bool current_device(Device& device, int& ordinal);

struct LaunchShape {
    dim3 grid, block;
    int cluster, shared;
};

inline LaunchShape launch_shape(const Geometry& g) {
    return {dim3(static_cast<unsigned>(g.grid)), dim3(static_cast<unsigned>(g.threads), static_cast<unsigned>(g.rows)),
            g.cluster, g.shared};
}

template <auto kKernel, class Params>
Status launch(const LaunchShape& shape, const Params& params, void* stream) {
    Device device;
    int ordinal = 0;
    if (!current_device(device, ordinal)) return Status::launch_failed;
    if (shape.shared > 48 * 1024) {  // more than a kernel gets unasked: once for each kernel and device
        static std::atomic<uint64_t> raised{0};
        const uint64_t bit = uint64_t{1} << (ordinal % 64);
        if (!(raised.load() & bit)) {
            if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     device.shared_per_block) != cudaSuccess) {
                cudaGetLastError();
                return Status::launch_failed;
            }
            raised |= bit;
        }
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
    if (cudaLaunchKernelEx(&config, kKernel, params) == cudaSuccess) return Status::ok;
    cudaGetLastError();  // the error is reported here; clear it, so that no later call reports it again
    return Status::launch_failed;
}

}  // namespace cuda
}  // namespace seqpar
