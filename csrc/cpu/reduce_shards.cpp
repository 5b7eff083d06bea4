// The sum over ranks of a reduce-scatter, in rank order.
#include "loops.h"

namespace seqpar::cpu::SEQPAR_ISA {
namespace {

constexpr int64_t kTaskColumns = 16384;

template <class A>
struct ReducePlan {
    const ReduceShards* args;
    const A* bias;
    int64_t row_tasks, rows_per_task;  // a task is up to kTaskColumns columns of a run of rows
};

template <class T>
void reduce_task(const void* context, int64_t task, int) {
    using A = Acc<T>;
    using P = typename PackFor<A>::Pack;
    constexpr Order O = order_of<T>;
    const ReducePlan<A>& plan = *static_cast<const ReducePlan<A>*>(context);
    const ReduceShards& args = *plan.args;
    const int64_t first_row = task % plan.row_tasks * plan.rows_per_task;
    const int64_t end_row = smaller(args.rows, first_row + plan.rows_per_task);
    const int64_t begin = task / plan.row_tasks * kTaskColumns, end = smaller(args.cols, begin + kTaskColumns);
    for (int64_t r = first_row; r < end_row; ++r) {
        const T* const parts = row_of<T>(args.parts, r, args.row_stride);
        T* const out = row_of<T>(args.out, r, args.out_stride);
        for_packs<P::lanes>(begin, end, [&](int64_t c, auto n) SEQPAR_BODY {
            P total = load<O>(parts + c, n);
            for (int32_t i = 1; i < args.count; ++i) total = total + load<O>(parts + i * args.part_stride + c, n);
            if (plan.bias) total = total + load_scratch(plan.bias + c);
            store<O>(out + c, total, n);
        });
    }
}

template <class T>
Status run(Type<T>, const ReduceShards& args, int threads) {
    using A = Acc<T>;
    const Scratch scratch(static_cast<size_t>(padded_columns(args.cols)) * sizeof(A));
    if (!scratch.data()) return Status::launch_failed;
    A* free = static_cast<A*>(scratch.data());
    ReducePlan<A> plan{&args, nullptr, 0, 0};
    plan.bias = widen_vector<order_of<T>, A>(args.bias, args.bias_dtype, args.cols, A(0), free);
    plan.rows_per_task = larger<int64_t>(1, 2 * kTaskColumns / args.cols);
    plan.row_tasks = ceil_div(args.rows, plan.rows_per_task);
    parallel(plan.row_tasks * ceil_div(args.cols, kTaskColumns),
             useful_threads(args.rows * args.cols * args.count, threads), reduce_task<T>, &plan);
    return Status::ok;
}

}  // namespace

Status reduce_shards(const ReduceShards& args, int threads) {
    return with_types(args.dtype, args.dtype, [&](auto type, auto) { return run(type, args, threads); });
}

}  // namespace seqpar::cpu::SEQPAR_ISA
