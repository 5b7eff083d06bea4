// The only file that knows Python. Addresses arrive as integers (torch.Tensor.data_ptr()), 0 standing for "absent".
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "seqpar.h"

namespace py = pybind11;
using namespace seqpar;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(Status status, const char* kernel) {
    switch (status) {
        case Status::ok:
            return;
        case Status::unsupported:
            throw std::invalid_argument(std::string(kernel) + ": no kernel for this combination of dtypes");
        case Status::bad_argument:
            throw std::invalid_argument(std::string(kernel) + ": sizes, strides or pointers do not fit together");
        case Status::launch_failed:
            throw std::runtime_error(std::string(kernel) + ": the device refused the launch");
    }
}

// Where a kernel runs: a thread count for the CPU, a stream and a number of multiprocessors to leave free for CUDA.
struct Place {
    bool is_cuda;
    int threads_or_margin;
    Address stream;
};

#ifdef SEQPAR_WITH_CUDA
#define SEQPAR_DISPATCH(on_cpu, on_cuda) (place.is_cuda ? (on_cuda) : (on_cpu))
#else
Status no_cuda() {
    throw std::runtime_error("seqpar_kernels was built without CUDA; see python -m seqpar_kernels");
}
#define SEQPAR_DISPATCH(on_cpu, on_cuda) (place.is_cuda ? no_cuda() : (on_cpu))
#endif

void norm_forward(bool is_cuda, int threads_or_margin, Address stream, int64_t rows, int64_t cols, int norm,
                  bool zero_centered, double eps, int x_dtype, int z_dtype, int y_dtype, int w_dtype, Address x,
                  int64_t x_stride, Address x_bias, Address row_scale, Address residual, int64_t residual_stride,
                  Address seed, uint32_t threshold, double scale, int64_t block, int64_t stride, int64_t offset,
                  Address weight, Address bias, Address weight2, Address bias2, Address z, int64_t z_stride, Address y,
                  int64_t y_stride, Address y2, int64_t y2_stride, Address y_scale, Address mean, Address rstd) {
    const Place place{is_cuda, threads_or_margin, stream};
    NormForward args{};
    args.rows = rows;
    args.cols = cols;
    args.norm = static_cast<Norm>(norm);
    args.zero_centered = zero_centered;
    args.eps = eps;
    args.x_dtype = static_cast<DType>(x_dtype);
    args.z_dtype = static_cast<DType>(z_dtype);
    args.y_dtype = static_cast<DType>(y_dtype);
    args.w_dtype = static_cast<DType>(w_dtype);
    args.x = at(x);
    args.x_stride = x_stride;
    args.x_bias = at(x_bias);
    args.row_scale = at<const float>(row_scale);
    args.residual = at(residual);
    args.residual_stride = residual_stride;
    args.dropout = {at<const int64_t>(seed), threshold, scale, {block, stride, offset}};
    args.weight = at(weight);
    args.bias = at(bias);
    args.weight2 = at(weight2);
    args.bias2 = at(bias2);
    args.z = at(z);
    args.z_stride = z_stride;
    args.y = at(y);
    args.y_stride = y_stride;
    args.y2 = at(y2);
    args.y2_stride = y2_stride;
    args.y_scale = at<const float>(y_scale);
    args.mean = at(mean);
    args.rstd = at(rstd);
    py::gil_scoped_release release;
    check(SEQPAR_DISPATCH(cpu::norm_forward(args, place.threads_or_margin),
                          cuda::norm_forward(args, place.threads_or_margin, at(place.stream))),
          "norm_forward");
}

NormBackward backward_sizes(int64_t rows, int64_t cols, int norm, bool zero_centered, int x_dtype, int z_dtype,
                            int y_dtype, int w_dtype) {
    NormBackward args{};
    args.rows = rows;
    args.cols = cols;
    args.norm = static_cast<Norm>(norm);
    args.zero_centered = zero_centered;
    args.x_dtype = static_cast<DType>(x_dtype);
    args.z_dtype = static_cast<DType>(z_dtype);
    args.y_dtype = static_cast<DType>(y_dtype);
    args.w_dtype = static_cast<DType>(w_dtype);
    return args;
}

void norm_backward(bool is_cuda, int threads_or_margin, Address stream, int64_t rows, int64_t cols, int norm,
                   bool zero_centered, int x_dtype, int z_dtype, int y_dtype, int w_dtype, Address dy,
                   int64_t dy_stride, Address dy2, int64_t dy2_stride, Address dz, int64_t dz_stride, Address z,
                   int64_t z_stride, Address mean, Address rstd, Address row_scale, Address seed, uint32_t threshold,
                   double scale, int64_t block, int64_t stride, int64_t offset, Address weight, Address weight2,
                   Address dx, int64_t dx_stride, Address dresidual, int64_t dresidual_stride, Address dweight,
                   Address dbias, Address dweight2, Address dbias2, Address dx_bias, Address workspace) {
    const Place place{is_cuda, threads_or_margin, stream};
    NormBackward args = backward_sizes(rows, cols, norm, zero_centered, x_dtype, z_dtype, y_dtype, w_dtype);
    args.dy = at(dy);
    args.dy_stride = dy_stride;
    args.dy2 = at(dy2);
    args.dy2_stride = dy2_stride;
    args.dz = at(dz);
    args.dz_stride = dz_stride;
    args.z = at(z);
    args.z_stride = z_stride;
    args.mean = at(mean);
    args.rstd = at(rstd);
    args.row_scale = at<const float>(row_scale);
    args.dropout = {at<const int64_t>(seed), threshold, scale, {block, stride, offset}};
    args.weight = at(weight);
    args.weight2 = at(weight2);
    args.dx = at(dx);
    args.dx_stride = dx_stride;
    args.dresidual = at(dresidual);
    args.dresidual_stride = dresidual_stride;
    args.dweight = at(dweight);
    args.dbias = at(dbias);
    args.dweight2 = at(dweight2);
    args.dbias2 = at(dbias2);
    args.dx_bias = at(dx_bias);
    args.workspace = at(workspace);
    py::gil_scoped_release release;
    check(SEQPAR_DISPATCH(cpu::norm_backward(args, place.threads_or_margin),
                          cuda::norm_backward(args, place.threads_or_margin, at(place.stream))),
          "norm_backward");
}

// Bytes of workspace norm_backward needs. `vectors` is a bit set of the [cols] gradients wanted, lowest bit first:
// dweight, dbias, dweight2, dbias2, dx_bias.
int64_t norm_backward_workspace(bool is_cuda, int margin, int64_t rows, int64_t cols, int norm, int x_dtype,
                                int z_dtype, int y_dtype, int w_dtype, int vectors) {
    NormBackward args = backward_sizes(rows, cols, norm, false, x_dtype, z_dtype, y_dtype, w_dtype);
    static char wanted;  // only "null or not" is looked at
    void** outputs[] = {&args.dweight, &args.dbias, &args.dweight2, &args.dbias2, &args.dx_bias};
    for (int i = 0; i < 5; ++i) {
        if (vectors >> i & 1) *outputs[i] = &wanted;
    }
#ifdef SEQPAR_WITH_CUDA
    if (is_cuda) return cuda::norm_backward_workspace(args, margin);
#else
    (void)is_cuda, (void)margin;
#endif
    return cpu::norm_backward_workspace(args);
}

void reduce_shards(bool is_cuda, int threads, Address stream, int64_t rows, int64_t cols, int count, int dtype,
                   int bias_dtype, Address parts, int64_t part_stride, int64_t row_stride, Address bias, Address out,
                   int64_t out_stride) {
    const Place place{is_cuda, threads, stream};
    const ReduceShards args{rows,
                            cols,
                            count,
                            static_cast<DType>(dtype),
                            static_cast<DType>(bias_dtype),
                            at(parts),
                            part_stride,
                            row_stride,
                            at(bias),
                            at(out),
                            out_stride};
    py::gil_scoped_release release;
    check(
        SEQPAR_DISPATCH(cpu::reduce_shards(args, place.threads_or_margin), cuda::reduce_shards(args, at(place.stream))),
        "reduce_shards");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of seqpar_kernels; called through seqpar_kernels.kernels.native";
    m.def("norm_forward", &norm_forward);
    m.def("norm_backward", &norm_backward);
    m.def("norm_backward_workspace", &norm_backward_workspace);
    m.def("reduce_shards", &reduce_shards);
    m.def("cpu_isa", &cpu::isa);
    m.def("cpu_threading", &cpu::threading);
#ifdef SEQPAR_WITH_CUDA
    m.attr("has_cuda") = true;
    m.def("cuda_archs", &cuda::archs);
#else
    m.attr("has_cuda") = false;
#endif
}
