// The attention kernels for Python: tensors [batch, rows, heads, columns] of any strides; None: absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "seqpar.h"

namespace py = pybind11;
using namespace seqpar;

namespace {

struct Tensor {
    char* data = nullptr;
    int64_t size[4] = {}, stride[4] = {};

    operator void*() const { return data; }
    template <typename T>
    operator const T*() const {
        return reinterpret_cast<const T*>(data);
    }
    operator HeadView() const { return {data, stride[0], stride[1], stride[2]}; }
};

}  // namespace

template <>
struct pybind11::detail::type_caster<Tensor> {
    PYBIND11_TYPE_CASTER(Tensor, const_name("Tensor | None"));

    bool load(handle tensor, bool) {
        if (tensor.is_none()) return true;
        value.data = static_cast<char*>(PyLong_AsVoidPtr(tensor.attr("data_ptr")().ptr()));
        const tuple sizes = tensor.attr("shape"), strides = tensor.attr("stride")();
        if (sizes.size() > 4) return false;
        for (size_t i = 0; i < sizes.size(); ++i) {
            value.size[i] = sizes[i].cast<int64_t>();
            value.stride[i] = strides[i].cast<int64_t>();
        }
        return true;
    }
};

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
            throw std::runtime_error(std::string(kernel) + ": there is not enough memory for its scratch");
    }
}

// AttentionSpec of kernels/attention_spec.py, and the tensors beside q, k and v.
struct Extras {
    AttentionScores scores{};

    Extras(int dtype, double scale, double softcap, int64_t shift, int64_t left, int64_t right, Tensor first,
           Tensor last, int bias_dtype, Tensor bias, Tensor mask, Tensor seed, uint32_t threshold, double dropout_scale,
           int64_t first_batch, int64_t all_heads, int64_t first_head, int64_t all_rows, int64_t q_offset,
           int64_t k_offset, Tensor q_positions, Tensor k_positions) {
        scores.dtype = static_cast<DType>(dtype);
        scores.scale = scale;
        scores.softcap = softcap;
        scores.shift = shift;
        scores.left = left;
        scores.right = right;
        scores.first = first;
        scores.last = last;
        scores.interval_batch = first.stride[0];
        scores.bias_dtype = static_cast<DType>(bias_dtype);
        scores.bias = bias;
        scores.bias_batch = bias.stride[0], scores.bias_head = bias.stride[1];
        scores.bias_row = bias.stride[2], scores.bias_key = bias.stride[3];
        scores.mask = mask;
        scores.mask_batch = mask.stride[0], scores.mask_head = mask.stride[1];
        scores.mask_row = mask.stride[2], scores.mask_key = mask.stride[3];
        scores.seed = seed;
        scores.threshold = threshold;
        scores.dropout_scale = dropout_scale;
        scores.first_batch = first_batch;
        scores.all_heads = all_heads;
        scores.first_head = first_head;
        scores.all_rows = all_rows;
        scores.q_offset = q_offset;
        scores.k_offset = k_offset;
        scores.q_positions = q_positions;
        scores.k_positions = k_positions;
    }

    AttentionScores with(const Tensor& q, const Tensor& k, const Tensor& v) const {
        AttentionScores s = scores;
        s.batch = q.size[0];
        s.q_rows = q.size[1];
        s.q_heads = q.size[2];
        s.head_dim = q.size[3];
        s.k_rows = k.size[1];
        s.kv_heads = k.size[2];
        s.value_dim = v.size[3];
        s.q = q;
        s.k = k;
        s.v = v;
        return s;
    }
};

void attention_forward(int threads, const Extras& extras, Tensor q, Tensor k, Tensor v, bool resume, Tensor acc,
                       Tensor maxima, Tensor sums, Tensor out, Tensor lse) {
    AttentionForward args{};
    args.scores = extras.with(q, k, v);
    args.resume = resume;
    args.acc = acc;
    args.maxima = reinterpret_cast<double*>(maxima.data);
    args.sums = reinterpret_cast<double*>(sums.data);
    args.out = out;
    args.lse = lse;
    py::gil_scoped_release release;
    check(cpu::attention_forward(args, threads), "attention_forward");
}

void attention_backward(int threads, const Extras& extras, Tensor q, Tensor k, Tensor v, Tensor out, Tensor dout,
                        Tensor lse, Tensor delta, Tensor dlse, bool accumulate, int grad_dtype, Tensor dq, Tensor dk,
                        Tensor dv) {
    AttentionBackward args{};
    args.scores = extras.with(q, k, v);
    args.out = out;
    args.dout = dout;
    args.lse = lse;
    args.delta = delta;
    args.dlse = dlse;
    args.accumulate = accumulate;
    args.grad_dtype = static_cast<DType>(grad_dtype);
    args.dq = dq;
    args.dk = dk;
    args.dv = dv;
    py::gil_scoped_release release;
    check(cpu::attention_backward(args, threads), "attention_backward");
}

void attention_merge(int threads, int dtype, int out_dtype, const std::vector<Tensor>& outs,
                     const std::vector<Tensor>& lses, Tensor out, Tensor lse) {
    if (outs.size() != lses.size()) throw std::invalid_argument("attention_merge: as many lses as outs are needed");
    std::vector<AttentionPart> parts;
    for (size_t i = 0; i < outs.size(); ++i) parts.push_back({outs[i], lses[i]});
    AttentionMerge args{};
    args.batch = out.size[0];
    args.rows = out.size[1];
    args.heads = out.size[2];
    args.columns = out.size[3];
    args.dtype = static_cast<DType>(dtype);
    args.out_dtype = static_cast<DType>(out_dtype);
    args.count = static_cast<int32_t>(parts.size());
    args.parts = parts.data();
    args.out = out;
    args.lse = lse;
    py::gil_scoped_release release;
    check(cpu::attention_merge(args, threads), "attention_merge");
}

}  // namespace

void bind_attention(py::module_& m) {
    py::class_<Extras>(m, "AttentionExtras", py::module_local())
        .def(py::init<int, double, double, int64_t, int64_t, int64_t, Tensor, Tensor, int, Tensor, Tensor, Tensor,
                      uint32_t, double, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, Tensor, Tensor>());
    m.def("attention_forward", &attention_forward);
    m.def("attention_backward", &attention_backward);
    m.def("attention_merge", &attention_merge);
}
