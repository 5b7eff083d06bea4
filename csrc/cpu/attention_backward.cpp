// Attention of a block of queries over a block of keys, backward. Scores and weights are made again tile by tile; five
// products a tile. A task goes over its keys in stretches whose k, v, dk and dv stay in cache, and for each over its
// query rows. Where there are fewer pairs of batch entry and key head than threads, dk and dv are made by one kind of
// task and dq by another, from the same tiles. Every gradient is one chain of additions, dq key by key, dk and dv query
// by query, head by head: its bits depend neither on tiles nor on how the work is shared out.
#include "attention_tile.h"

namespace seqpar::cpu::SEQPAR_ISA {
namespace {

constexpr int64_t kStretchNumbers = 49152;  // of k and v together: with dk and dv 384 KiB of floats

template <class T>
struct BackwardPlan {
    const AttentionBackward* args;
    WeightDropout dropout;
    int64_t k_cols, v_cols;
    int64_t stretch, stretches;  // keys in one, a multiple of kTileKeys
    int64_t row_blocks, heads_per_key_head;
    int64_t blocks_per_task;  // of a dq task
    T* workers;
    int64_t worker_size;
};

template <class T>
struct BackwardScratch {
    T *k, *v, *dk, *dv;                      // a stretch
    T *q, *dout, *q_columns, *dout_columns;  // kTileRows query rows
    T* dq;                                   // the dq of all rows of the task
    T *tile, *dtile, *kept, *gain;
    T *lse, *lse_rest, *delta;  // lse in units of log 2, and what its rounding left

    template <class Take>
    void lay_out(const BackwardPlan<T>& plan, int64_t dq_rows, Take take) {
        const AttentionScores& s = plan.args->scores;
        k = take(plan.stretch * plan.k_cols);
        v = take(plan.stretch * plan.v_cols);
        dk = take(plan.stretch * plan.k_cols);
        dv = take(plan.stretch * plan.v_cols);
        q = take(kTileRows * plan.k_cols);
        dout = take(kTileRows * plan.v_cols);
        q_columns = take(kTileRows * s.head_dim);
        dout_columns = take(kTileRows * s.value_dim);
        dq = take(dq_rows * plan.k_cols);
        tile = take(kTileRows * kTileKeys);
        dtile = take(kTileRows * kTileKeys);
        kept = s.seed ? take(kTileRows * kTileKeys) : nullptr;
        gain = s.softcap > 0 ? take(kTileRows * kTileKeys) : nullptr;
        lse = take(kTileRows);
        lse_rest = take(kTileRows);
        delta = take(kTileRows);
    }
};

// The part of the problem that one task covers, and the gradients that it computes.
struct Share {
    int64_t b, key_head;
    int64_t first_member, last_member;  // heads of the group
    int64_t first_block, last_block;    // row blocks
    int64_t first_stretch, last_stretch;
    bool dq, dkv;
};

struct Rows {
    int64_t first, last;
};

// Scores (times `scale`, in units of log 2) become the weights that dv needs, d(weights) becomes d(product).
template <class T>
void panel_gradients(int panel, Span span, T scale, T slope, const BackwardScratch<T>& to) {
    using V = Vec<T>;
    constexpr int P = kPanel<T>, lanes = kLanes<T>;
    const V by = all_lanes(scale);
    for (int i = panel * P; i < (panel + 1) * P; i += lanes) {
        const V lse = load_vec(to.lse + i), rest = load_vec(to.lse_rest + i), delta = load_vec(to.delta + i);
        for (int key = span.first; key < span.last; ++key) {
            const int64_t at = key * kTileRows + i;
            const V weight = exp2_of_difference(load_vec(to.tile + at), by, lse, rest);
            V dropped = weight, dweight = load_vec(to.dtile + at);
            if (to.kept) {
                const V kept = load_vec(to.kept + at);
                dropped = dropped * kept;
                dweight = dweight * kept;
            }
            const V slopes = to.gain ? load_vec(to.gain + at) : all_lanes(slope);
            store_vec(to.tile + at, dropped);
            store_vec(to.dtile + at, (dweight - delta) * (weight * slopes));
        }
    }
}

template <class X>
struct BackwardKernel {
    using T = Acc<X>;
    using Plan = BackwardPlan<T>;
    using Scratch = BackwardScratch<T>;

    static void run(const Plan& plan, const Share& share, int worker) {
        const AttentionScores& s = plan.args->scores;
        const int64_t task_rows = smaller(share.last_block * kTileRows, s.q_rows) - share.first_block * kTileRows;
        const int64_t head_rows = rounded_up(task_rows, kTileRows);  // of dq, a head
        Scratch to;
        T* free = plan.workers + worker * plan.worker_size;
        to.lay_out(plan, share.dq ? (share.last_member - share.first_member) * head_rows : 0, [&](int64_t size) {
            T* const taken = free;
            free += rounded_up(size, 64 / sizeof(T));
            return taken;
        });
        const Rows seen = share.dq ? seeing_rows(plan, share, task_rows) : Rows{0, 0};
        for (int64_t member = share.first_member; share.dq && member < share.last_member; ++member) {
            begin(plan.args->dq, share.b, head(plan, share, member), share.first_block * kTileRows + seen.first,
                  seen.last - seen.first, rounded_up(seen.last, kTileRows) - seen.first, s.head_dim, plan.k_cols,
                  plan.args->accumulate, dq_of(plan, share, member, head_rows, seen.first, to));
        }
        for (int64_t stretch = share.first_stretch; stretch < share.last_stretch; ++stretch) {
            one_stretch(plan, share, stretch * plan.stretch, head_rows, to);
        }
        for (int64_t member = share.first_member; share.dq && member < share.last_member; ++member) {
            end(plan, plan.args->dq, share.b, head(plan, share, member), share.first_block * kTileRows + seen.first,
                seen.last - seen.first, s.head_dim, plan.k_cols, dq_of(plan, share, member, head_rows, seen.first, to));
        }
    }

    // The rows of the task's dq, a multiple of kTileRows first, that change: all of them where dq is not added to.
    static Rows seeing_rows(const Plan& plan, const Share& share, int64_t task_rows) {
        if (!plan.args->accumulate) return {0, task_rows};
        Rows found{task_rows, 0};
        for (int64_t block = share.first_block; block < share.last_block; ++block) {
            if (RowBlock<T>(plan.args->scores, share.b, block * kTileRows).all.none()) continue;
            const int64_t first = (block - share.first_block) * kTileRows;
            found = {smaller(found.first, first), smaller(first + kTileRows, task_rows)};
        }
        return found.last == 0 ? Rows{0, 0} : found;
    }

    static T* dq_of(const Plan& plan, const Share& share, int64_t member, int64_t head_rows, int64_t row,
                    const Scratch& to) {
        return to.dq + ((member - share.first_member) * head_rows + row) * plan.k_cols;
    }

    static int64_t head(const Plan& plan, const Share& share, int64_t member) {
        return share.key_head * plan.heads_per_key_head + member;
    }

    static void one_stretch(const Plan& plan, const Share& share, int64_t first_key, int64_t dq_rows,
                            const Scratch& to) {
        const AttentionBackward& args = *plan.args;
        const AttentionScores& s = args.scores;
        const int64_t keys = smaller(plan.stretch, s.k_rows - first_key), padded = rounded_up(keys, kRowsAtOnce);
        const int64_t b = share.b, key_head = share.key_head;
        widen_rows(head_of<X>(s.k, b, first_key, key_head), s.k.row, keys, padded, s.head_dim, plan.k_cols, to.k);
        widen_rows(head_of<X>(s.v, b, first_key, key_head), s.v.row, keys, padded, s.value_dim, plan.v_cols, to.v);
        if (share.dkv) {
            begin(args.dk, b, key_head, first_key, keys, padded, s.head_dim, plan.k_cols, args.accumulate, to.dk);
            begin(args.dv, b, key_head, first_key, keys, padded, s.value_dim, plan.v_cols, args.accumulate, to.dv);
        }
        for (int64_t member = share.first_member; member < share.last_member; ++member) {
            for (int64_t block = share.first_block; block < share.last_block; ++block) {
                const RowBlock<T> rows(s, b, block * kTileRows);
                const int64_t h = head(plan, share, member);
                const Span seen = rows.all.within(static_cast<int>(first_key), static_cast<int>(first_key + keys));
                if (seen.none()) continue;
                load_rows(plan, rows, b, h, to);
                T* const dq =
                    to.dq +
                    ((member - share.first_member) * dq_rows + (block - share.first_block) * kTileRows) * plan.k_cols;
                const int64_t first_tile = (seen.first - first_key) / kTileKeys * kTileKeys;
                for (int64_t at = first_tile; at < seen.last - first_key; at += kTileKeys) {
                    const int begin = static_cast<int>(first_key + at);
                    one_tile(plan, share, {&s, &rows, b, h, begin}, at, dq, to);
                }
            }
        }
        if (share.dkv) {
            end(plan, args.dk, b, key_head, first_key, keys, s.head_dim, plan.k_cols, to.dk);
            end(plan, args.dv, b, key_head, first_key, keys, s.value_dim, plan.v_cols, to.dv);
        }
    }

    // q and dout of kTileRows rows, both ways round, their lse in units of log 2, and delta less dlse.
    static void load_rows(const Plan& plan, const RowBlock<T>& rows, int64_t b, int64_t h, const Scratch& to) {
        const AttentionBackward& args = *plan.args;
        const AttentionScores& s = args.scores;
        widen_rows(head_of<X>(s.q, b, rows.start, h), s.q.row, rows.rows, kTileRows, s.head_dim, plan.k_cols, to.q);
        transpose(to.q, plan.k_cols, kTileRows, s.head_dim, to.q_columns, kTileRows);
        widen_rows(head_of<X>(args.dout, b, rows.start, h), args.dout.row, rows.rows, kTileRows, s.value_dim,
                   plan.v_cols, to.dout);
        transpose(to.dout, plan.v_cols, kTileRows, s.value_dim, to.dout_columns, kTileRows);
        const int64_t at = (b * s.q_heads + h) * s.q_rows + rows.start;
        for (int r = 0; r < kTileRows; ++r) {
            to.lse[r] = -kNothing<T>;  // no weight is left of a row that saw no key
            to.lse_rest[r] = to.delta[r] = 0;
            if (r >= rows.rows) continue;
            const double lse = static_cast<double>(static_cast<const T*>(args.lse)[at + r]);
            if (!(lse < kMasked<T>)) {  // a NaN as well
                to.lse[r] = static_cast<T>(lse * kLog2e);
                to.lse_rest[r] = static_cast<T>(__builtin_fma(lse, kLog2e, -static_cast<double>(to.lse[r])));
            }
            T delta = 0;
            if (args.delta) {
                delta = static_cast<const T*>(args.delta)[at + r];
            } else {
                // The tile is not in use yet.
                widen_rows(head_of<X>(args.out, b, rows.start + r, h), 0, 1, 1, s.value_dim, plan.v_cols, to.tile);
                delta = dot(to.tile, to.dout + r * plan.v_cols, plan.v_cols);
            }
            to.delta[r] = args.dlse ? delta - static_cast<const T*>(args.dlse)[at + r] : delta;
        }
    }

    static T dot(const T* x, const T* y, int64_t cols) {
        Vec<T> total = all_lanes(T(0));
        for (int64_t c = 0; c < cols; c += kLanes<T>) total = multiply_add(load_vec(x + c), load_vec(y + c), total);
        T sum = 0;
        for (int i = 0; i < kLanes<T>; ++i) sum += total[i];
        return sum;
    }

    static void panel_weights(const Plan& plan, const TilePlace<T>& at, int panel, Span span, int64_t key,
                              const Scratch& to) {
        const AttentionScores& s = *at.s;
        panel_products(to.k + key * plan.k_cols, plan.k_cols, to.q_columns, s.head_dim, panel, span, to.tile);
        panel_products(to.v + key * plan.v_cols, plan.v_cols, to.dout_columns, s.value_dim, panel, span, to.dtile);
        const Span common = at.rows->common[panel].less(at.begin);
        const bool plain = !adjusted(s) && common.first <= span.first && common.last >= span.last;
        if (!plain) panel_scores(at, panel, span, to.tile, to.gain);
        if (s.seed) panel_dropout(plan.dropout, at, panel, span, to.kept);
        panel_gradients(panel, span, score_scale<T>(s), static_cast<T>(s.scale), to);
    }

    static void one_tile(const Plan& plan, const Share& share, const TilePlace<T>& at, int64_t key, T* dq,
                         const Scratch& to) {
        const RowBlock<T>& rows = *at.rows;
        // A stretch ends within the block of keys or with it, so no tile reaches beyond either.
        const Span whole = rows.all.within(at.begin, at.begin + kTileKeys).less(at.begin);
        for (int panel = 0; panel < rows.panels; ++panel) {
            const Span span = rows.panel[panel].within(at.begin, at.begin + kTileKeys).less(at.begin);
            if (!span.none()) panel_weights(plan, at, panel, span, key, to);
            zero_around(to.tile, panel, span, rounded(whole));  // the products filled whole groups of keys
            zero_around(to.dtile, panel, span, rounded(whole));
        }
        if (share.dkv) add_key_gradients(plan, at, whole, key, to);
        for (int group = 0; share.dq && group < rows.row_groups; ++group) {
            const Span span = rows.group[group].within(at.begin, at.begin + kTileKeys).less(at.begin);
            if (span.none()) continue;
            const int row = group * kRowsAtOnce;
            multiply_rows<T, Left::columns>(span.last - span.first, to.dtile + span.first * kTileRows + row, kTileRows,
                                            to.k + (key + span.first) * plan.k_cols, plan.k_cols,
                                            dq + row * plan.k_cols, plan.k_cols, plan.k_cols);
        }
    }

    static Span rounded(Span keys) {
        return {keys.first / kRowsAtOnce * kRowsAtOnce, static_cast<int>(rounded_up(keys.last, kRowsAtOnce))};
    }

    // dv += weights^T dout, dk += dscores^T q, for the rows between the first and the last that see any of the keys.
    static void add_key_gradients(const Plan& plan, const TilePlace<T>& at, Span keys, int64_t key, const Scratch& to) {
        const RowBlock<T>& rows = *at.rows;
        for (int group = rounded(keys).first; group < keys.last; group += kRowsAtOnce) {
            Span over{0, 0};
            for (int r = 0; r < rows.rows; ++r) {
                const Span seen = rows.row[r].less(at.begin);
                if (seen.first < group + kRowsAtOnce && seen.last > group) over.join({r, r + 1});
            }
            if (over.none()) continue;
            const T* const weights = to.tile + group * kTileRows + over.first;
            const T* const dscores = to.dtile + group * kTileRows + over.first;
            const int64_t depth = over.last - over.first;
            multiply_rows<T, Left::rows>(depth, weights, kTileRows, to.dout + over.first * plan.v_cols, plan.v_cols,
                                         to.dv + (key + group) * plan.v_cols, plan.v_cols, plan.v_cols);
            multiply_rows<T, Left::rows>(depth, dscores, kTileRows, to.q + over.first * plan.k_cols, plan.k_cols,
                                         to.dk + (key + group) * plan.k_cols, plan.k_cols, plan.k_cols);
        }
    }

    // A gradient's rows in scratch: zeros, or what is there to be added to.
    static void begin(const HeadView& grad, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t padded_rows,
                      int64_t cols, int64_t padded, bool accumulate, T* to) {
        const bool read = accumulate && grad.data;
        widen_rows(read ? head_of<T>(grad, b, row, h) : static_cast<const T*>(nullptr), grad.row, read ? rows : 0,
                   padded_rows, cols, padded, to);
    }
    static void end(const Plan& plan, const HeadView& grad, int64_t b, int64_t h, int64_t row, int64_t rows,
                    int64_t cols, int64_t padded, const T* from) {
        if (!grad.data) return;
        const bool same = plan.args->grad_dtype == plan.args->scores.dtype;
        for (int64_t r = 0; r < rows; ++r, from += padded) {
            if (same) {
                store_row(from, cols, T(1), row_in<X>(grad, b, row + r, h));
            } else {
                memcpy(row_in<T>(grad, b, row + r, h), from, static_cast<size_t>(cols) * sizeof(T));
            }
        }
    }

    static void whole_task(const void* context, int64_t task, int worker) {
        const Plan& plan = *static_cast<const Plan*>(context);
        const int64_t heads = plan.args->scores.kv_heads;
        run(plan,
            {task / heads, task % heads, 0, plan.heads_per_key_head, 0, plan.row_blocks, 0, plan.stretches, true, true},
            worker);
    }
    static void key_task(const void* context, int64_t task, int worker) {
        const Plan& plan = *static_cast<const Plan*>(context);
        const int64_t heads = plan.args->scores.kv_heads, pair = task / plan.stretches, stretch = task % plan.stretches;
        run(plan,
            {pair / heads, pair % heads, 0, plan.heads_per_key_head, 0, plan.row_blocks, stretch, stretch + 1, false,
             true},
            worker);
    }
    static void query_task(const void* context, int64_t task, int worker) {
        const Plan& plan = *static_cast<const Plan*>(context);
        const AttentionScores& s = plan.args->scores;
        const int64_t parts = ceil_div(plan.row_blocks, plan.blocks_per_task);
        const int64_t first = (parts - 1 - task % parts) * plan.blocks_per_task;  // the longest first
        const int64_t h = task / parts % s.q_heads, b = task / parts / s.q_heads;
        const int64_t member = h % plan.heads_per_key_head;
        run(plan,
            {b, h / plan.heads_per_key_head, member, member + 1, first,
             smaller(first + plan.blocks_per_task, plan.row_blocks), 0, plan.stretches, true, false},
            worker);
    }
};

template <class X>
Status run(Type<X>, const AttentionBackward& args, int threads) {
    using T = Acc<X>;
    using Kernel = BackwardKernel<X>;
    const AttentionScores& s = args.scores;
    BackwardPlan<T> plan{&args, WeightDropout(s), 0, 0, 0, 0, 0, 0, 4, nullptr, 0};
    plan.k_cols = rounded_up(s.head_dim, kLanes<T>);
    plan.v_cols = rounded_up(s.value_dim, kLanes<T>);
    const int64_t fitting = kStretchNumbers / (plan.k_cols + plan.v_cols) / kTileKeys * kTileKeys;
    plan.stretch = smaller(larger<int64_t>(fitting, kTileKeys), rounded_up(s.k_rows, kTileKeys));
    plan.stretches = ceil_div(s.k_rows, larger<int64_t>(plan.stretch, 1));
    plan.row_blocks = ceil_div(s.q_rows, kTileRows);
    plan.heads_per_key_head = s.q_heads / s.kv_heads;
    const int64_t pairs = s.batch * s.kv_heads;
    threads = useful_threads(s.batch * s.q_heads * s.q_rows * (s.k_rows + s.value_dim), threads);
    const bool whole = pairs >= threads;
    const int64_t dq_rows = whole ? plan.heads_per_key_head * plan.row_blocks : plan.blocks_per_task;
    BackwardScratch<T> layout;
    layout.lay_out(plan, dq_rows * kTileRows, [&](int64_t size) -> T* {
        plan.worker_size += rounded_up(size, 64 / sizeof(T));
        return nullptr;
    });
    const Scratch scratch(static_cast<size_t>(threads * plan.worker_size) * sizeof(T));
    if (!scratch.data()) return Status::launch_failed;
    plan.workers = static_cast<T*>(scratch.data());
    if (whole) {
        parallel(pairs, threads, Kernel::whole_task, &plan);
    } else {
        parallel(pairs * plan.stretches, threads, Kernel::key_task, &plan);
        parallel(s.batch * s.q_heads * ceil_div(plan.row_blocks, plan.blocks_per_task), threads, Kernel::query_task,
                 &plan);
    }
    return Status::ok;
}

}  // namespace

Status attention_backward(const AttentionBackward& args, int threads) {
    return with_types(args.scores.dtype, args.scores.dtype, [&](auto x, auto) { return run(x, args, threads); });
}

}  // namespace seqpar::cpu::SEQPAR_ISA
