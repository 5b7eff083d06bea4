// Dropout bits for the columns that a thread owns; philox.h says which bits those are.
#pragma once

#include "elements.cuh"
#include "geometry.h"
#include "philox.h"

namespace seqpar {
namespace cuda {

// Row of the unsharded tensor; local rows below 2^31.
SEQPAR_DEVICE uint64_t global_row(const RowMap& map, const Divider& divide, uint32_t row) {
    const uint32_t block = static_cast<uint32_t>(static_cast<uint64_t>(row) * divide.magic >> divide.shift);
    const uint32_t within = row - block * divide.divisor;
    return static_cast<uint64_t>(map.stride) * block + within + static_cast<uint64_t>(map.offset);
}

// Several blocks of one row, round by round: they share the key of each round, and their long chains of multiplications
// overlap. Block i is that of columns 8 * (first + i * step) ...
template <int kCount>
SEQPAR_DEVICE void philox_blocks(Bits128 (&blocks)[kCount], uint64_t seed, uint64_t row, uint32_t first,
                                 uint32_t step) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        blocks[i] = {
            {first + static_cast<uint32_t>(i) * step, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0}};
    }
#pragma unroll
    for (int round = 0; round < Philox::rounds; ++round) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            uint32_t (&c)[4] = blocks[i].word;
            const uint64_t p0 = static_cast<uint64_t>(Philox::mul0) * c[0];
            const uint64_t p1 = static_cast<uint64_t>(Philox::mul1) * c[2];
            c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
            c[1] = static_cast<uint32_t>(p1);
            c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
            c[3] = static_cast<uint32_t>(p0);
        }
        k0 += Philox::weyl0;
        k1 += Philox::weyl1;
    }
}

// Random words of a thread's units, two columns each: unit u covers the kWidth columns from
// kWidth * (thread + u * stride). Each block of 8 columns is computed by one thread. With 4 columns to a unit, two
// neighbouring lanes share a block: the even one computes that of unit u, the odd one that of unit u + 1, and they swap
// halves, so all lanes of the warp must call this together.
template <int kWidth, int kUnits>
SEQPAR_DEVICE void dropout_words(uint32_t (&words)[kUnits][kWidth / 2], uint64_t seed, uint64_t row, int thread,
                                 int stride) {
    if constexpr (kWidth == 8) {
        Bits128 blocks[kUnits];
        philox_blocks(blocks, seed, row, static_cast<uint32_t>(thread), static_cast<uint32_t>(stride));
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
            for (int i = 0; i < 4; ++i) words[u][i] = blocks[u].word[i];
        }
    } else {
        static_assert(kWidth == 4 && kUnits % 2 == 0, "a block of 8 columns is two units of two lanes");
        const bool odd = thread & 1;
        Bits128 blocks[kUnits / 2];
        const int first = (thread + (odd ? stride : 0)) / 2;
        philox_blocks(blocks, seed, row, static_cast<uint32_t>(first), static_cast<uint32_t>(stride));
#pragma unroll
        for (int u = 0; u < kUnits; u += 2) {
            const uint32_t (&mine)[4] = blocks[u / 2].word;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? mine[i] : mine[2 + i], 1);
                words[u][i] = odd ? other : mine[i];
                words[u + 1][i] = odd ? mine[2 + i] : other;
            }
        }
    }
}

// Sets dropped columns to zero. limit = (threshold << 16) - 1, so a word above it has a high half that is kept, and a
// word shifted left by 16 above it a low half. Threshold 0, which has no such limit, is not dropout but a scale.
template <int kWidth>
SEQPAR_DEVICE void drop(float (&values)[kWidth], const uint32_t (&words)[kWidth / 2], uint32_t limit) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const uint32_t word = words[i / 2];
        values[i] = (i % 2 ? word : word << 16) > limit ? values[i] : 0.0f;
    }
}

}  // namespace cuda
}  // namespace seqpar
