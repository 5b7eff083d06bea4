// Declarations shared by dispatch.cpp, the threads and the kernels of each instruction set. Nothing here is inline.
#pragma once

#include <cstddef>
#include <cstdint>

#include "seqpar.h"

namespace seqpar::cpu {

// Runs task 0 .. count - 1 on up to `threads` workers, on the calling thread alone where that is one. `worker` is
// unique among the tasks in flight and smaller than `threads`. Any worker may take any task: no result may depend on
// the worker.
using Task = void (*)(const void* context, int64_t task, int worker);
void parallel(int64_t count, int threads, Task run, const void* context);

// The number of threads, at most `threads`, that this many elements are worth.
int useful_threads(int64_t elements, int threads);

// Whether this many bytes of results are assumed to leave the last-level cache before they are read.
bool exceeds_cache(int64_t bytes);

// 64-byte aligned memory for one call; null where allocation fails. Small blocks are kept for the next call.
class Scratch {
  public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
    bool owned_;
};

// Column sums are computed over `count` runs of `rows` rows each and added run by run. Both depend on the shape only.
struct RowRuns {
    int64_t count, rows;
};
RowRuns row_runs(int64_t rows, int64_t cols);
int64_t padded_columns(int64_t cols);  // a multiple of every Pack

// The [cols] gradients of a backward: dweight, dbias, dweight2, dbias2, dx_bias.
constexpr int kVectorGrads = 5;

#define SEQPAR_DECLARE_KERNELS(ISA)                                        \
    namespace ISA {                                                        \
    Status norm_forward(const NormForward& args, int threads);             \
    Status norm_backward(const NormBackward& args, int threads);           \
    Status reduce_shards(const ReduceShards& args, int threads);           \
    Status attention_forward(const AttentionForward& args, int threads);   \
    Status attention_backward(const AttentionBackward& args, int threads); \
    Status attention_merge(const AttentionMerge& args, int threads);       \
    }
#if defined(SEQPAR_X86)
SEQPAR_DECLARE_KERNELS(avx512)
SEQPAR_DECLARE_KERNELS(avx2)
#endif
#if defined(SEQPAR_NEON)
SEQPAR_DECLARE_KERNELS(neon)
#else
SEQPAR_DECLARE_KERNELS(baseline)
#endif
#undef SEQPAR_DECLARE_KERNELS

}  // namespace seqpar::cpu
