// out = parts[0] + parts[1] + ... (+ bias), in that order in fp32: the arithmetic of a reduce-scatter.
#include <algorithm>

#include "dispatch.h"
#include "elements.cuh"
#include "launch.h"

namespace seqpar {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;  // parts a thread loads before it adds the first

// Block (columns, rows), grid likewise; a thread takes kWidth columns of one row at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) reduce_vectors_kernel(const __grid_constant__ ReduceShards a) {
    constexpr int W = 16 / static_cast<int>(sizeof(T));
    const T* const parts = static_cast<const T*>(a.parts);
    const int64_t row_step = int64_t{gridDim.y} * blockDim.y;
    const int64_t column_step = int64_t{gridDim.x} * blockDim.x * W;
    for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < a.rows; row += row_step) {
        int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * W;
        for (; column < a.cols; column += column_step) {
            float sum[W];
#pragma unroll
            for (int k = 0; k < W; ++k) sum[k] = -0.0f;  // what a first part is added to without a change
            add_shards<kInFlight>(sum, parts + row * a.row_stride + column, a.part_stride, a.count);
            if (a.bias != nullptr) {
                float bias[W];
                load_vector<T>(bias, a.bias, a.bias_dtype == DType::f32, static_cast<int>(column));
#pragma unroll
                for (int k = 0; k < W; ++k) sum[k] += bias[k];
            }
            store(static_cast<T*>(a.out) + row * a.out_stride + column, pack<T>(sum));
        }
    }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads) reduce_elements_kernel(const __grid_constant__ ReduceShards a) {
    const int64_t row_step = int64_t{gridDim.y} * blockDim.y, column_step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < a.rows; row += row_step) {
        int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
        for (; column < a.cols; column += column_step) {
            int64_t index = row * a.row_stride + column;
            Acc sum = load_element<Acc>(a.parts, a.dtype, index);
            for (int i = 1; i < a.count; ++i) {
                index += a.part_stride;
                sum += load_element<Acc>(a.parts, a.dtype, index);
            }
            if (a.bias != nullptr) sum += load_element<Acc>(a.bias, a.bias_dtype, column);
            store_element<Acc>(a.out, a.dtype, row * a.out_stride + column, sum);
        }
    }
}

LaunchShape shape_for(const ReduceShards& a, const Device& device, int width) {
    const int64_t units = (a.cols + width - 1) / width;
    unsigned x = 1;
    while (x < kThreads && x < units) x *= 2;
    const unsigned y = kThreads / x;
    // Enough CTAs to fill the device, few enough that each has more than one turn when there is work for it
    const int64_t most = int64_t{device.multiprocessors} * 8;
    const int64_t grid_x = std::min((units + x - 1) / x, most);
    const int64_t grid_y = std::min({(a.rows + y - 1) / y, std::max<int64_t>(1, most / grid_x), int64_t{65535}});
    return {dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)), dim3(x, y), 1, 0};
}

template <class T>
bool vectors_fit(const ReduceShards& a) {
    constexpr int W = 16 / static_cast<int>(sizeof(T));
    return a.cols % W == 0 && (a.bias_dtype == a.dtype || a.bias_dtype == DType::f32 || a.bias == nullptr) &&
           aligned(a.parts, a.row_stride, a.rows, a.dtype, W) && aligned(a.parts, a.part_stride, a.count, a.dtype, W) &&
           aligned(a.out, a.out_stride, a.rows, a.dtype, W) && aligned_vector(a.bias, a.bias_dtype, W);
}

template <class T>
Status reduce_vectors(const ReduceShards& a, const Device& device, void* stream) {
    return launch<&reduce_vectors_kernel<T>>(shape_for(a, device, 16 / static_cast<int>(sizeof(T))), a, stream);
}

}  // namespace

Status reduce_shards(const ReduceShards& args, void* stream) {
    ReduceShards a = args;
    if (a.rows < 0 || a.cols < 0 || a.count < 1) return Status::bad_argument;
    if (!computable(a.dtype, a.dtype)) return Status::unsupported;
    if (a.bias != nullptr && !computable(a.bias_dtype, a.dtype)) return Status::unsupported;
    if (a.rows == 0 || a.cols == 0) return Status::ok;
    if (a.rows > 1 && a.out_stride < a.cols) return Status::bad_argument;  // rows of `out` must not overlap
    if (a.parts == nullptr || a.out == nullptr) return Status::bad_argument;
    if (a.bias != nullptr && a.cols > kMaxCols) return Status::bad_argument;
    if (a.bias == nullptr && (a.rows == 1 || (a.row_stride == a.cols && a.out_stride == a.cols))) {
        a.cols *= a.rows;  // one long row
        a.rows = 1;
    }
    Device device;
    int ordinal = 0;
    if (!current_device(device, ordinal)) return Status::launch_failed;
    switch (a.dtype) {
        case DType::f64:
            return launch<&reduce_elements_kernel<double>>(shape_for(a, device, 1), a, stream);
        case DType::bf16:
            if (vectors_fit<bf16>(a)) return reduce_vectors<bf16>(a, device, stream);
            break;
        case DType::f16:
            if (vectors_fit<f16>(a)) return reduce_vectors<f16>(a, device, stream);
            break;
        default:
            if (vectors_fit<float>(a)) return reduce_vectors<float>(a, device, stream);
    }
    return launch<&reduce_elements_kernel<float>>(shape_for(a, device, 1), a, stream);
}

}  // namespace cuda
}  // namespace seqpar
