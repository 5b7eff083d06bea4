// Attention of a block of queries over a block of keys, forward. A task is kTileRows query rows of one head; it walks
// over the keys its rows see tile by tile: scores, weights, and the weights times v added to acc. k and v of a head are
// widened once for all tasks. The result of a row depends on this row and the order of keys only, not on tiles, tasks
// or threads: see csrc/seqpar.h.
#include "attention_tile.h"

namespace seqpar::cpu::SEQPAR_ISA {
namespace {

constexpr int64_t kWidenedBytes = int64_t{4} << 20;  // of k and v at one time, or a single head
constexpr int kWidenRows = 192;                      // a task; a multiple of kRowsAtOnce

template <class T>
struct ForwardPlan {
    const AttentionForward* args;
    WeightDropout dropout;
    int64_t k_cols, v_cols, padded_keys;  // of the widened k and v
    int64_t row_blocks, heads_per_key_head;
    T *k, *v;    // [key heads at one time, padded_keys, cols]
    T* workers;  // scratch
    int64_t worker_size;
    int64_t first_pair, pairs;  // pairs of batch entry and key head, at one time
};

template <class T>
struct ForwardScratch {
    T *q, *q_columns, *tile, *kept, *factor, *acc, *maximum;
    double* sum;

    static int64_t size(const AttentionScores& s, int64_t k_cols, int64_t v_cols) {
        return kTileRows *
               (k_cols + s.head_dim + kTileKeys * (s.seed ? 2 : 1) + v_cols + 2 + sizeof(double) / sizeof(T));
    }
    ForwardScratch(const ForwardPlan<T>& plan, int worker) {
        T* free = plan.workers + worker * plan.worker_size;
        const auto take = [&](int64_t cols) {
            T* const taken = free;
            free += kTileRows * cols;
            return taken;
        };
        sum = reinterpret_cast<double*>(take(sizeof(double) / sizeof(T)));
        q = take(plan.k_cols);
        q_columns = take(plan.args->scores.head_dim);
        tile = take(kTileKeys);
        kept = plan.args->scores.seed ? take(kTileKeys) : nullptr;
        factor = take(1);
        maximum = take(1);
        acc = take(plan.v_cols);
    }
};

// Scores of a panel become weights, `maximum` and `sum` follow, and `factor` says what acc must be multiplied by.
// Scores are `tile` times `scale`, in units of log 2.
template <class T>
bool panel_weights(int panel, Span span, T scale, T* tile, T* maxima, double* sums, T* factors) {
    using V = Vec<T>;
    constexpr int P = kPanel<T>, lanes = kLanes<T>;
    bool rescaled = false;
    T* const first = tile + panel * P;
    const V by = all_lanes(scale);
    for (int i = 0; i < P; i += lanes) {
        V highest = all_lanes(kMasked<T>);
        for (int key = span.first; key < span.last; ++key) {
            highest = maximum(load_vec(first + key * kTileRows + i), highest);
        }
        const V before = load_vec(maxima + panel * P + i);
        const V m = maximum(nearest(highest * by), before), factor = power_of_two(before - m);
        store_vec(maxima + panel * P + i, m);
        store_vec(factors + panel * P + i, factor);
        for (int lane = 0; lane < lanes; ++lane) {
            rescaled |= factor[lane] != T(1);
            sums[panel * P + i + lane] *= factor[lane];
        }
    }
    typedef double Doubles __attribute__((vector_size(lanes * sizeof(double))));
    V m[kVectorsAtOnce];
    Doubles total[kVectorsAtOnce];
    memcpy(total, sums + panel * P, sizeof(total));
    for (int i = 0; i < kVectorsAtOnce; ++i) m[i] = load_vec(maxima + panel * P + i * lanes);
    for (int group = span.first / kSumKeys * kSumKeys; group < span.last; group += kSumKeys) {
        V sum[kVectorsAtOnce];
        for (int i = 0; i < kVectorsAtOnce; ++i) sum[i] = all_lanes(T(0));
        const int end = smaller(group + kSumKeys, span.last);
        for (int key = larger(group, span.first); key < end; ++key) {
            T* const row = first + key * kTileRows;
            for (int i = 0; i < kVectorsAtOnce; ++i) {
                const V weight = exp2_less(load_vec(row + i * lanes) * by, m[i]);
                store_vec(row + i * lanes, weight);
                sum[i] = sum[i] + weight;
            }
        }
        for (int i = 0; i < kVectorsAtOnce; ++i) total[i] = total[i] + __builtin_convertvector(sum[i], Doubles);
    }
    memcpy(sums + panel * P, total, sizeof(total));
    return rescaled;
}

template <class X>
struct ForwardKernel {
    using T = Acc<X>;
    using Plan = ForwardPlan<T>;
    static constexpr int P = kPanel<T>;

    static void widen(const void* context, int64_t task, int) {
        const Plan& plan = *static_cast<const Plan*>(context);
        const AttentionScores& s = plan.args->scores;
        const int64_t chunks = ceil_div(plan.padded_keys, kWidenRows), pair = task / chunks;
        const int64_t b = (plan.first_pair + pair) / s.kv_heads, h = (plan.first_pair + pair) % s.kv_heads;
        const int64_t row = task % chunks * kWidenRows;
        const int64_t padded = smaller<int64_t>(kWidenRows, plan.padded_keys - row);
        const int64_t rows = smaller(padded, s.k_rows - row);
        const int64_t at = pair * plan.padded_keys + row;
        widen_rows(head_of<X>(s.k, b, row, h), s.k.row, rows, padded, s.head_dim, plan.k_cols,
                   plan.k + at * plan.k_cols);
        widen_rows(head_of<X>(s.v, b, row, h), s.v.row, rows, padded, s.value_dim, plan.v_cols,
                   plan.v + at * plan.v_cols);
    }

    static void task(const void* context, int64_t task, int worker) {
        const Plan& plan = *static_cast<const Plan*>(context);
        const AttentionScores& s = plan.args->scores;
        const int64_t heads = plan.pairs * plan.heads_per_key_head;
        // The last rows of a causal block see most keys: they come first, and what is left evens out the load.
        const int64_t start = (plan.row_blocks - 1 - task / heads) * kTileRows;
        const int64_t pair = task % heads / plan.heads_per_key_head, member = task % plan.heads_per_key_head;
        const int64_t b = (plan.first_pair + pair) / s.kv_heads;
        const int64_t h = (plan.first_pair + pair) % s.kv_heads * plan.heads_per_key_head + member;
        const T* const k = plan.k + pair * plan.padded_keys * plan.k_cols;
        const T* const v = plan.v + pair * plan.padded_keys * plan.v_cols;
        const ForwardScratch<T> to(plan, worker);
        const RowBlock<T> rows(s, b, start);
        if (rows.all.none() && plan.args->resume && !plan.args->out.data) return;  // the state stays as it is
        begin(plan, rows, b, h, to);
        if (!rows.all.none()) {
            widen_rows(head_of<X>(s.q, b, start, h), s.q.row, rows.rows, kTileRows, s.head_dim, plan.k_cols, to.q);
            transpose(to.q, plan.k_cols, kTileRows, s.head_dim, to.q_columns, kTileRows);
        }
        for (int at = rows.all.first / kTileKeys * kTileKeys; at < rows.all.last; at += kTileKeys) {
            one_tile(plan, {&s, &rows, b, h, at}, k + at * plan.k_cols, v + at * plan.v_cols, to);
        }
        end(plan, rows, b, h, to);
    }

    static void one_tile(const Plan& plan, const TilePlace<T>& at, const T* k, const T* v,
                         const ForwardScratch<T>& to) {
        const AttentionScores& s = *at.s;
        const RowBlock<T>& rows = *at.rows;
        const Span whole = rows.all.within(at.begin, at.begin + kTileKeys).less(at.begin);
        bool rescaled = false;
        for (int panel = 0; panel < rows.panels; ++panel) {
            const Span span = rows.panel[panel].within(at.begin, at.begin + kTileKeys).less(at.begin);
            if (span.none()) {
                zero_around(to.tile, panel, span, whole);
                for (int i = 0; i < P; ++i) to.factor[panel * P + i] = T(1);
                continue;
            }
            panel_products(k, plan.k_cols, to.q_columns, s.head_dim, panel, span, to.tile);
            const Span common = rows.common[panel].less(at.begin);
            const bool plain = !adjusted(s) && common.first <= span.first && common.last >= span.last;
            if (!plain) panel_scores<T>(at, panel, span, to.tile, nullptr);
            rescaled |= panel_weights(panel, span, score_scale<T>(s), to.tile, to.maximum, to.sum, to.factor);
            if (s.seed) {
                panel_dropout(plan.dropout, at, panel, span, to.kept);
                multiply_panel(panel, span, to.kept, to.tile);
            }
            zero_around(to.tile, panel, span, whole);  // the products filled whole groups of keys
        }
        for (int group = 0; group < rows.row_groups; ++group) {
            const Span span = rows.group[group].within(at.begin, at.begin + kTileKeys).less(at.begin);
            if (span.none()) continue;
            const int row = group * kRowsAtOnce;
            multiply_rows<T, Left::columns>(span.last - span.first, to.tile + span.first * kTileRows + row, kTileRows,
                                            v + span.first * plan.v_cols, plan.v_cols, to.acc + row * plan.v_cols,
                                            plan.v_cols, plan.v_cols, false, rescaled ? to.factor + row : nullptr);
        }
    }

    // m, l and acc from nothing or from the state given.
    static void begin(const Plan& plan, const RowBlock<T>& rows, int64_t b, int64_t h, const ForwardScratch<T>& to) {
        const AttentionForward& args = *plan.args;
        const AttentionScores& s = args.scores;
        for (int r = 0; r < kTileRows; ++r) {
            to.maximum[r] = kNothing<T>;
            to.sum[r] = 0;
        }
        memset(to.acc, 0, static_cast<size_t>(kTileRows * plan.v_cols) * sizeof(T));
        if (!args.resume) return;
        const int64_t at = (b * s.q_heads + h) * s.q_rows + rows.start;
        for (int r = 0; r < rows.rows; ++r) {
            to.maximum[r] = static_cast<T>(args.maxima[at + r]);
            to.sum[r] = args.sums[at + r];
            memcpy(to.acc + r * plan.v_cols, row_in<T>(args.acc, b, rows.start + r, h),
                   static_cast<size_t>(s.value_dim) * sizeof(T));
        }
    }

    // The state, the results, or both.
    static void end(const Plan& plan, const RowBlock<T>& rows, int64_t b, int64_t h, const ForwardScratch<T>& to) {
        const AttentionForward& args = *plan.args;
        const AttentionScores& s = args.scores;
        const int64_t at = (b * s.q_heads + h) * s.q_rows + rows.start;
        for (int r = 0; r < rows.rows; ++r) {
            const T* const acc = to.acc + r * plan.v_cols;
            const double sum = to.sum[r];
            if (args.acc.data) {
                args.maxima[at + r] = to.maximum[r];
                args.sums[at + r] = sum;
                memcpy(row_in<T>(args.acc, b, rows.start + r, h), acc, static_cast<size_t>(s.value_dim) * sizeof(T));
            }
            if (!args.out.data) continue;
            store_row(acc, s.value_dim, static_cast<T>(sum == 0 ? 0 : 1 / sum),
                      row_in<X>(args.out, b, rows.start + r, h));
            static_cast<T*>(args.lse)[at + r] = static_cast<T>(
                sum == 0 ? -__builtin_inf() : (static_cast<double>(to.maximum[r]) + __builtin_log2(sum)) * kLn2);
        }
    }
};

template <class X>
Status run(Type<X>, const AttentionForward& args, int threads) {
    using T = Acc<X>;
    const AttentionScores& s = args.scores;
    ForwardPlan<T> plan{&args, WeightDropout(s), 0, 0, 0, 0, 0, nullptr, nullptr, nullptr, 0, 0, 0};
    plan.k_cols = rounded_up(s.head_dim, kLanes<T>);
    plan.v_cols = rounded_up(s.value_dim, kLanes<T>);
    plan.padded_keys = rounded_up(s.k_rows, kRowsAtOnce);
    plan.row_blocks = ceil_div(s.q_rows, kTileRows);
    plan.heads_per_key_head = s.q_heads / s.kv_heads;
    const int64_t pairs = s.batch * s.kv_heads, head = plan.padded_keys * (plan.k_cols + plan.v_cols);
    const int64_t fitting = kWidenedBytes / larger<int64_t>(1, head * static_cast<int64_t>(sizeof(T)));
    const int64_t together = smaller(pairs, larger<int64_t>(1, fitting));
    threads = useful_threads(pairs * plan.heads_per_key_head * s.q_rows * (s.k_rows + s.value_dim), threads);
    plan.worker_size = rounded_up(ForwardScratch<T>::size(s, plan.k_cols, plan.v_cols), 64 / sizeof(T));
    const Scratch scratch(static_cast<size_t>(together * head + threads * plan.worker_size + 32) * sizeof(T));
    if (!scratch.data()) return Status::launch_failed;
    plan.workers = static_cast<T*>(scratch.data());
    plan.k = plan.workers + threads * plan.worker_size;
    plan.v = plan.k + together * plan.padded_keys * plan.k_cols;
    for (plan.first_pair = 0; plan.first_pair < pairs; plan.first_pair += together) {
        plan.pairs = smaller(together, pairs - plan.first_pair);
        parallel(plan.pairs * ceil_div(plan.padded_keys, kWidenRows), threads, ForwardKernel<X>::widen, &plan);
        parallel(plan.pairs * plan.heads_per_key_head * plan.row_blocks, threads, ForwardKernel<X>::task, &plan);
    }
    return Status::ok;
}

}  // namespace

Status attention_forward(const AttentionForward& args, int threads) {
    return with_types(args.scores.dtype, args.scores.dtype, [&](auto x, auto) { return run(x, args, threads); });
}

}  // namespace seqpar::cpu::SEQPAR_ISA
