// The threads that work on one row: part of a warp, some warps of a CTA, a CTA, or a cluster of CTAs.
#pragma once

#include "geometry.h"
#include "ptx.cuh"

namespace seqpar {
namespace cuda {

class RowGroup {
  public:
    // scratch: scratch_bytes() of shared memory. `geometry` lies with the kernel's parameters, in constant memory: what
    // is read from there when needed takes no register.
    SEQPAR_DEVICE RowGroup(const Geometry& geometry, char* scratch) : geometry_(geometry), scratch_(scratch) {
        const int rank = clustered() ? cluster_rank() : 0;
        index = static_cast<int>(threadIdx.y);
        thread = rank * geometry.threads + static_cast<int>(threadIdx.x);
        if (clustered()) {
            if (threadIdx.x < 2) arrivals_init(arrivals(static_cast<int>(threadIdx.x)));
            cluster_barrier();  // no CTA sends to one that is not ready
        }
    }

    int index;   // which of the rows that the CTA works on side by side
    int thread;  // 0 .. stride() - 1 within the row

    SEQPAR_DEVICE int stride() const { return geometry_.threads * geometry_.cluster; }
    SEQPAR_DEVICE int first_row() const { return partial_row() * geometry_.rows + index; }
    // Which of the geometry_.partials sums over rows this thread's columns go to.
    SEQPAR_DEVICE int partial_row() const {
        return static_cast<int>(clustered() ? blockIdx.x / geometry_.cluster : blockIdx.x);
    }

    // Sums each value over the row's threads; all get the same bits. All threads of a warp must call it together.
    template <int kCount, class T>
    SEQPAR_DEVICE void sum(T (&values)[kCount]) {
        if (geometry_.threads < 32) {
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2) {
                if (offset < geometry_.threads) add_across(values, offset);
            }
            return;
        }
        add_across_warp(values);
        const int partials = stride() / 32;
        if (partials == 1) return;
        const int lane = static_cast<int>(threadIdx.x) & 31, warp = thread / 32;
        // Two buffers in turn: a thread can be one sum ahead of another, never two.
        const int turn = sums_ & 1;
        T* const buffer = reinterpret_cast<T*>(scratch_) + (turn * geometry_.rows + index) * partials * 2;
        if (clustered()) {
            if constexpr (sizeof(T) == 4) {  // the only type that is ever spread over a cluster
                if (threadIdx.x == 0) arrivals_expect(arrivals(turn), partials * kCount * 4);
                if (lane < geometry_.cluster) {
#pragma unroll
                    for (int k = 0; k < kCount; ++k) {
                        cluster_send(buffer + warp * kCount + k, arrivals(turn), lane, values[k]);
                    }
                }
                arrivals_wait(arrivals(turn), sums_ >> 1 & 1);
            }
        } else {
            if (lane == 0) {
#pragma unroll
                for (int k = 0; k < kCount; ++k) buffer[warp * kCount + k] = values[k];
            }
            named_barrier(index, geometry_.threads);
        }
        ++sums_;
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] = lane < partials ? buffer[lane * kCount + k] : T(0);
        if (partials > 32) {
#pragma unroll 1
            for (int i = lane + 32; i < partials; i += 32) {
#pragma unroll
                for (int k = 0; k < kCount; ++k) values[k] += buffer[i * kCount + k];
            }
        }
        add_across_warp(values);
    }

  private:
    // The two barriers of a clustered row, behind its two buffers
    SEQPAR_DEVICE uint64_t* arrivals(int turn) const {
        return reinterpret_cast<uint64_t*>(scratch_ + 2 * 2 * 4 * (stride() / 32)) + turn;
    }

    SEQPAR_DEVICE bool clustered() const { return kHasClusters && geometry_.cluster > 1; }

    template <int kCount, class T>
    SEQPAR_DEVICE static void add_across(T (&values)[kCount], int offset) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] += __shfl_xor_sync(0xFFFFFFFFu, values[k], offset);
    }

    template <int kCount, class T>
    SEQPAR_DEVICE static void add_across_warp(T (&values)[kCount]) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) add_across(values, offset);
    }

    const Geometry& geometry_;
    char* scratch_;
    int sums_ = 0;
};

}  // namespace cuda
}  // namespace seqpar
