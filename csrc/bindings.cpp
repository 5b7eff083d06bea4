// The only file, with bindings_attention.cpp, that knows Python. It takes tensors as Python objects (None: absent) and
// calls only data_ptr(), is_contiguous(), and strides of tensors that are not contiguous: the same calls from Python
// would cost several times as much.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "seqpar.h"

namespace py = pybind11;
using namespace seqpar;

namespace {

// A contiguous tensor that the caller has just made.
struct Vector {
    char* data = nullptr;

    operator void*() const { return data; }
    template <typename T>
    operator const T*() const {
        return reinterpret_cast<const T*>(data);
    }
};

// A tensor of the user, which may have any strides.
struct GivenVector : Vector {
    bool readable = true;  // else a copy must be made first
};

// A tensor [..., cols] with its rows evenly apart: a contiguous one, or [rows, cols] with contiguous columns.
struct Matrix : GivenVector {
    bool contiguous = true;
    int64_t distance = 0;  // of two rows, where not contiguous

    int64_t stride(int64_t cols) const { return contiguous ? cols : distance; }
};

template <typename... Given>
bool readable(const Given&... given) {
    return (given.readable && ...);
}

py::object ask(py::handle tensor, PyObject* method) {
    PyObject* const answer = PyObject_CallMethodNoArgs(tensor.ptr(), method);
    if (answer == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(answer);
}

void load(Vector& vector, py::handle tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    vector.data = static_cast<char*>(PyLong_AsVoidPtr(ask(tensor, data_ptr).ptr()));
}

void load(GivenVector& vector, py::handle tensor) {
    static PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
    load(static_cast<Vector&>(vector), tensor);
    vector.readable = ask(tensor, is_contiguous).ptr() == Py_True;
}

void load(Matrix& matrix, py::handle tensor) {
    load(static_cast<GivenVector&>(matrix), tensor);
    matrix.contiguous = matrix.readable;
    if (matrix.contiguous || tensor.attr("dim")().cast<int>() != 2) return;
    matrix.readable = tensor.attr("stride")(1).cast<int64_t>() == 1 || tensor.attr("size")(1).cast<int64_t>() == 1;
    matrix.distance = tensor.attr("stride")(0).cast<int64_t>();
}

}  // namespace

template <typename T>
struct TensorCaster {
    PYBIND11_TYPE_CASTER(T, py::detail::const_name("Tensor | None"));

    bool load(py::handle tensor, bool) {
        if (!tensor.is_none()) ::load(value, tensor);
        return true;
    }
};

template <>
struct pybind11::detail::type_caster<Vector> : TensorCaster<Vector> {};
template <>
struct pybind11::detail::type_caster<GivenVector> : TensorCaster<GivenVector> {};
template <>
struct pybind11::detail::type_caster<Matrix> : TensorCaster<Matrix> {};

namespace {

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

// Launch options: a thread count for the CPU; for CUDA a stream and the number of multiprocessors to leave free.
struct Place {
    bool is_cuda;
    int threads_or_margin;
    void* stream;
};

#ifdef SEQPAR_WITH_CUDA
#define SEQPAR_DISPATCH(on_cpu, on_cuda) (place.is_cuda ? (on_cuda) : (on_cpu))
#else
Status no_cuda() {
    throw std::runtime_error("seqpar_kernels was built without CUDA; see python -m seqpar_kernels");
}
#define SEQPAR_DISPATCH(on_cpu, on_cuda) (place.is_cuda ? no_cuda() : (on_cpu))
#endif

// NormSpec of kernels/spec.py as the struct of the kernels.
struct NormSpec {
    Norm norm;
    bool zero_centered;
    double eps;
    DType x_dtype, z_dtype, y_dtype, w_dtype;
    uint32_t threshold;
    double scale;
    RowMap rows;

    NormSpec(int norm, bool zero_centered, double eps, int x_dtype, int z_dtype, int y_dtype, int w_dtype,
             uint32_t threshold, double scale, int64_t block, int64_t stride, int64_t offset)
        : norm(static_cast<Norm>(norm)),
          zero_centered(zero_centered),
          eps(eps),
          x_dtype(static_cast<DType>(x_dtype)),
          z_dtype(static_cast<DType>(z_dtype)),
          y_dtype(static_cast<DType>(y_dtype)),
          w_dtype(static_cast<DType>(w_dtype)),
          threshold(threshold),
          scale(scale),
          rows{block, stride, offset} {}

    // `statistics` holds mean and rstd of the rows, or rstd alone.
    template <typename Args>
    Args arguments(int64_t n_rows, int64_t cols, const Vector& seed, const Vector& statistics) const {
        Args args{};
        args.rows = n_rows;
        args.cols = cols;
        args.norm = norm;
        args.zero_centered = zero_centered;
        args.x_dtype = x_dtype;
        args.z_dtype = z_dtype;
        args.y_dtype = y_dtype;
        args.w_dtype = w_dtype;
        args.dropout = {seed, threshold, scale, rows};
        args.mean = args.rstd = statistics;
        if (norm == Norm::layer && statistics.data) {
            args.rstd = statistics.data + n_rows * (x_dtype == DType::f64 ? sizeof(double) : sizeof(float));
        }
        return args;
    }
};

// Returns false and does nothing where a tensor has strides that the kernels cannot read: the caller copies it first.
bool norm_forward(bool is_cuda, int threads_or_margin, uintptr_t stream, const NormSpec& spec, int64_t rows,
                  int64_t cols, Matrix x, int shards, int64_t shard_stride, GivenVector x_bias, GivenVector row_scale,
                  Matrix residual, GivenVector weight, GivenVector bias, GivenVector weight2, GivenVector bias2,
                  Vector seed, Matrix z, Matrix y, Matrix y2, Vector y_scale, Vector statistics) {
    if (!readable(x, x_bias, row_scale, residual, weight, bias, weight2, bias2)) return false;
    const Place place{is_cuda, threads_or_margin, reinterpret_cast<void*>(stream)};
    if (!is_cuda && spec.y_dtype == DType::e4m3) {
        throw std::invalid_argument("y_scale: the CPU kernels store no float8; backend='reference' does");
    }
    NormForward args = spec.arguments<NormForward>(rows, cols, seed, statistics);
    args.eps = spec.eps;
    args.x = x;
    args.x_stride = x.stride(cols);
    args.shards = shards;
    args.shard_stride = shard_stride;
    args.x_bias = x_bias;
    args.row_scale = row_scale;
    args.residual = residual;
    args.residual_stride = residual.stride(cols);
    args.weight = weight;
    args.bias = bias;
    args.weight2 = weight2;
    args.bias2 = bias2;
    args.z = z;
    args.z_stride = z.stride(cols);
    args.y = y;
    args.y_stride = y.stride(cols);
    args.y2 = y2;
    args.y2_stride = y2.stride(cols);
    args.y_scale = y_scale;
    py::gil_scoped_release release;
    check(SEQPAR_DISPATCH(cpu::norm_forward(args, place.threads_or_margin),
                          cuda::norm_forward(args, place.threads_or_margin, place.stream)),
          "norm_forward");
    return true;
}

// False as in norm_forward.
bool norm_backward(bool is_cuda, int threads_or_margin, uintptr_t stream, const NormSpec& spec, int64_t rows,
                   int64_t cols, Matrix dy, Matrix dy2, Matrix dz, Matrix z, GivenVector statistics,
                   GivenVector row_scale, GivenVector weight, GivenVector weight2, Vector seed, Matrix dx,
                   Matrix dresidual, Vector dweight, Vector dbias, Vector dweight2, Vector dbias2, Vector dx_bias,
                   Vector workspace) {
    if (!readable(dy, dy2, dz, z, statistics, row_scale, weight, weight2)) return false;
    const Place place{is_cuda, threads_or_margin, reinterpret_cast<void*>(stream)};
    NormBackward args = spec.arguments<NormBackward>(rows, cols, seed, statistics);
    args.dy = dy;
    args.dy_stride = dy.stride(cols);
    args.dy2 = dy2;
    args.dy2_stride = dy2.stride(cols);
    args.dz = dz;
    args.dz_stride = dz.stride(cols);
    args.z = z;
    args.z_stride = z.stride(cols);
    args.row_scale = row_scale;
    args.weight = weight;
    args.weight2 = weight2;
    args.dx = dx;
    args.dx_stride = dx.stride(cols);
    args.dresidual = dresidual;
    args.dresidual_stride = dresidual.stride(cols);
    args.dweight = dweight;
    args.dbias = dbias;
    args.dweight2 = dweight2;
    args.dbias2 = dbias2;
    args.dx_bias = dx_bias;
    args.workspace = workspace;
    py::gil_scoped_release release;
    check(SEQPAR_DISPATCH(cpu::norm_backward(args, place.threads_or_margin),
                          cuda::norm_backward(args, place.threads_or_margin, place.stream)),
          "norm_backward");
    return true;
}

// Bytes of workspace norm_backward needs. `vectors` is a bit set of the [cols] gradients wanted, lowest bit first:
// dweight, dbias, dweight2, dbias2, dx_bias.
int64_t norm_backward_workspace(bool is_cuda, int margin, const NormSpec& spec, int64_t rows, int64_t cols,
                                int vectors) {
    NormBackward args = spec.arguments<NormBackward>(rows, cols, {}, {});
    static char wanted;  // only tested for null
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

void reduce_shards(bool is_cuda, int threads, uintptr_t stream, int64_t rows, int64_t cols, int count, int dtype,
                   int bias_dtype, Vector parts, int64_t part_stride, int64_t row_stride, Vector bias, Matrix out) {
    const Place place{is_cuda, threads, reinterpret_cast<void*>(stream)};
    const ReduceShards args{
        rows,       cols, count, static_cast<DType>(dtype), static_cast<DType>(bias_dtype), parts, part_stride,
        row_stride, bias, out,   out.stride(cols)};
    py::gil_scoped_release release;
    check(SEQPAR_DISPATCH(cpu::reduce_shards(args, place.threads_or_margin), cuda::reduce_shards(args, place.stream)),
          "reduce_shards");
}

}  // namespace

void bind_attention(py::module_& m);  // bindings_attention.cpp

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of seqpar_kernels; called through seqpar_kernels.kernels.native";
    py::class_<NormSpec>(m, "NormSpec", py::module_local())
        .def(py::init<int, bool, double, int, int, int, int, uint32_t, double, int64_t, int64_t, int64_t>());
    m.attr("interface") = 3;  // raised with every change of a signature below; kernels/native.py expects this one
    m.def("norm_forward", &norm_forward);
    m.def("norm_backward", &norm_backward);
    m.def("norm_backward_workspace", &norm_backward_workspace);
    m.def("reduce_shards", &reduce_shards);
    bind_attention(m);
    m.def("cpu_isa", &cpu::isa);
    m.def("cpu_threading", &cpu::threading);
    m.def("cpu_stream_beyond", &cpu::stream_beyond);
#ifdef SEQPAR_WITH_CUDA
    m.attr("has_cuda") = true;
    m.def("cuda_archs", &cuda::archs);
#else
    m.attr("has_cuda") = false;
#endif
}
