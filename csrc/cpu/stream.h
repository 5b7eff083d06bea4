// Stores past the cache. An ordinary store first reads the line that it changes. Where the results of a call do not fit
// in the cache, this costs one more read of every byte written, and evicts data that other rows still need.
#pragma once

#include "loops.h"

namespace seqpar::cpu::SEQPAR_ISA {

// Whether this row can be stored past the cache: streaming stores need whole, aligned vectors.
inline bool streamable(const void* row) {
    return kStreams && reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0;
}

template <Order O, class T, class P>
inline void put(T* p, P x, Whole whole, bool past_cache) {
    if (kStreams && past_cache) {
        stream<O>(p, x);
    } else {
        store<O>(p, x, whole);
    }
}
template <Order O, class T, class P>
inline void put(T* p, P x, int n, bool) {
    store<O>(p, x, n);
}

// The value that a load of x would give after put(), computed without reading memory that was streamed to.
template <Order O, class T, class P>
inline P as_stored(const T* p, P x, Whole whole, bool past_cache) {
    if (kStreams && past_cache) {
        T copy[P::lanes];
        store<O>(static_cast<T*>(copy), x, whole);
        return load<O>(static_cast<const T*>(copy), whole);
    }
    return load<O>(p, whole);
}
template <Order O, class T, class P>
inline P as_stored(const T* p, P, int n, bool) {
    return load<O>(p, n);
}

}  // namespace seqpar::cpu::SEQPAR_ISA
