// Shared by forward and backward of attention: the keys that a row sees, and the scores of a tile of kTileKeys keys and
// kTileRows query rows, stored as [key][row] so that each row has a lane of the vectors.
#pragma once

#include "attention_matmul.h"
#include "dropout.h"

namespace seqpar::cpu::SEQPAR_ISA {

constexpr int kTileRows = 96, kTileKeys = 96;  // multiples of kRowsAtOnce, 8, and a panel
constexpr int kSumKeys = 8;                    // weights so many are added up in T before they enter a sum in double
template <class T>
constexpr int kPanel = kVectorsAtOnce * kLanes<T>;
constexpr int kMostPanels = kTileRows / (kVectorsAtOnce * 2);

// Keys [first, last) of the block; none where last <= first.
struct Span {
    int first, last;
    bool none() const { return last <= first; }
    void join(Span other) {
        if (other.none()) return;
        if (none()) {
            *this = other;
        } else {
            first = smaller(first, other.first);
            last = larger(last, other.last);
        }
    }
    Span within(int begin, int end) const { return {larger(first, begin), smaller(last, end)}; }
    Span less(int begin) const { return {first - begin, last - begin}; }
};

inline Span seen_by(const AttentionScores& s, int64_t b, int64_t row) {
    int64_t first = 0, last = s.k_rows;
    if (s.left >= 0) first = larger(first, row + s.shift - s.left);
    if (s.right >= 0) last = smaller(last, row + s.shift + s.right + 1);
    if (s.first) first = larger<int64_t>(first, s.first[b * s.interval_batch + row]);
    if (s.last) last = smaller<int64_t>(last, s.last[b * s.interval_batch + row]);
    if (last <= first) return {0, 0};
    return {static_cast<int>(first), static_cast<int>(last)};
}

// kTileRows query rows or fewer, and the keys that each, each panel and each kRowsAtOnce of them see. `common` is what
// all rows of a panel see; rows beyond the last see nothing and do not count.
template <class T>
struct RowBlock {
    static constexpr int groups = kTileRows / kRowsAtOnce;
    int64_t start;
    int rows, panels, row_groups;
    Span row[kTileRows], panel[kMostPanels], common[kMostPanels], group[groups], all;

    RowBlock(const AttentionScores& s, int64_t b, int64_t first_row) : start(first_row), all{0, 0} {
        rows = static_cast<int>(smaller<int64_t>(kTileRows, s.q_rows - first_row));
        panels = static_cast<int>(ceil_div(rows, kPanel<T>));
        row_groups = static_cast<int>(ceil_div(rows, kRowsAtOnce));
        for (Span& span : panel) span = {0, 0};
        for (Span& span : common) span = {0, 1 << 30};
        for (Span& span : group) span = {0, 0};
        for (int r = 0; r < kTileRows; ++r) {
            row[r] = r < rows ? seen_by(s, b, first_row + r) : Span{0, 0};
            if (r >= rows) continue;
            panel[r / kPanel<T>].join(row[r]);
            common[r / kPanel<T>] = common[r / kPanel<T>].within(row[r].first, row[r].last);
            group[r / kRowsAtOnce].join(row[r]);
            all.join(row[r]);
        }
    }
};

// One tile: keys [begin, begin + ...) of the block against a RowBlock of one head.
template <class T>
struct TilePlace {
    const AttentionScores* s;
    const RowBlock<T>* rows;
    int64_t b, h;
    int begin;
};

template <class T>
inline T bias_at(const void* bias, DType dtype, int64_t i) {
    if constexpr (sizeof(T) == 8) {
        return static_cast<const double*>(bias)[i];
    } else {
        if (dtype == DType::f32) return static_cast<const float*>(bias)[i];
        float value[Pack::lanes];
        if (dtype == DType::f16) {
            store_scratch(value, load<Order::natural>(static_cast<const f16*>(bias) + i, 1));
        } else {
            const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(bias)[i]) << 16;
            memcpy(value, &bits, sizeof(bits));
        }
        return value[0];
    }
}

// Whether scores are more than `scale` times the product, apart from which keys a row sees.
inline bool adjusted(const AttentionScores& s) {
    return s.softcap > 0 || s.bias || s.mask || !(s.scale > 1e-6);
}

// tile[key][row] = the product q k^T of a panel, for the keys of `span` (counted from the tile's first) and what is
// needed to fill kRowsAtOnce of them.
template <class T>
inline void panel_products(const T* k, int64_t k_ld, const T* q_columns, int64_t depth, int panel, Span span, T* tile) {
    constexpr int P = kPanel<T>;
    for (int key = span.first / kRowsAtOnce * kRowsAtOnce; key < span.last; key += kRowsAtOnce) {
        multiply_rows<T, Left::rows>(depth, k + key * k_ld, k_ld, q_columns + panel * P, kTileRows,
                                     tile + key * kTileRows + panel * P, kTileRows, P, true);
    }
}

// Products become scores in units of log 2, kMasked where a row does not see a key. Where they are not adjusted they
// stay products, so that a row's bits do not depend on whether its tile needs a mask. gain, where asked for, becomes
// the derivative of the score by the product.
template <class T>
void panel_scores(const TilePlace<T>& at, int panel, Span span, T* tile, T* gain) {
    using V = Vec<T>;
    constexpr int P = kPanel<T>, lanes = kLanes<T>;
    const AttentionScores& s = *at.s;
    const T cap = static_cast<T>(s.softcap), slope = static_cast<T>(s.scale);
    const T scale = static_cast<T>(!adjusted(s) ? 1.0 : cap > 0 ? s.scale / s.softcap : s.scale * kLog2e);
    const T after = static_cast<T>(cap > 0 ? s.softcap * kLog2e : 1.0);
    const V masked = all_lanes(adjusted(s) ? kMasked<T> : kMasked<T> / larger(T(1), static_cast<T>(s.scale * kLog2e)));
    T first[P], last[P], extra[P];
    for (int i = 0; i < P; ++i) {
        const Span row = at.rows->row[panel * P + i].less(at.begin);
        first[i] = static_cast<T>(row.first);
        last[i] = static_cast<T>(row.last);
    }
    const int valid = smaller(P, at.rows->rows - panel * P);
    const int64_t row0 = at.rows->start + panel * P;
    for (int key = span.first; key < span.last; ++key) {
        T* const scores = tile + key * kTileRows + panel * P;
        const int64_t column = at.begin + key;
        if (s.bias || s.mask) {
            const int64_t bias0 = at.b * s.bias_batch + at.h * s.bias_head + column * s.bias_key;
            const int64_t mask0 = at.b * s.mask_batch + at.h * s.mask_head + column * s.mask_key;
            for (int i = 0; i < P; ++i) {
                extra[i] = 0;
                if (i >= valid) continue;
                const int64_t row = row0 + i;
                if (s.bias)
                    extra[i] = bias_at<T>(s.bias, s.bias_dtype, bias0 + row * s.bias_row) * static_cast<T>(kLog2e);
                if (s.mask && !s.mask[mask0 + row * s.mask_row]) extra[i] = kMasked<T>;
            }
        }
        const V here = all_lanes(static_cast<T>(key));
        for (int i = 0; i < P; i += lanes) {
            V x = load_vec(scores + i) * all_lanes(scale);
            V slopes = all_lanes(slope);
            if (cap > 0) {
                x = hyperbolic_tangent(x);
                slopes = slopes * (T(1) - x * x);
                x = x * all_lanes(after);
            }
            if (s.bias || s.mask) x = maximum(all_lanes(kMasked<T>), x + load_vec(extra + i));
            const VecMask<T> seen = (here >= load_vec(first + i)) & (here < load_vec(last + i));
            store_vec(scores + i, seen ? x : masked);
            if (gain) store_vec(gain + key * kTileRows + panel * P + i, slopes);
        }
    }
}

// The factor for the results of panel_scores.
template <class T>
inline T score_scale(const AttentionScores& s) {
    return adjusted(s) ? T(1) : static_cast<T>(s.scale * kLog2e);
}

// Zeros in a panel of a tile, for the keys of `whole` that are not in `span`.
template <class T>
inline void zero_around(T* tile, int panel, Span span, Span whole) {
    constexpr int P = kPanel<T>;
    for (int key = whole.first; key < whole.last; ++key) {
        if (key >= span.first && key < span.last) continue;
        memset(tile + key * kTileRows + panel * P, 0, P * sizeof(T));
    }
}

// tile *= by, for a panel.
template <class T>
inline void multiply_panel(int panel, Span span, const T* by, T* tile) {
    for (int key = span.first; key < span.last; ++key) {
        for (int i = panel * kPanel<T>; i < (panel + 1) * kPanel<T>; i += kLanes<T>) {
            const int64_t at = key * kTileRows + i;
            store_vec(tile + at, load_vec(tile + at) * load_vec(by + at));
        }
    }
}

// Dropout of weights: which row and column of the unsharded attention they are.
struct WeightDropout {
    RoundKeys keys;
    explicit WeightDropout(const AttentionScores& s)
        : keys(make_round_keys(s.seed ? static_cast<uint64_t>(*s.seed) : 0)) {}
};

// to[key][row] = the dropout factor of a weight, for a panel: dropout_scale or 0.
template <class T>
void panel_dropout(const WeightDropout& dropout, const TilePlace<T>& at, int panel, Span span, T* to) {
    constexpr int P = kPanel<T>;
    const AttentionScores& s = *at.s;
    uint32_t low[P], high[P], words[4][P];
    for (int i = 0; i < P; ++i) {
        const int64_t row = smaller<int64_t>(at.rows->start + panel * P + i, s.q_rows - 1);
        const int64_t position = s.q_positions ? s.q_positions[row] : s.q_offset + row;
        const uint64_t global =
            static_cast<uint64_t>(((s.first_batch + at.b) * s.all_heads + s.first_head + at.h) * s.all_rows + position);
        low[i] = static_cast<uint32_t>(global);
        high[i] = static_cast<uint32_t>(global >> 32);
    }
    int64_t made = -1;  // the block of 8 columns that `words` belong to
    for (int key = span.first; key < span.last; ++key) {
        const int64_t column = s.k_positions ? s.k_positions[at.begin + key] : s.k_offset + at.begin + key;
        if (column / 8 != made) {
            made = column / 8;
            for (int i = 0; i < P; ++i) {
                uint32_t c0 = static_cast<uint32_t>(made), c1 = low[i], c2 = high[i], c3 = 0;
                for (int round = 0; round < Philox::rounds; ++round) {
                    const uint64_t p0 = static_cast<uint64_t>(Philox::mul0) * c0;
                    const uint64_t p1 = static_cast<uint64_t>(Philox::mul1) * c2;
                    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ dropout.keys.k0[round];
                    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ dropout.keys.k1[round];
                    c1 = static_cast<uint32_t>(p1);
                    c3 = static_cast<uint32_t>(p0);
                }
                words[0][i] = c0;
                words[1][i] = c1;
                words[2][i] = c2;
                words[3][i] = c3;
            }
        }
        const int within = static_cast<int>(column % 8);
        const uint32_t* const word = words[within / 2];
        T* const out = to + key * kTileRows + panel * P;
        for (int i = 0; i < P; ++i) {
            const uint32_t bits = word[i] >> (within % 2 * 16) & 0xFFFFu;
            out[i] = bits >= s.threshold ? static_cast<T>(s.dropout_scale) : T(0);
        }
    }
}

template <class X>
const X* head_of(const HeadView& view, int64_t b, int64_t row, int64_t h) {
    return static_cast<const X*>(view.data) + b * view.batch + row * view.row + h * view.head;
}
template <class X>
X* row_in(const HeadView& view, int64_t b, int64_t row, int64_t h) {
    return static_cast<X*>(view.data) + b * view.batch + row * view.row + h * view.head;
}

}  // namespace seqpar::cpu::SEQPAR_ISA
