// Merges results of attention over several blocks of keys; csrc/seqpar.h has the formula.
#include "attention_matmul.h"

namespace seqpar::cpu::SEQPAR_ISA {
namespace {

constexpr int64_t kMergeRows = 64;  // a task

template <class X>
struct MergeKernel {
    using T = Acc<X>;

    static void task(const void* context, int64_t task, int) {
        const AttentionMerge& m = *static_cast<const AttentionMerge*>(context);
        const int64_t end = smaller(m.rows, (task + 1) * kMergeRows);
        for (int64_t row = task * kMergeRows; row < end; ++row) {
            for (int64_t b = 0; b < m.batch; ++b) {
                for (int64_t h = 0; h < m.heads; ++h) one_row(m, b, row, h);
            }
        }
    }

    static const X* part(const HeadView& view, int64_t b, int64_t row, int64_t h) {
        return static_cast<const X*>(view.data) + b * view.batch + row * view.row + h * view.head;
    }

    static void one_row(const AttentionMerge& m, int64_t b, int64_t row, int64_t h) {
        const int64_t at = (b * m.heads + h) * m.rows + row;
        const auto lse_of = [&](int32_t i) { return static_cast<double>(static_cast<const T*>(m.parts[i].lse)[at]); };
        constexpr double nothing = -__builtin_inf();
        double highest = nothing, total = 0;
        for (int32_t i = 0; i < m.count; ++i)
            highest = lse_of(i) > highest || lse_of(i) != lse_of(i) ? lse_of(i) : highest;
        for (int32_t i = 0; i < m.count; ++i) {
            if (lse_of(i) != nothing) total += __builtin_exp(lse_of(i) - highest);
        }
        const double lse = total == 0 ? nothing : highest + __builtin_log(total);
        static_cast<T*>(m.lse)[at] = static_cast<T>(lse);
        T wide[kColumns];
        for (int64_t begin = 0; begin < m.columns; begin += kColumns) {
            const int64_t columns = smaller(kColumns, m.columns - begin);
            for (int64_t c = 0; c < columns; ++c) wide[c] = 0;
            for (int32_t i = 0; i < m.count; ++i) {
                if (lse_of(i) != nothing) add(part(m.parts[i].out, b, row, h) + begin, columns, lse_of(i) - lse, wide);
            }
            const int64_t to = b * m.out.batch + row * m.out.row + h * m.out.head + begin;
            if (m.out_dtype == m.dtype) {
                store_row(wide, columns, T(1), static_cast<X*>(m.out.data) + to);
            } else {
                store_row(wide, columns, T(1), static_cast<T*>(m.out.data) + to);
            }
        }
    }

    static void add(const X* from, int64_t columns, double log_weight, T* to) {
        T read[kColumns];
        widen_rows(from, 0, 1, 1, columns, columns, read);
        const T weight = static_cast<T>(__builtin_exp(log_weight));
        for (int64_t c = 0; c < columns; ++c) to[c] += weight * read[c];
    }

    static constexpr int64_t kColumns = 256;
};

template <class X>
Task merge_task(Type<X>) {
    return MergeKernel<X>::task;
}

}  // namespace

Status attention_merge(const AttentionMerge& args, int threads) {
    return with_types(args.dtype, args.dtype, [&](auto x, auto) {
        threads = useful_threads(args.batch * args.heads * args.rows * args.columns * args.count, threads);
        parallel(ceil_div(args.rows, kMergeRows), threads, merge_task(x), &args);
        return Status::ok;
    });
}

}  // namespace seqpar::cpu::SEQPAR_ISA
