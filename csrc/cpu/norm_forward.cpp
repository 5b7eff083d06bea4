// Dropout + residual + norm, forward: three passes over a row. The first reads memory; the other two read z from a
// scratch row that stays in cache.
#include "dropout.h"
#include "statistics.h"
#include "stream.h"

namespace seqpar::cpu::SEQPAR_ISA {
namespace {

template <class A, Order O>
struct ForwardPlan {
    const NormForward* args;
    DropoutPlan<A, O> dropout;
    const A *x_bias, *scale, *shift, *scale2, *shift2;
    A* rows;  // one scratch row a worker
    int64_t padded, rows_per_task;
    bool past_cache;  // z, y and y2 would not stay in it
};

// y = (row - mean) * rstd * scale + shift.
template <class X, Norm kNorm, class A>
void normalize(const A* row, int64_t cols, A mean, A rstd, const A* scale, const A* shift, X* y, bool past_cache) {
    using P = typename PackFor<A>::Pack;
    constexpr Order O = order_of<X>;
    const P centre = splat(mean), factor = splat(rstd);
    past_cache = past_cache && streamable(y);
    for_packs<P::lanes>(0, cols, [&](int64_t c, auto n) SEQPAR_BODY {
        P v = load_scratch(row + c);
        if (kNorm == Norm::layer) v = v - centre;
        v = v * factor;
        if (scale && shift) {
            v = fma(v, load_scratch(scale + c), load_scratch(shift + c));
        } else if (scale) {
            v = v * load_scratch(scale + c);
        } else if (shift) {
            v = v + load_scratch(shift + c);
        }
        put<O>(y + c, v, n, past_cache);
    });
}

template <class X, class Z, Norm kNorm, bool kDropout>
struct ForwardKernel {
    using A = Acc<X>;
    using P = typename PackFor<A>::Pack;
    static constexpr Order O = order_of<X>;
    using Plan = ForwardPlan<A, O>;

    // z of one row: stored, kept in `row`, and summed (layer) or its squares summed (rms).
    static double combine(const Plan& plan, int64_t r, A* row) {
        const NormForward& args = *plan.args;
        const X* const x = row_of<X>(args.x, r, args.x_stride);
        const int32_t shards = args.shards;
        const int64_t shard_stride = args.shard_stride;
        const Z* const residual = row_of<Z>(args.residual, r, args.residual_stride);
        Z* const z = row_of<Z>(args.z, r, args.z_stride);
        const bool past_cache = plan.past_cache && streamable(z);
        const A* const x_bias = plan.x_bias;
        A factor = kDropout ? static_cast<A>(args.dropout.scale) : A(1);
        if (args.row_scale) factor *= args.row_scale[r];
        const RowState state = plan.dropout.row(kDropout ? r : 0);
        const P factors = splat(factor), zero = splat(A(0));
        typename DropoutPlan<A, O>::Mask keep[DropoutPlan<A, O>::masks];

        double total = 0;
        for (int64_t begin = 0; begin < args.cols; begin += kStatisticsColumns) {
            const int64_t end = smaller(args.cols, begin + kStatisticsColumns);
            P partial = zero;
            const int64_t step = kDropout ? kDropoutColumns : kStatisticsColumns;
            for (int64_t chunk = begin; chunk < end; chunk += step) {
                if (kDropout) plan.dropout.keep(state, chunk, keep);
                for_packs<P::lanes>(chunk, smaller(end, chunk + step), [&](int64_t c, auto n) SEQPAR_BODY {
                    P v = load<O>(x + c, n);
                    for (int32_t i = 1; i < shards; ++i) v = v + load<O>(x + i * shard_stride + c, n);
                    if (x_bias) v = v + load_scratch(x_bias + c);
                    const P base = residual ? load<O>(residual + c, n) : zero;
                    v = kDropout ? keep_fma(keep[(c - chunk) / P::lanes], v, factors, base) : fma(v, factors, base);
                    if (z) {
                        put<O>(z + c, v, n, past_cache);
                        if (sizeof(Z) < sizeof(A)) v = as_stored<O>(z + c, v, n, past_cache);  // what y is the norm of
                    }
                    if (kNorm != Norm::none) store_scratch(row + c, v);
                    if (kNorm == Norm::layer) partial = partial + v;
                    if (kNorm == Norm::rms) partial = fma(v, v, partial);
                });
            }
            if (kNorm != Norm::none) total += sum(partial);
        }
        return total;
    }

    static void run_row(const Plan& plan, int64_t r, A* row) {
        const NormForward& args = *plan.args;
        const double total = combine(plan, r, row);
        if (kNorm == Norm::none) return;
        const double count = static_cast<double>(args.cols);
        A mean = kNorm == Norm::layer ? static_cast<A>(total / count) : A(0);
        double squares = kNorm == Norm::layer ? spread<O>(row, args.cols, mean) : total;
        if (hides_spread<A>(mean, squares, count)) {
            const Statistics careful = careful_statistics<O, kNorm == Norm::layer>(row, args.cols);
            mean = static_cast<A>(careful.mean);
            squares = careful.squares;
        }
        const A rstd = static_cast<A>(1.0 / __builtin_sqrt(squares / count + args.eps));
        if (args.y) {
            normalize<X, kNorm>(row, args.cols, mean, rstd, plan.scale, plan.shift, row_of<X>(args.y, r, args.y_stride),
                                plan.past_cache);
        }
        if (args.y2) {
            normalize<X, kNorm>(row, args.cols, mean, rstd, plan.scale2, plan.shift2,
                                row_of<X>(args.y2, r, args.y2_stride), plan.past_cache);
        }
        if (args.mean && kNorm == Norm::layer) static_cast<A*>(args.mean)[r] = mean;
        if (args.rstd) static_cast<A*>(args.rstd)[r] = rstd;
    }

    static void task(const void* context, int64_t task, int worker) {
        const Plan& plan = *static_cast<const Plan*>(context);
        const int64_t end = smaller(plan.args->rows, (task + 1) * plan.rows_per_task);
        for (int64_t r = task * plan.rows_per_task; r < end; ++r) run_row(plan, r, plan.rows + worker * plan.padded);
        if (plan.past_cache) settle();
    }
};

template <class X, class Z>
Task choose(Norm norm, bool dropout) {
    switch (norm) {
        case Norm::none:
            return dropout ? ForwardKernel<X, Z, Norm::none, true>::task : ForwardKernel<X, Z, Norm::none, false>::task;
        case Norm::layer:
            return dropout ? ForwardKernel<X, Z, Norm::layer, true>::task
                           : ForwardKernel<X, Z, Norm::layer, false>::task;
        case Norm::rms:
            return dropout ? ForwardKernel<X, Z, Norm::rms, true>::task : ForwardKernel<X, Z, Norm::rms, false>::task;
    }
    return nullptr;
}

template <class X, class Z>
Status run(Type<X>, Type<Z>, const NormForward& args, int threads) {
    using A = Acc<X>;
    constexpr Order O = order_of<X>;
    threads = useful_threads(args.rows * args.cols, threads);
    const int64_t padded = padded_columns(args.cols);
    const Scratch scratch(static_cast<size_t>(padded) * (threads + 5) * sizeof(A));
    if (!scratch.data()) return Status::launch_failed;

    A* free = static_cast<A*>(scratch.data());
    const auto vector = [&](const void* from, A add) {
        return widen_vector<O, A>(from, args.w_dtype, args.cols, add, free);
    };
    const A one = args.zero_centered ? A(1) : A(0);
    ForwardPlan<A, O> plan{
        &args, DropoutPlan<A, O>(args.dropout), nullptr, nullptr, nullptr, nullptr, nullptr, free, padded, 0, false};
    plan.x_bias = vector(args.x_bias, 0);
    plan.scale = vector(args.weight, one);
    plan.shift = vector(args.bias, 0);
    plan.scale2 = vector(args.weight2, one);
    plan.shift2 = vector(args.bias2, 0);
    plan.rows = free;
    plan.past_cache =
        exceeds_cache(args.rows * args.cols *
                      (sizeof(X) * ((args.y != nullptr) + (args.y2 != nullptr)) + sizeof(Z) * (args.z != nullptr)));
    // Enough tasks to balance the load, and with many rows no more than 64 Ki elements in each.
    plan.rows_per_task = smaller(ceil_div(args.rows, threads), larger<int64_t>(1, 65536 / args.cols));
    parallel(ceil_div(args.rows, plan.rows_per_task), threads, choose<X, Z>(args.norm, args.dropout.seed != nullptr),
             &plan);
    return Status::ok;
}

}  // namespace

Status norm_forward(const NormForward& args, int threads) {
    return with_types(args.x_dtype, args.z_dtype, [&](auto x, auto z) { return run(x, z, args, threads); });
}

}  // namespace seqpar::cpu::SEQPAR_ISA
