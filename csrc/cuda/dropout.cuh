// Dropout bits for the columns that a thread owns; philox.h says which bits those are.
#pragma once

#include "elements.cuh"
#include "geometry.h"
#include "philox.h"

namespace seqpar {
namespace cuda {

// Row of the unsharded tensor; local rows below 2^31.
SEQPAR_DEVICE uint64_t global_row(const RowMap& map, const Divider& divide, int64_t row) {
    const uint32_t local = static_cast<uint32_t>(row);
    const uint32_t block = static_cast<uint32_t>(static_cast<uint64_t>(local) * divide.magic >> divide.shift);
    const int64_t within = row - static_cast<int64_t>(block) * map.block;
    return static_cast<uint64_t>(block * map.stride + within + map.offset);
}

// Units that share a block of 8 columns' worth of random bits in dropout_words.
template <int kWidth>
constexpr int kUnitsPerBlock = 8 / kWidth;

// Random words, two columns each, of units u .. u + kUnitsPerBlock - 1 of this thread: unit u covers the kWidth columns
// from kWidth * (thread + u * stride). Each block of 8 columns is computed by one thread. With 4 columns to a unit, two
// neighbouring lanes share a block: the even one computes that of unit u, the odd one that of unit u + 1, and they swap
// halves, so all lanes of the warp must call this together.
template <int kWidth>
SEQPAR_DEVICE void dropout_words(uint32_t (&words)[kUnitsPerBlock<kWidth>][kWidth / 2], uint64_t seed, uint64_t row,
                                 int thread, int stride, int u) {
    if constexpr (kWidth == 8) {
        const Bits128 block = philox(seed, row, static_cast<uint32_t>(thread + u * stride));
#pragma unroll
        for (int i = 0; i < 4; ++i) words[0][i] = block.word[i];
    } else {
        static_assert(kWidth == 4, "a block of 8 columns is two units of two lanes");
        const bool odd = thread & 1;
        const int mine = thread + (odd ? u + 1 : u) * stride;
        const Bits128 block = philox(seed, row, static_cast<uint32_t>(mine) / 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? block.word[i] : block.word[2 + i], 1);
            words[0][i] = odd ? other : block.word[i];
            words[1][i] = odd ? block.word[2 + i] : other;
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
