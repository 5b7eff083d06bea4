#include <algorithm>

#include "backward.cuh"
#include "dispatch.h"
#include "generic.cuh"
#include "launch.h"

namespace seqpar {
namespace cuda {
namespace {

Status check(const NormBackward& a) {
    const bool normed = a.norm != Norm::none;
    if (a.rows < 0 || a.cols < 1 || a.cols > kMaxCols) return Status::bad_argument;
    if (a.rows > 0 && !normed && a.dz == nullptr) return Status::bad_argument;
    if (a.rows > 0 && normed && (a.z == nullptr || a.rstd == nullptr)) return Status::bad_argument;
    if (a.rows > 0 && a.norm == Norm::layer && a.mean == nullptr) return Status::bad_argument;
    if (a.dropout.seed != nullptr && a.dropout.threshold > 65536) return Status::bad_argument;
    for (DType dtype : {a.x_dtype, a.z_dtype, a.w_dtype}) {
        if (!computable(dtype, a.x_dtype)) return Status::unsupported;
    }
    return !normed || computable(a.y_dtype, a.x_dtype) ? Status::ok : Status::unsupported;
}

// The column sums that are wanted, in the order of NormBackward.
struct Sums {
    int slot[kVectors];
    int count = 0;
    void* outputs[kVectors] = {};

    explicit Sums(const NormBackward& a) {
        void* const wanted[kVectors] = {a.dweight, a.dbias, a.dweight2, a.dbias2, a.dx_bias};
        for (int i = 0; i < kVectors; ++i) {
            slot[i] = wanted[i] != nullptr ? count : -1;
            if (wanted[i] != nullptr) outputs[count++] = wanted[i];
        }
    }
};

template <class X, class Z>
KernelShape shape_for(int column_sums) {
    return kWidth<X, Z> == 8 ? KernelShape{8, {2, 1}, {kBackwardThreads, kBackwardThreads}, column_sums}
                             : KernelShape{4, {2, 4}, {kBackwardThreads, kBackwardThreads}, column_sums};
}

// The planned grid, where dtypes and sizes allow it; alignment is not looked at.
bool plan(Geometry& geometry, const NormBackward& a, const Device& device, int column_sums, int sm_margin) {
    const bool half = a.x_dtype == DType::bf16 || a.x_dtype == DType::f16;
    if (!half && a.x_dtype != DType::f32) return false;
    if (a.z_dtype != a.x_dtype && a.z_dtype != DType::f32) return false;
    if (a.w_dtype != a.x_dtype && a.w_dtype != DType::f32) return false;
    if (a.norm != Norm::none && a.y_dtype != a.x_dtype) return false;
    if (a.cols % 8 != 0 || a.rows > kMaxPlannedRows) return false;
    const bool wide = half && a.z_dtype == a.x_dtype;
    const KernelShape shape = wide ? shape_for<bf16, bf16>(column_sums) : shape_for<float, float>(column_sums);
    return plan_rows(geometry, shape, device, a.rows, a.cols, sm_margin);
}

bool vectors_fit(const NormBackward& a, int width) {
    return aligned(a.dy, a.dy_stride, a.rows, a.y_dtype, width) &&
           aligned(a.dy2, a.dy2_stride, a.rows, a.y_dtype, width) &&
           aligned(a.dz, a.dz_stride, a.rows, a.z_dtype, width) && aligned(a.z, a.z_stride, a.rows, a.z_dtype, width) &&
           aligned(a.dx, a.dx_stride, a.rows, a.x_dtype, width) &&
           aligned(a.dresidual, a.dresidual_stride, a.rows, a.z_dtype, width) &&
           aligned_vector(a.weight, a.w_dtype, width) && aligned_vector(a.weight2, a.w_dtype, width);
}

Geometry generic_geometry(const NormBackward& a, const Device& device, int column_sums, int sm_margin) {
    const int element_size = a.x_dtype == DType::f64 ? 8 : 4;
    return plan_generic(device, a.rows, a.cols, element_size, false, a.cols * column_sums * element_size, sm_margin);
}

template <class X, class Z, int kUnits>
Status launch_units(const BackwardParams& p, void* stream) {
    const LaunchShape shape = launch_shape(p.geometry);
    return drops(p.args.dropout) ? launch<&backward_kernel<X, Z, kUnits, true>>(shape, p, stream)
                                 : launch<&backward_kernel<X, Z, kUnits, false>>(shape, p, stream);
}

template <class X, class Z>
Status launch_planned(const NormBackward& a, const Geometry& geometry, const Sums& sums, void* stream) {
    constexpr int W = kWidth<X, Z>;
    BackwardParams p{};
    p.args = a;
    p.geometry = geometry;
    p.args.dropout.rows.block = std::max<int64_t>(1, a.dropout.rows.block);
    p.divider = make_divider(p.args.dropout.rows.block);
    p.rows = static_cast<int>(a.rows);
    p.row_units = static_cast<int>(a.cols / W);
    p.drop_limit = drop_limit(a.dropout);
    p.scale = dropout_scale(a.dropout);
    p.inverse_cols = 1.0f / static_cast<float>(a.cols);
    p.zero_centered = a.zero_centered;
    p.vectors_f32 = a.w_dtype == DType::f32;
    p.is_layer = a.norm == Norm::layer;
    p.scratch = scratch_bytes(geometry.threads, geometry.rows, geometry.cluster, 4);
    std::copy(sums.slot, sums.slot + kVectors, p.slot);
    p.slots = sums.count;
    p.partials = static_cast<float*>(a.workspace);
    if (geometry.units == 2) return launch_units<X, Z, 2>(p, stream);
    return launch_units<X, Z, W == 8 ? 1 : 4>(p, stream);
}

template <class X>
Status launch_planned(const NormBackward& a, const Geometry& geometry, const Sums& sums, void* stream) {
    return a.z_dtype == a.x_dtype ? launch_planned<X, X>(a, geometry, sums, stream)
                                  : launch_planned<X, float>(a, geometry, sums, stream);
}

Status launch_planned(const NormBackward& a, const Geometry& geometry, const Sums& sums, void* stream) {
    switch (a.x_dtype) {
        case DType::bf16:
            return launch_planned<bf16>(a, geometry, sums, stream);
        case DType::f16:
            return launch_planned<f16>(a, geometry, sums, stream);
        default:
            return launch_planned<float, float>(a, geometry, sums, stream);
    }
}

template <class Acc>
Status launch_generic(const NormBackward& a, const Geometry& geometry, const Sums& sums, void* stream) {
    GenericBackwardParams p{};
    p.args = a;
    p.inverse_cols = 1.0 / static_cast<double>(a.cols);
    p.geometry = geometry;
    std::copy(sums.slot, sums.slot + kVectors, p.slot);
    p.slots = sums.count;
    p.partials = a.workspace;
    return launch<&generic_backward_kernel<Acc>>(launch_shape(geometry), p, stream);
}

template <class Acc>
Status reduce_partials(const NormBackward& a, const Sums& sums, int count, void* stream) {
    if (sums.count == 0) return Status::ok;
    PartialsParams<Acc> p{};
    p.partials = static_cast<const Acc*>(a.workspace);
    p.count = count;
    p.slots = sums.count;
    p.cols = a.cols;
    p.dtype = a.w_dtype;
    std::copy(sums.outputs, sums.outputs + kVectors, p.outputs);
    const LaunchShape shape{
        dim3(static_cast<unsigned>((a.cols + kReduceColumns - 1) / kReduceColumns), static_cast<unsigned>(sums.count)),
        dim3(kReduceColumns, kReduceSlices), 1, static_cast<int>(sizeof(Acc)) * kReduceColumns * kReduceSlices};
    return launch<&reduce_partials_kernel<Acc>>(shape, p, stream);
}

}  // namespace

int64_t norm_backward_workspace(const NormBackward& a, int sm_margin) {
    const Sums sums(a);
    Device device;
    int ordinal = 0;
    if (sums.count == 0 || a.rows == 0 || !current_device(device, ordinal)) return 0;
    Geometry planned{};
    const bool fits = plan(planned, a, device, sums.count, sm_margin);
    // Alignment, not known yet, decides which of the two it will be
    const int64_t generic = generic_geometry(a, device, sums.count, sm_margin).row_step;
    const int64_t partial_rows = std::max(generic, fits ? int64_t{planned.partials} : 0);
    return partial_rows * sums.count * a.cols * (a.x_dtype == DType::f64 ? 8 : 4);
}

Status norm_backward(const NormBackward& a, int sm_margin, void* stream) {
    Status status = check(a);
    if (status != Status::ok) return status;
    const Sums sums(a);
    const bool f64 = a.x_dtype == DType::f64;
    if (a.rows == 0) {  // sums of nothing
        return f64 ? reduce_partials<double>(a, sums, 0, stream) : reduce_partials<float>(a, sums, 0, stream);
    }
    if (sums.count > 0 && a.workspace == nullptr) return Status::bad_argument;
    Device device;
    int ordinal = 0;
    if (!current_device(device, ordinal)) return Status::launch_failed;

    Geometry geometry{};
    int partial_rows = 0;
    const int width = a.x_dtype == a.z_dtype && size_of(a.x_dtype) == 2 ? 8 : 4;
    if (plan(geometry, a, device, sums.count, sm_margin) && vectors_fit(a, width)) {
        partial_rows = geometry.partials;
        status = launch_planned(a, geometry, sums, stream);
    } else {
        geometry = generic_geometry(a, device, sums.count, sm_margin);
        partial_rows = geometry.row_step;
        status =
            f64 ? launch_generic<double>(a, geometry, sums, stream) : launch_generic<float>(a, geometry, sums, stream);
    }
    if (status != Status::ok) return status;
    return f64 ? reduce_partials<double>(a, sums, partial_rows, stream)
               : reduce_partials<float>(a, sums, partial_rows, stream);
}

}  // namespace cuda
}  // namespace seqpar
