// Dropout + residual + norm, backward, in two passes over a few rows at a time. The first reads dy and z from memory
// and computes the two row sums and the column sums of dweight and dbias. The second reads dy and z from cache and
// writes.
#include "dropout.h"
#include "stream.h"

namespace seqpar::cpu::SEQPAR_ISA {
namespace {

// Rows taken together, so that a column sum is loaded and stored once for all of them; as many as registers allow.
template <class A>
constexpr int kRows = sizeof(A) == 8          ? 1
                      : SEQPAR_ISA_LEVEL == 3 ? 4
                      : SEQPAR_ISA_LEVEL == 2 ? 2
                                              : 1;

// One of the two norms of a residual: its incoming gradient and its scale.
template <class A>
struct NormTerm {
    const void* dy;
    int64_t stride;
    const A* scale;
    A *dweight, *dbias;  // column sums of the first run of rows, or null
    template <class X>
    const X* row(int64_t r) const {
        return row_of<X>(dy, r, stride);
    }
};

template <class A, Order O>
struct BackwardPlan {
    const NormBackward* args;
    DropoutPlan<A, O> dropout;
    NormTerm<A> term, term2;  // term2 may be absent; term is there with every norm
    A* dx_bias;               // column sums of the first run, or null
    int64_t run_stride;       // from the sums of one run to those of the next
    RowRuns runs;
    bool past_cache;  // dx and dresidual would not stay in it

    A* sums_of(A* first_run, int64_t run) const { return first_run ? first_run + run * run_stride : nullptr; }
};

// sums[c..] += value, where that sum is wanted.
template <class A, class P>
inline void accumulate(A* sums, int64_t c, P value) {
    if (sums) store_scratch(sums + c, load_scratch(sums + c) + value);
}

// The numbers of a row for the second pass: the norm's share of the gradient is
// (dxhat - mean1) * rstd + (z - mean) * slope.
template <class A>
struct RowSums {
    A mean, rstd, slope, mean1;
};

// The mean of a row less the stored mean, which is rounded to Acc. This matters where the row varies by little more
// than such a rounding; the differences from the stored mean are exact there.
template <Order O, class A, class Z>
A mean_offset(const Z* z, int64_t cols, A mean, A rstd) {
    using P = typename PackFor<A>::Pack;
    if (!(mean * rstd > A(4) || mean * rstd < A(-4))) return A(0);
    double total = 0;
    for (int64_t begin = 0; begin < cols; begin += kSumColumns) {
        P part = splat(A(0));
        for_packs<P::lanes>(begin, smaller(cols, begin + kSumColumns), [&](int64_t c, auto n) SEQPAR_BODY {
            part = part + present<O>(load<O>(z + c, n) - splat(mean), n);
        });
        total += sum(part);
    }
    return static_cast<A>(total / static_cast<double>(cols));
}

// d(xhat) of one Pack: dy * scale of both norms.
template <Order O, class A, class X, class N>
inline __attribute__((always_inline)) typename PackFor<A>::Pack scaled(const A* scale, int64_t c, const X* dy, N n) {
    const auto d = load<O>(dy + c, n);
    return scale ? d * load_scratch(scale + c) : d;
}

// The first pass over kCount rows: their sums, and their part of the column sums.
template <class X, class Z, Norm kNorm, int kCount, class Plan>
void sum_rows(const Plan& plan, int64_t r0, int64_t run, RowSums<Acc<X>>* rows) {
    using A = Acc<X>;
    using P = typename PackFor<A>::Pack;
    constexpr Order O = order_of<X>;
    const NormBackward& args = *plan.args;
    const P zero = splat(A(0));
    const Z* z[kCount];
    const X *dy[kCount], *dy2[kCount];
    P sum1[kCount], sum2[kCount];
    A offset[kCount];
    for (int i = 0; i < kCount; ++i) {
        const int64_t r = r0 + i;
        z[i] = row_of<Z>(args.z, r, args.z_stride);
        dy[i] = plan.term.template row<X>(r);
        dy2[i] = plan.term2.template row<X>(r);
        rows[i].mean = kNorm == Norm::layer ? static_cast<const A*>(args.mean)[r] : A(0);
        rows[i].rstd = static_cast<const A*>(args.rstd)[r];
        offset[i] = kNorm == Norm::layer ? mean_offset<O>(z[i], args.cols, rows[i].mean, rows[i].rstd) : A(0);
        sum1[i] = sum2[i] = zero;
    }
    A* const dweight = plan.sums_of(plan.term.dweight, run);
    A* const dbias = plan.sums_of(plan.term.dbias, run);
    A* const dweight2 = plan.sums_of(plan.term2.dweight, run);
    A* const dbias2 = plan.sums_of(plan.term2.dbias, run);

    for (int64_t begin = 0; begin < args.cols; begin += kSumColumns) {
        P part1[kCount], part2[kCount];
        for (int i = 0; i < kCount; ++i) part1[i] = part2[i] = zero;
        for_packs<P::lanes>(begin, smaller(args.cols, begin + kSumColumns), [&](int64_t c, auto n) SEQPAR_BODY {
            P dw = zero, db = zero, xhat[kCount];
            for (int i = 0; i < kCount; ++i) {
                P v = load<O>(z[i] + c, n);
                if (kNorm == Norm::layer) v = v - splat(rows[i].mean);
                xhat[i] = kNorm == Norm::layer ? fma(v, splat(rows[i].rstd), splat(-offset[i] * rows[i].rstd))
                                               : v * splat(rows[i].rstd);
                const P d = load<O>(dy[i] + c, n);
                dw = fma(d, xhat[i], dw);
                db = db + d;
                const P g = plan.term.scale ? d * load_scratch(plan.term.scale + c) : d;
                if (kNorm == Norm::layer) part1[i] = part1[i] + g;
                part2[i] = fma(g, xhat[i], part2[i]);
            }
            accumulate(dweight, c, dw);
            accumulate(dbias, c, db);
            if (!plan.term2.dy) return;
            dw = db = zero;
            for (int i = 0; i < kCount; ++i) {
                const P d = load<O>(dy2[i] + c, n);
                dw = fma(d, xhat[i], dw);
                db = db + d;
                const P g = plan.term2.scale ? d * load_scratch(plan.term2.scale + c) : d;
                if (kNorm == Norm::layer) part1[i] = part1[i] + g;
                part2[i] = fma(g, xhat[i], part2[i]);
            }
            accumulate(dweight2, c, dw);
            accumulate(dbias2, c, db);
        });
        for (int i = 0; i < kCount; ++i) {
            sum1[i] = sum1[i] + part1[i];
            sum2[i] = sum2[i] + part2[i];
        }
    }
    const double count = static_cast<double>(args.cols);
    for (int i = 0; i < kCount; ++i) {
        const double rstd = rows[i].rstd;
        rows[i].slope = static_cast<A>(-rstd * rstd * (sum(sum2[i]) / count));
        // The second pass uses z - mean with the stored mean; mean1 corrects for the offset.
        rows[i].mean1 = static_cast<A>(sum(sum1[i]) / count + offset[i] * (rows[i].slope / rstd));
    }
}

template <class X, class Z, Norm kNorm, bool kDropout>
struct BackwardKernel {
    using A = Acc<X>;
    using P = typename PackFor<A>::Pack;
    static constexpr Order O = order_of<X>;
    using Plan = BackwardPlan<A, O>;

    template <int kCount>
    static void write_rows(const Plan& plan, int64_t r0, int64_t run, const RowSums<A>* rows) {
        const NormBackward& args = *plan.args;
        const P zero = splat(A(0));
        const Z *z[kCount], *dz[kCount];
        const X *dy[kCount], *dy2[kCount];
        X* dx[kCount];
        Z* dresidual[kCount];
        A factor[kCount];
        bool past_cache = plan.past_cache;
        for (int i = 0; i < kCount; ++i) {
            const int64_t r = r0 + i;
            z[i] = row_of<Z>(args.z, r, args.z_stride);
            dz[i] = row_of<Z>(args.dz, r, args.dz_stride);
            dy[i] = plan.term.template row<X>(r);
            dy2[i] = plan.term2.template row<X>(r);
            dx[i] = row_of<X>(args.dx, r, args.dx_stride);
            dresidual[i] = row_of<Z>(args.dresidual, r, args.dresidual_stride);
            past_cache = past_cache && streamable(dx[i]) && streamable(dresidual[i]);
            factor[i] = kDropout ? static_cast<A>(args.dropout.scale) : A(1);
            if (args.row_scale) factor[i] *= args.row_scale[r];
        }
        A* const dx_bias = plan.sums_of(plan.dx_bias, run);
        typename DropoutPlan<A, O>::Mask keep[kCount][DropoutPlan<A, O>::masks];

        const int64_t step = kDropout ? kDropoutColumns : args.cols;
        for (int64_t begin = 0; begin < args.cols; begin += step) {
            if (kDropout) {
                for (int i = 0; i < kCount; ++i) plan.dropout.keep(plan.dropout.row(r0 + i), begin, keep[i]);
            }
            for_packs<P::lanes>(begin, smaller(args.cols, begin + step), [&](int64_t c, auto n) SEQPAR_BODY {
                P dxb = zero;
                for (int i = 0; i < kCount; ++i) {
                    P g = dz[i] ? load<O>(dz[i] + c, n) : zero;
                    if (kNorm != Norm::none) {
                        P v = load<O>(z[i] + c, n), dxhat = scaled<O>(plan.term.scale, c, dy[i], n);
                        if (dy2[i]) dxhat = dxhat + scaled<O>(plan.term2.scale, c, dy2[i], n);
                        if (kNorm == Norm::layer) {
                            v = v - splat(rows[i].mean);
                            dxhat = dxhat - splat(rows[i].mean1);
                        }
                        g = fma(dxhat, splat(rows[i].rstd), fma(v, splat(rows[i].slope), g));
                    }
                    if (dresidual[i]) put<O>(dresidual[i] + c, g, n, past_cache);
                    const P d = kDropout ? keep_mul(keep[i][(c - begin) / P::lanes], g, splat(factor[i]))
                                         : g * splat(factor[i]);
                    if (dx[i]) put<O>(dx[i] + c, d, n, past_cache);
                    dxb = dxb + d;
                }
                accumulate(dx_bias, c, dxb);
            });
        }
    }

    template <int kCount>
    static void run_rows(const Plan& plan, int64_t r0, int64_t run) {
        RowSums<A> rows[kCount];
        if (kNorm != Norm::none) sum_rows<X, Z, kNorm, kCount>(plan, r0, run, rows);
        write_rows<kCount>(plan, r0, run, rows);
    }

    static void task(const void* context, int64_t run, int) {
        const Plan& plan = *static_cast<const Plan*>(context);
        A* const firsts[] = {plan.term.dweight, plan.term.dbias, plan.term2.dweight, plan.term2.dbias, plan.dx_bias};
        const size_t bytes = static_cast<size_t>(padded_columns(plan.args->cols)) * sizeof(A);
        for (A* first : firsts) {
            if (first) memset(plan.sums_of(first, run), 0, bytes);
        }
        const int64_t end = smaller(plan.args->rows, (run + 1) * plan.runs.rows);
        int64_t r = run * plan.runs.rows;
        for (; r + kRows<A> <= end; r += kRows<A>) run_rows<kRows<A>>(plan, r, run);
        for (; r < end; ++r) run_rows<1>(plan, r, run);
        if (plan.past_cache) settle();
    }
};

// The last step: the sums of all runs, added in their order.
template <class A>
struct VectorPlan {
    struct Vector {
        const A* sums;  // of the first run; null: the gradient is zero
        void* out;
    } vectors[kVectorGrads];
    DType dtype;
    int64_t cols, blocks, run_stride, runs;
};
constexpr int64_t kBlockColumns = 1024;

template <class A, Order O>
void finish_task(const void* context, int64_t task, int) {
    using P = typename PackFor<A>::Pack;
    const VectorPlan<A>& plan = *static_cast<const VectorPlan<A>*>(context);
    const auto& vector = plan.vectors[task / plan.blocks];
    const int64_t begin = task % plan.blocks * kBlockColumns;
    for_packs<P::lanes>(begin, smaller(plan.cols, begin + kBlockColumns), [&](int64_t c, auto n) SEQPAR_BODY {
        P total = splat(A(0));
        for (int64_t run = 0; vector.sums && run < plan.runs; ++run) {
            total = total + load_scratch(vector.sums + run * plan.run_stride + c);
        }
        store_vector<O>(vector.out, plan.dtype, c, total, n);
    });
}

template <class X, class Z>
Task choose(Norm norm, bool dropout) {
    switch (norm) {
        case Norm::none:
            return dropout ? BackwardKernel<X, Z, Norm::none, true>::task
                           : BackwardKernel<X, Z, Norm::none, false>::task;
        case Norm::layer:
            return dropout ? BackwardKernel<X, Z, Norm::layer, true>::task
                           : BackwardKernel<X, Z, Norm::layer, false>::task;
        case Norm::rms:
            return dropout ? BackwardKernel<X, Z, Norm::rms, true>::task : BackwardKernel<X, Z, Norm::rms, false>::task;
    }
    return nullptr;
}

template <class X, class Z>
Status run(Type<X>, Type<Z>, const NormBackward& args, int threads) {
    using A = Acc<X>;
    constexpr Order O = order_of<X>;
    threads = useful_threads(args.rows * args.cols, threads);
    const int64_t padded = padded_columns(args.cols);
    const Scratch scratch(static_cast<size_t>(2 * padded) * sizeof(A));
    if (!scratch.data()) return Status::launch_failed;

    // The wanted sums are adjacent, run after run. A norm without an incoming gradient has none of its own.
    const bool first = args.dy && args.norm != Norm::none, second = args.dy2 && args.norm != Norm::none;
    VectorPlan<A> last{};
    int wanted = 0;
    const auto sums = [&](void* out, bool computed) -> A* {
        if (!out) return nullptr;
        A* const at = static_cast<A*>(args.workspace) + wanted * padded;
        last.vectors[wanted++] = {computed ? at : nullptr, out};
        return computed ? at : nullptr;
    };
    A* free = static_cast<A*>(scratch.data());
    const auto vector = [&](const void* weight) {
        return widen_vector<O, A>(weight, args.w_dtype, args.cols, args.zero_centered ? A(1) : A(0), free);
    };
    BackwardPlan<A, O> plan{&args, DropoutPlan<A, O>(args.dropout), {},   {}, nullptr,
                            0,     row_runs(args.rows, args.cols),  false};
    A *dweight = sums(args.dweight, first), *dbias = sums(args.dbias, first);
    A *dweight2 = sums(args.dweight2, second), *dbias2 = sums(args.dbias2, second);
    if (first) plan.term = {args.dy, args.dy_stride, vector(args.weight), dweight, dbias};
    if (second) {
        NormTerm<A>& term = first ? plan.term2 : plan.term;
        term = {args.dy2, args.dy2_stride, vector(args.weight2), dweight2, dbias2};
    }
    plan.dx_bias = sums(args.dx_bias, true);
    plan.run_stride = wanted * padded;
    plan.past_cache = exceeds_cache(args.rows * args.cols *
                                    (sizeof(X) * (args.dx != nullptr) + sizeof(Z) * (args.dresidual != nullptr)));

    const bool dropout = args.dropout.seed && (args.dx || args.dx_bias);
    parallel(plan.runs.count, threads, choose<X, Z>(first || second ? args.norm : Norm::none, dropout), &plan);

    last.dtype = args.w_dtype;
    last.cols = args.cols;
    last.blocks = ceil_div(args.cols, kBlockColumns);
    last.run_stride = plan.run_stride;
    last.runs = plan.runs.count;
    parallel(wanted * last.blocks, threads, finish_task<A, O>, &last);
    return Status::ok;
}

}  // namespace

Status norm_backward(const NormBackward& args, int threads) {
    return with_types(args.x_dtype, args.z_dtype, [&](auto x, auto z) { return run(x, z, args, threads); });
}

}  // namespace seqpar::cpu::SEQPAR_ISA
