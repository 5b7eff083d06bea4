// Second stage of the column sums: the rows of the workspace, added in their order.
#pragma once

#include "elements.cuh"

namespace seqpar {
namespace cuda {

constexpr int kReduceColumns = 32, kReduceSlices = 16;

template <class Acc>
struct PartialsParams {
    const Acc* partials;  // [count][slots][cols]
    int count, slots;
    int64_t cols;
    DType dtype;
    void* outputs[5];  // [slots], each [cols]
};

// Grid (cols / 32, slots), block (32, 16): slice s of a column's partial sums is s, s + 16, s + 32, ...
template <class Acc>
__global__ void __launch_bounds__(kReduceColumns* kReduceSlices)
    reduce_partials_kernel(const __grid_constant__ PartialsParams<Acc> p) {
    Acc* const slices = reinterpret_cast<Acc*>(dynamic_shared());  // [kReduceSlices][kReduceColumns]
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
    const int slot = static_cast<int>(blockIdx.y);
    const int64_t step = p.slots * p.cols;
    Acc sum = 0;
    if (column < p.cols) {
        const Acc* const base = p.partials + slot * p.cols + column;
#pragma unroll 8
        for (int i = static_cast<int>(threadIdx.y); i < p.count; i += kReduceSlices) sum += base[i * step];
    }
    slices[threadIdx.y * kReduceColumns + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= p.cols) return;
    for (int s = 1; s < kReduceSlices; ++s) sum += slices[s * kReduceColumns + threadIdx.x];
    store_element<Acc>(p.outputs[slot], p.dtype, column, sum);
}

}  // namespace cuda
}  // namespace seqpar
