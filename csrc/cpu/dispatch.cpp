// The entry points: check the arguments, then call the kernels compiled for the best instruction set of this machine.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#if defined(SEQPAR_X86)
#include <cpuid.h>
#endif

namespace seqpar::cpu {
namespace {

struct Kernels {
    const char* isa;
    Status (*norm_forward)(const NormForward&, int);
    Status (*norm_backward)(const NormBackward&, int);
    Status (*reduce_shards)(const ReduceShards&, int);
    Status (*attention_forward)(const AttentionForward&, int);
    Status (*attention_backward)(const AttentionBackward&, int);
    Status (*attention_merge)(const AttentionMerge&, int);
    bool available;
};
#define SEQPAR_KERNELS(ISA)                                                                                           \
    #ISA, ISA::norm_forward, ISA::norm_backward, ISA::reduce_shards, ISA::attention_forward, ISA::attention_backward, \
        ISA::attention_merge

#if defined(SEQPAR_X86)
bool has_avx2() {
    unsigned a, b, c, d;  // f16c is not among the names older compilers know
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// SEQPAR_CPU_ISA asks for a certain set. One that does not exist or does not run here is not replaced by another: the
// kernels then refuse to run, and isa() says why.
Kernels choose() {
    const Kernels all[] = {
#if defined(SEQPAR_X86)
        {SEQPAR_KERNELS(avx512), has_avx512()},
        {SEQPAR_KERNELS(avx2), has_avx2()},
#endif
#if defined(SEQPAR_NEON)
        {SEQPAR_KERNELS(neon), true},
#else
        {SEQPAR_KERNELS(baseline), true},
#endif
    };
    const char* const wanted = std::getenv("SEQPAR_CPU_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    for (const Kernels& kernels : all) {
        if (kernels.available && (any || std::strcmp(wanted, kernels.isa) == 0)) return kernels;
    }
    static std::string refusal;
    refusal = "invalid: SEQPAR_CPU_ISA=" + std::string(wanted) + " is not one of";
    for (const Kernels& kernels : all) {
        if (kernels.available) refusal += std::string(" ") + kernels.isa;
    }
    return {refusal.c_str(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, false};
}

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

bool element_type(DType t) {
    return t == DType::f32 || t == DType::bf16 || t == DType::f16 || t == DType::f64;
}

// `other` is `x`, or f32 beside a 16-bit x.
bool goes_with(DType x, DType other) {
    return other == x || (other == DType::f32 && x != DType::f64);
}

template <class Args>
bool supported(const Args& args) {
    return element_type(args.x_dtype) && goes_with(args.x_dtype, args.z_dtype) &&
           goes_with(args.x_dtype, args.w_dtype) && args.y_dtype == args.x_dtype &&
           (args.norm == Norm::none || args.norm == Norm::layer || args.norm == Norm::rms);
}

// Rows may repeat (stride 0) and overlap where they are read, not where they are written.
struct Rows {
    int64_t rows, cols;
    bool read(const void* p, int64_t stride) const { return !p || rows <= 1 || stride >= 0; }
    bool written(const void* p, int64_t stride) const { return !p || rows <= 1 || stride >= cols; }
};

template <class Args>
bool sizes_fit(const Args& args) {
    return args.rows >= 0 && args.cols >= 1 && args.dropout.threshold <= 65536;
}

void zero_vectors(const NormBackward& args) {
    const size_t size = args.w_dtype == DType::f64 ? 8 : args.w_dtype == DType::f32 ? 4 : 2;
    for (void* vector : {args.dweight, args.dbias, args.dweight2, args.dbias2, args.dx_bias}) {
        if (vector) std::memset(vector, 0, static_cast<size_t>(args.cols) * size);
    }
}

bool attention_supported(const AttentionScores& s) {
    const DType wide = s.dtype == DType::f64 ? DType::f64 : DType::f32;
    return element_type(s.dtype) && (!s.bias || s.bias_dtype == s.dtype || s.bias_dtype == wide);
}

bool attention_fits(const AttentionScores& s) {
    constexpr int64_t most_rows = int64_t{1} << 30, most_columns = 8192;
    const bool sizes = s.batch >= 0 && s.q_rows >= 0 && s.k_rows >= 0 && s.q_rows <= most_rows &&
                       s.k_rows <= most_rows && s.head_dim >= 1 && s.value_dim >= 1 && s.head_dim <= most_columns &&
                       s.value_dim <= most_columns;
    const bool heads = s.kv_heads >= 1 && s.q_heads >= 1 && s.q_heads % s.kv_heads == 0;
    return sizes && heads && (s.first == nullptr) == (s.last == nullptr) && s.threshold <= 65536;
}

bool nothing_to_do(const AttentionScores& s) {
    return s.batch == 0 || s.q_rows == 0;
}

}  // namespace

int64_t padded_columns(int64_t cols) {
    return (cols + 63) / 64 * 64;
}

RowRuns row_runs(int64_t rows, int64_t cols) {
    constexpr int64_t most = 64, elements = 32768, together = 4;
    int64_t count = rows * cols / elements;
    count = count < 1 ? 1 : count > most ? most : count;
    int64_t each = (rows + count - 1) / count;
    each = (each + together - 1) / together * together;  // the kernels take rows together
    return {(rows + each - 1) / each, each};
}

const char* isa() {
    return kernels().isa;
}

Status norm_forward(const NormForward& args, int threads) {
    if (!kernels().available || !supported(args)) return Status::unsupported;
    const Rows matrix{args.rows, args.cols};
    if (!sizes_fit(args) || !matrix.read(args.x, args.x_stride) || !matrix.read(args.residual, args.residual_stride) ||
        !matrix.written(args.z, args.z_stride) || !matrix.written(args.y, args.y_stride) ||
        !matrix.written(args.y2, args.y2_stride)) {
        return Status::bad_argument;
    }
    if (args.rows == 0) return Status::ok;
    if (!args.x || args.shards < 1) return Status::bad_argument;
    return kernels().norm_forward(args, threads);
}

int64_t norm_backward_workspace(const NormBackward& args) {
    if (args.rows <= 0 || args.cols <= 0) return 0;
    int64_t wanted = 0;
    for (void* vector : {args.dweight, args.dbias, args.dweight2, args.dbias2, args.dx_bias})
        wanted += vector != nullptr;
    const int64_t size = args.x_dtype == DType::f64 ? 8 : 4;
    return row_runs(args.rows, args.cols).count * wanted * padded_columns(args.cols) * size;
}

Status norm_backward(const NormBackward& args, int threads) {
    if (!kernels().available || !supported(args)) return Status::unsupported;
    const Rows matrix{args.rows, args.cols};
    if (!sizes_fit(args) || !matrix.read(args.dy, args.dy_stride) || !matrix.read(args.dy2, args.dy2_stride) ||
        !matrix.read(args.dz, args.dz_stride) || !matrix.read(args.z, args.z_stride) ||
        !matrix.written(args.dx, args.dx_stride) || !matrix.written(args.dresidual, args.dresidual_stride)) {
        return Status::bad_argument;
    }
    if (args.rows == 0) {
        zero_vectors(args);
        return Status::ok;
    }
    const bool normed = args.norm != Norm::none && (args.dy || args.dy2);
    const bool incomplete = normed && (!args.z || !args.rstd || (args.norm == Norm::layer && !args.mean));
    if (incomplete || (norm_backward_workspace(args) > 0 && !args.workspace)) return Status::bad_argument;
    return kernels().norm_backward(args, threads);
}

Status reduce_shards(const ReduceShards& args, int threads) {
    if (!kernels().available || !element_type(args.dtype)) return Status::unsupported;
    if (args.bias && !goes_with(args.dtype, args.bias_dtype)) return Status::unsupported;
    const Rows matrix{args.rows, args.cols};
    if (args.rows < 0 || args.cols < 1 || args.count < 1 || !matrix.read(args.parts, args.row_stride) ||
        !matrix.written(args.out, args.out_stride)) {
        return Status::bad_argument;
    }
    if (args.rows == 0) return Status::ok;
    if (!args.parts || !args.out) return Status::bad_argument;
    return kernels().reduce_shards(args, threads);
}

Status attention_forward(const AttentionForward& args, int threads) {
    if (!kernels().available || !attention_supported(args.scores)) return Status::unsupported;
    if (!attention_fits(args.scores)) return Status::bad_argument;
    const bool state = args.acc.data != nullptr;
    if (state != (args.maxima != nullptr) || state != (args.sums != nullptr) || (args.resume && !state) ||
        (args.out.data != nullptr) != (args.lse != nullptr) || (!state && !args.out.data)) {
        return nothing_to_do(args.scores) ? Status::ok : Status::bad_argument;
    }
    return nothing_to_do(args.scores) ? Status::ok : kernels().attention_forward(args, threads);
}

Status attention_backward(const AttentionBackward& args, int threads) {
    if (!kernels().available || !attention_supported(args.scores)) return Status::unsupported;
    const DType wide = args.scores.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (args.grad_dtype != wide && args.grad_dtype != args.scores.dtype) return Status::unsupported;
    if (!attention_fits(args.scores) || (args.accumulate && args.grad_dtype != wide)) return Status::bad_argument;
    if (args.scores.q_rows > 0 && (!args.lse || !args.dout.data || (!args.delta && !args.out.data))) {
        return args.scores.batch == 0 ? Status::ok : Status::bad_argument;
    }
    return args.scores.batch == 0 ? Status::ok : kernels().attention_backward(args, threads);
}

Status attention_merge(const AttentionMerge& args, int threads) {
    if (!kernels().available || !element_type(args.dtype)) return Status::unsupported;
    const DType wide = args.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (args.out_dtype != wide && args.out_dtype != args.dtype) return Status::unsupported;
    if (args.count < 1 || args.batch < 0 || args.rows < 0 || args.heads < 0 || args.columns < 0) {
        return Status::bad_argument;
    }
    if (args.batch * args.rows * args.heads == 0) return Status::ok;
    return kernels().attention_merge(args, threads);
}

}  // namespace seqpar::cpu
