// The launch geometry of a kernel over the rows: plain arithmetic, without a device.
#pragma once

#include <cstdint>

#include "seqpar.h"

namespace seqpar {
namespace cuda {

struct Geometry {
    int threads;   // of one CTA that work on the same row: a power of two below 32, else a multiple of 32
    int rows;      // that one CTA works on side by side
    int cluster;   // CTAs that work on the same row
    int units;     // vectors of the row that one thread holds
    int grid;      // CTAs, a multiple of `cluster`
    int partials;  // grid / cluster: how many sums over rows the CTAs make of each column
    int row_step;  // partials * rows
    int shared;    // bytes of dynamic shared memory
};

// The properties of a device that the planner needs.
struct Device {
    int multiprocessors;
    int shared_per_block, shared_per_multiprocessor;
    bool clusters;  // the device has them, and the code loaded for it was compiled with them
};

// The properties of a kernel that the planner needs. Its instances hold units[0] vectors a thread (preferred) and,
// unless it is 0, units[1].
struct KernelShape {
    int width;           // elements of a unit
    int units[2];        // per thread
    int max_threads[2];  // __launch_bounds__
    int column_sums;     // [cols] sums a CTA keeps in shared memory, fp32
};

constexpr int kMaxCluster = 8;                // what every device with clusters supports
constexpr int64_t kMaxPlannedRows = 1 << 30;  // row arithmetic of the planned kernels is 32-bit

// Shared memory of RowGroup: two buffers, each with up to two sums for each warp of each row, and a barrier for each
// buffer when they are filled from other CTAs.
constexpr int scratch_bytes(int threads, int rows, int cluster, int element_size) {
    const int warps = threads * cluster / 32;
    const int bytes = 2 * 2 * element_size * (warps > 1 ? warps * rows : 0) + (cluster > 1 ? 16 : 0);
    return (bytes + 15) / 16 * 16;
}

// A persistent grid that holds each row on chip. False: no such grid, the generic kernel has to do it.
bool plan_rows(Geometry& geometry, const KernelShape& shape, const Device& device, int64_t rows, int64_t cols,
               int sm_margin);

// The grid of the generic kernels, whose threads own 8 columns at a time. hold_row: fp32 (fp64) rows that fit in shared
// memory are held there. workspace_row: bytes that each CTA keeps in the workspace.
Geometry plan_generic(const Device& device, int64_t rows, int64_t cols, int element_size, bool hold_row,
                      int64_t workspace_row, int sm_margin);

// Division of a row below 2^31 by a constant, in one multiplication and one shift.
struct Divider {
    uint32_t divisor, magic, shift;
};

// A divisor of 2^31 or more gives 0 for every row.
Divider make_divider(int64_t divisor);

}  // namespace cuda
}  // namespace seqpar
