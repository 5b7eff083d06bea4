// The vector layer of the instruction set this translation unit is compiled for: SEQPAR_ISA names its namespace,
// SEQPAR_ISA_LEVEL (3: AVX-512, 2: AVX2, 0: baseline) picks the header. A Pack is the unit of all loops.
#pragma once

#include "types.h"

#if SEQPAR_ISA_LEVEL == 3
#include "simd_avx512.h"
#include "simd_generic.h"
#elif SEQPAR_ISA_LEVEL == 2
#include "simd_avx2.h"
#include "simd_generic.h"
#else
namespace seqpar::cpu::SEQPAR_ISA {
constexpr int kVectorBytes = 16;
constexpr bool kStreams = false;
}  // namespace seqpar::cpu::SEQPAR_ISA
#include "simd_baseline.h"
#endif

namespace seqpar::cpu::SEQPAR_ISA {

template <class A>
struct PackFor {
    using Pack = SEQPAR_ISA::Pack;
    using Keep = SEQPAR_ISA::Keep;
};
template <>
struct PackFor<double> {
    using Pack = GenericPack<double>;
    using Keep = GenericKeep<double>;
};

}  // namespace seqpar::cpu::SEQPAR_ISA
