#include "geometry.h"

#include <algorithm>

namespace seqpar {
namespace cuda {
namespace {

// Threads that keep 64 registers each: what fills a multiprocessor when a kernel is compiled to hold rows.
constexpr int kThreadsAt64Registers = 1024;

// Factors on the share of busy threads. They are estimates, to be set by measurement: a multiprocessor with a single
// row idles while that row is summed; each doubling of a cluster makes the sums slower; the second instance has fewer
// loads in flight for each thread.
constexpr double kSingleRow = 0.85, kClusterDoubling = 0.95, kSecondInstance = 0.9;

constexpr int64_t kGenericWorkspace = int64_t{256} << 20;

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

int power_of_two_at_least(int64_t n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

// Threads for n vectors. At least two: with 4-column vectors two lanes share a block of dropout bits.
int threads_for(int64_t n) {
    if (n > 1 << 20) return 1 << 20;
    return n >= 32 ? static_cast<int>(ceil_div(n, 32) * 32) : std::max(2, power_of_two_at_least(n));
}

int shared_bytes(const KernelShape& shape, int choice, int threads, int rows, int cluster) {
    const int column_sums = threads * rows * shape.units[choice] * shape.width * 4 * shape.column_sums;
    return scratch_bytes(threads, rows, cluster, 4) + column_sums;
}

// CTAs of `threads` that share a multiprocessor, when the instance may take 65536 / max_threads registers a thread.
int resident(const Device& device, int threads, int max_threads, int shared) {
    const int by_threads = std::max(1, std::min(max_threads, kThreadsAt64Registers) / threads);
    const int by_shared = shared > 0 ? device.shared_per_multiprocessor / (shared + 1024) : by_threads;
    return std::max(1, std::min(by_threads, by_shared));
}

}  // namespace

bool plan_rows(Geometry& best, const KernelShape& shape, const Device& device, int64_t rows, int64_t cols,
               int sm_margin) {
    const int64_t row_units = cols / shape.width;
    const int multiprocessors = std::max(1, device.multiprocessors - std::max(0, sm_margin));
    double best_score = 0.0;
    for (int cluster = 1; cluster <= (device.clusters ? kMaxCluster : 1); cluster *= 2) {
        for (int choice = 0; choice < 2; ++choice) {
            const int max_threads = shape.max_threads[choice], units = shape.units[choice];
            if (units == 0) continue;
            const int threads = threads_for(ceil_div(row_units, int64_t{units} * cluster));
            if (threads > max_threads || (cluster > 1 && threads < 128)) continue;
            // As many rows side by side as fit, unless that would leave multiprocessors without any
            int side_by_side = cluster > 1 ? 1 : max_threads / threads;
            side_by_side = static_cast<int>(std::min<int64_t>(side_by_side, ceil_div(rows, multiprocessors)));
            const int whole_warps = std::max(1, 32 / threads);
            side_by_side = static_cast<int>(ceil_div(side_by_side, whole_warps)) * whole_warps;
            while (side_by_side > whole_warps &&
                   shared_bytes(shape, choice, threads, side_by_side, cluster) > device.shared_per_block) {
                side_by_side -= whole_warps;
            }
            const int shared = shared_bytes(shape, choice, threads, side_by_side, cluster);
            if (shared > device.shared_per_block) continue;
            const int per_multiprocessor = resident(device, threads * side_by_side, max_threads, shared);

            // The share of resident threads that have columns; with few rows, the number of threads of one row
            const double lanes = static_cast<double>(row_units) / (static_cast<double>(threads) * units * cluster);
            const int at_once = per_multiprocessor * side_by_side;
            const bool few_rows = rows < multiprocessors;
            double score = few_rows ? lanes / units : lanes * at_once * threads / max_threads;
            if (at_once == 1 && !few_rows) score *= kSingleRow;
            if (choice == 1) score *= kSecondInstance;
            for (int c = 1; c < cluster; c *= 2) score *= kClusterDoubling;
            if (score <= best_score) continue;
            best_score = score;
            best.threads = threads;
            best.rows = side_by_side;
            best.cluster = cluster;
            best.units = units;
            best.shared = shared;
            const int64_t slots = std::max(1, multiprocessors * per_multiprocessor / cluster);
            best.partials = static_cast<int>(std::min(slots, std::max<int64_t>(1, ceil_div(rows, side_by_side))));
            best.grid = best.partials * cluster;
            best.row_step = best.partials * side_by_side;
        }
    }
    return best_score > 0.0;
}

Geometry plan_generic(const Device& device, int64_t rows, int64_t cols, int element_size, bool hold_row,
                      int64_t workspace_row, int sm_margin) {
    constexpr int kThreads = 256;
    const int multiprocessors = std::max(1, device.multiprocessors - std::max(0, sm_margin));
    const int64_t owners = ceil_div(cols, 8);  // of 8 columns
    Geometry g{};
    g.threads = owners >= kThreads ? kThreads : threads_for(owners);
    g.rows = std::max(1, (workspace_row > 0 ? 32 : kThreads) / g.threads);
    g.cluster = 1;
    g.units = 1;
    const int scratch = scratch_bytes(g.threads, g.rows, 1, element_size);
    const int64_t held = ceil_div(cols, 8) * 8 * g.rows * element_size;
    g.shared = scratch;
    if (hold_row && scratch + held <= device.shared_per_block) g.shared += static_cast<int>(held);
    int64_t grid = int64_t{multiprocessors} * resident(device, g.threads * g.rows, 1024, g.shared);
    grid = std::min(grid, ceil_div(rows, g.rows));
    if (workspace_row > 0) {  // each row side by side has its own sums
        grid = std::min(grid, std::max<int64_t>(8, kGenericWorkspace / (workspace_row * g.rows)));
    }
    g.partials = g.grid = static_cast<int>(std::max<int64_t>(1, grid));
    g.row_step = g.partials * g.rows;
    return g;
}

Divider make_divider(int64_t divisor) {
    if (divisor >= int64_t{1} << 31) return {0, 0, 0};
    const uint64_t d = static_cast<uint64_t>(std::max<int64_t>(1, divisor));
    uint32_t shift = 0;
    while (uint64_t{1} << shift < d) ++shift;
    // ceil(2^(31 + shift) / d) < 2^32 is exact for rows below 2^31 (Granlund and Montgomery, PLDI 1994).
    const uint64_t magic = ((uint64_t{1} << (31 + shift)) + d - 1) / d;
    return {static_cast<uint32_t>(d), static_cast<uint32_t>(magic), 31 + shift};
}

}  // namespace cuda
}  // namespace seqpar
