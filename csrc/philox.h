// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) and the bits that dropout uses:
// key = (seed low, seed high), counter = (column / 8, row low, row high, 0). Column c has 16 bits of word (c % 8) / 2:
// the low half when c is even, the high half when odd. A mask depends on (seed, row, column) only, so that it is the
// same on every device and for every sharding, and need not be stored.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SEQPAR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SEQPAR_HOST_DEVICE inline
#endif

namespace seqpar {

struct Philox {
    static constexpr uint32_t mul0 = 0xD2511F53u, mul1 = 0xCD9E8D57u;
    static constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;
    static constexpr int rounds = 10;
};

struct Bits128 {
    uint32_t word[4];
};

SEQPAR_HOST_DEVICE Bits128 philox(uint64_t seed, uint64_t row, uint32_t column_block) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = column_block, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
    for (int round = 0; round < Philox::rounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(Philox::mul0) * c0;
        const uint64_t p1 = static_cast<uint64_t>(Philox::mul1) * c2;
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        k0 += Philox::weyl0;
        k1 += Philox::weyl1;
    }
    return {{c0, c1, c2, c3}};
}

// The 16 bits of column c, given the block of column c / 8.
SEQPAR_HOST_DEVICE uint32_t dropout_bits(const Bits128& block, int c) {
    return (block.word[(c & 7) >> 1] >> ((c & 1) * 16)) & 0xFFFFu;
}

}  // namespace seqpar
