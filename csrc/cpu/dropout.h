// Philox-4x32-10 in vectors: which columns of a row dropout keeps, bit for bit as philox.h defines it.
#pragma once

#include "philox.h"
#include "simd.h"

namespace seqpar::cpu::SEQPAR_ISA {

// Columns whose bits are computed together: a multiple of every Pack, and as much independent work as the registers
// hold, since ten dependent rounds would leave the multiplier idle.
constexpr int kDropoutColumns = SEQPAR_ISA_LEVEL == 3 ? 256 : 128;

struct RoundKeys {
    uint32_t k0[Philox::rounds], k1[Philox::rounds];
};
inline RoundKeys make_round_keys(uint64_t seed) {
    RoundKeys keys;
    for (uint32_t i = 0; i < Philox::rounds; ++i) {
        keys.k0[i] = static_cast<uint32_t>(seed) + i * Philox::weyl0;
        keys.k1[i] = static_cast<uint32_t>(seed >> 32) + i * Philox::weyl1;
    }
    return keys;
}

inline int64_t global_row(const RowMap& map, int64_t row) {
    const int64_t block = larger<int64_t>(map.block, 1);
    return row / block * map.stride + row % block + map.offset;
}

// The counter is (column block, row low, row high, 0), so in the first two rounds whole words are the same for every
// column of a row. They are computed once a row, which saves 1.3 of the 10 rounds.
struct RowState {
    uint32_t word0_mix, word2_mix, word3;

    RowState(const RoundKeys& keys, uint64_t row) {
        const uint64_t first = static_cast<uint64_t>(Philox::mul1) * static_cast<uint32_t>(row >> 32);
        const uint32_t word0 = static_cast<uint32_t>(first >> 32) ^ static_cast<uint32_t>(row) ^ keys.k0[0];
        const uint64_t second = static_cast<uint64_t>(Philox::mul0) * word0;
        word0_mix = static_cast<uint32_t>(first) ^ keys.k0[1];
        word2_mix = static_cast<uint32_t>(second >> 32) ^ keys.k1[1];
        word3 = static_cast<uint32_t>(second);
    }
};

#if SEQPAR_ISA_LEVEL >= 2

// out: kDropoutColumns / Pack::lanes masks for the columns from `column`, a multiple of kDropoutColumns.
template <Order O>
inline void keep_columns(const RoundKeys& keys, const RowState& row, int64_t column, const Threshold& threshold,
                         Keep* out) {
    constexpr int groups = kDropoutColumns / 8 / kWordLanes;
    const Words mul0 = splat_word(Philox::mul0), mul1 = splat_word(Philox::mul1);
    Words c0[groups], c1[groups], c2[groups], c3[groups];
    for (int g = 0; g < groups; ++g) {
        c3[g] = multiply(block_counters(static_cast<uint32_t>(column / 8) + g * kWordLanes), mul0);
        c1[g] = multiply(exclusive_or(upper_half(c3[g]), splat_word(keys.k1[0])), mul1);
        c0[g] = exclusive_or(upper_half(c1[g]), splat_word(row.word0_mix));
        c2[g] = exclusive_or(c3[g], splat_word(row.word2_mix));
        c3[g] = splat_word(row.word3);
    }
    for (int round = 2; round < Philox::rounds; ++round) {
        const Words k0 = splat_word(keys.k0[round]), k1 = splat_word(keys.k1[round]);
        for (int g = 0; g < groups; ++g) {
            const Words p0 = multiply(c0[g], mul0), p1 = multiply(c2[g], mul1);
            c0[g] = exclusive_or(upper_half(p1), c1[g], k0);
            c2[g] = exclusive_or(upper_half(p0), c3[g], k1);
            c1[g] = p1;
            c3[g] = p0;
        }
    }
    for (int g = 0; g < groups; ++g) {
        compare<O>(join_halves(c0[g], c1[g]), join_halves(c2[g], c3[g]), threshold, out + 2 * g);
    }
}

#else

using Threshold = uint32_t;
inline Threshold make_threshold(uint32_t t) {
    return t;
}

#endif

// One counter after the other: doubles everywhere, and floats where there is no vector multiply worth using.
template <class A>
inline void keep_columns_generic(const RoundKeys& keys, const RowState& row, int64_t column, uint32_t threshold,
                                 GenericKeep<A>* out) {
    bool keep[kDropoutColumns];
    for (int block = 0; block < kDropoutColumns / 8; ++block) {
        const uint64_t start = static_cast<uint64_t>(Philox::mul0) * static_cast<uint32_t>(column / 8 + block);
        const uint32_t word2 = static_cast<uint32_t>(start >> 32) ^ keys.k1[0];
        const uint64_t mixed = static_cast<uint64_t>(Philox::mul1) * word2;
        uint32_t c[4] = {static_cast<uint32_t>(mixed >> 32) ^ row.word0_mix, static_cast<uint32_t>(mixed),
                         static_cast<uint32_t>(start) ^ row.word2_mix, row.word3};
        for (int round = 2; round < Philox::rounds; ++round) {
            const uint64_t p0 = static_cast<uint64_t>(Philox::mul0) * c[0];
            const uint64_t p1 = static_cast<uint64_t>(Philox::mul1) * c[2];
            c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ keys.k0[round];
            c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ keys.k1[round];
            c[1] = static_cast<uint32_t>(p1);
            c[3] = static_cast<uint32_t>(p0);
        }
        for (int i = 0; i < 8; ++i) keep[block * 8 + i] = (c[i / 2] >> (i % 2 * 16) & 0xFFFFu) >= threshold;
    }
    constexpr int lanes = GenericPack<A>::lanes;
    for (int i = 0; i < kDropoutColumns / lanes; ++i) out[i] = keep_of<A>(keep + i * lanes);
}

// Dropout of a whole call, for accumulators of type A; off when seed is null.
template <class A, Order O>
struct DropoutPlan {
    using Mask = typename PackFor<A>::Keep;
    static constexpr int masks = kDropoutColumns / PackFor<A>::Pack::lanes;
    RoundKeys keys;
    Threshold threshold;
    uint32_t plain_threshold;
    RowMap rows;

    explicit DropoutPlan(const Dropout& d)
        : keys(make_round_keys(d.seed ? static_cast<uint64_t>(*d.seed) : 0)),
          threshold(make_threshold(d.threshold)),
          plain_threshold(d.threshold),
          rows(d.rows) {}

    RowState row(int64_t local) const { return RowState(keys, static_cast<uint64_t>(global_row(rows, local))); }

    void keep(const RowState& state, int64_t column, GenericKeep<double>* out) const {
        keep_columns_generic<double>(keys, state, column, plain_threshold, out);
    }
    void keep(const RowState& state, int64_t column, Keep* out) const {
#if SEQPAR_ISA_LEVEL >= 2
        keep_columns<O>(keys, state, column, threshold, out);
#else
        keep_columns_generic<float>(keys, state, column, plain_threshold, out);
#endif
    }
};

}  // namespace seqpar::cpu::SEQPAR_ISA
