#include <algorithm>

#include "dispatch.h"
#include "forward.cuh"
#include "generic.cuh"
#include "launch.h"

namespace seqpar {
namespace cuda {
namespace {

Status check(const NormForward& a) {
    const bool normed = a.norm != Norm::none;
    if (a.rows < 0 || a.cols < 1 || a.cols > kMaxCols) return Status::bad_argument;
    if (a.rows > 0 && (a.x == nullptr || a.shards < 1)) return Status::bad_argument;
    if (!normed && a.rows > 0 && a.z == nullptr) return Status::bad_argument;
    if (a.dropout.seed != nullptr && a.dropout.threshold > 65536) return Status::bad_argument;
    if (!computable(a.x_dtype, a.x_dtype)) return Status::unsupported;
    if ((a.z != nullptr || a.residual != nullptr) && !computable(a.z_dtype, a.x_dtype)) return Status::unsupported;
    if (normed && a.y_dtype != DType::e4m3 && !computable(a.y_dtype, a.x_dtype)) return Status::unsupported;
    return computable(a.w_dtype, a.x_dtype) ? Status::ok : Status::unsupported;
}

// The fewer columns a thread has, the more shards of them it can have on their way.
template <class X, class Z, bool kShards>
constexpr KernelShape kShape = kWidth<X, Z> == 4 ? KernelShape{4, {2, 0}, {kForwardThreads, 0}, 0}
                               : kShards         ? KernelShape{8, {1, 2}, {kForwardThreads, kForwardThreads}, 0}
                                                 : KernelShape{8, {2, 1}, {kForwardThreads, kForwardThreads}, 0};

// Whether every access is one of whole, aligned vectors.
template <class X, class Z>
bool vectors_fit(const NormForward& a) {
    constexpr int W = kWidth<X, Z>;
    const bool w_fits = a.w_dtype == a.x_dtype || a.w_dtype == DType::f32;
    const bool y_fits = a.y_dtype == a.x_dtype || a.y_dtype == DType::e4m3 || a.norm == Norm::none;
    if (!w_fits || !y_fits || a.cols % 8 != 0 || a.rows > kMaxPlannedRows) return false;
    for (const void* vector : {a.x_bias, a.weight, a.bias, a.weight2, a.bias2}) {
        if (!aligned_vector(vector, a.w_dtype, W)) return false;
    }
    return aligned(a.x, a.x_stride, a.rows, a.x_dtype, W) && aligned(a.x, a.shard_stride, a.shards, a.x_dtype, W) &&
           aligned(a.residual, a.residual_stride, a.rows, a.z_dtype, W) &&
           aligned(a.z, a.z_stride, a.rows, a.z_dtype, W) && aligned(a.y, a.y_stride, a.rows, a.y_dtype, W) &&
           aligned(a.y2, a.y2_stride, a.rows, a.y_dtype, W);
}

template <class X, class Z, int kUnits, bool kShards>
Status launch_units(const ForwardParams& p, void* stream) {
    const LaunchShape shape = launch_shape(p.geometry);
    return drops(p.args.dropout) ? launch<&forward_kernel<X, Z, kUnits, true, kShards>>(shape, p, stream)
                                 : launch<&forward_kernel<X, Z, kUnits, false, kShards>>(shape, p, stream);
}

// False where the generic kernel has to do it.
template <class X, class Z, bool kShards>
bool planned(Status& status, const NormForward& a, const Device& device, int sm_margin, void* stream) {
    constexpr KernelShape shape = kShape<X, Z, kShards>;
    ForwardParams p{};
    if (!vectors_fit<X, Z>(a) || !plan_rows(p.geometry, shape, device, a.rows, a.cols, sm_margin)) return false;
    p.args = a;
    p.args.dropout.rows.block = std::max<int64_t>(1, a.dropout.rows.block);
    p.divider = make_divider(p.args.dropout.rows.block);
    p.rows = static_cast<int>(a.rows);
    p.row_units = static_cast<int>(a.cols / shape.width);
    p.drop_limit = drop_limit(a.dropout);
    p.scale = dropout_scale(a.dropout);
    p.inverse_cols = 1.0f / static_cast<float>(a.cols);
    p.eps = static_cast<float>(a.eps);
    p.zero_centered = a.zero_centered;
    p.vectors_f32 = a.w_dtype == DType::f32;
    p.is_layer = a.norm == Norm::layer;
    if constexpr (shape.units[1] > 0) {
        if (p.geometry.units == shape.units[1]) {
            status = launch_units<X, Z, shape.units[1], kShards>(p, stream);
            return true;
        }
    }
    status = launch_units<X, Z, shape.units[0], kShards>(p, stream);
    return true;
}

template <class X, class Z>
bool planned(Status& status, const NormForward& a, const Device& device, int sm_margin, void* stream) {
    return a.shards > 1 ? planned<X, Z, true>(status, a, device, sm_margin, stream)
                        : planned<X, Z, false>(status, a, device, sm_margin, stream);
}

template <class X>
bool planned(Status& status, const NormForward& a, const Device& device, int sm_margin, void* stream) {
    const bool z_like_x = a.z_dtype == a.x_dtype || (a.z == nullptr && a.residual == nullptr);
    if (z_like_x) return planned<X, X>(status, a, device, sm_margin, stream);
    return a.z_dtype == DType::f32 && planned<X, float>(status, a, device, sm_margin, stream);
}

template <class Acc>
Status generic(const NormForward& a, const Device& device, int sm_margin, void* stream) {
    GenericForwardParams p{};
    p.args = a;
    p.inverse_cols = 1.0 / static_cast<double>(a.cols);
    p.geometry = plan_generic(device, a.rows, a.cols, sizeof(Acc), true, 0, sm_margin);
    p.scratch = scratch_bytes(p.geometry.threads, p.geometry.rows, 1, sizeof(Acc));
    p.hold_row = p.geometry.shared > p.scratch;
    return launch<&generic_forward_kernel<Acc>>(launch_shape(p.geometry), p, stream);
}

}  // namespace

Status norm_forward(const NormForward& a, int sm_margin, void* stream) {
    Status status = check(a);
    if (status != Status::ok || a.rows == 0) return status;
    Device device;
    int ordinal = 0;
    if (!current_device(device, ordinal)) return Status::launch_failed;
    switch (a.x_dtype) {
        case DType::f64:
            return generic<double>(a, device, sm_margin, stream);
        case DType::f32:
            if (planned<float>(status, a, device, sm_margin, stream)) return status;
            break;
        case DType::bf16:
            if (planned<bf16>(status, a, device, sm_margin, stream)) return status;
            break;
        default:
            if (planned<f16>(status, a, device, sm_margin, stream)) return status;
    }
    return generic<float>(a, device, sm_margin, stream);
}

}  // namespace cuda
}  // namespace seqpar
