#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

// The device the shim pretends to be; set by shim_configure.
struct {
    int multiprocessors = 4;
    int major = 9;
    int shared_per_block = 232448, shared_per_multiprocessor = 233472;
    bool reverse = false;  // another order of the threads: the same results, unless a barrier is missing
} device;

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kMaxThreads = 1024 * 8;  // a cluster of 8

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "cuda_shim: %s (block %u,%u thread %u,%u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x,
                 threadIdx.y);
    std::abort();
}

// ---- Fibers -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what the ABI asks a function to keep, and goes on where the other stack left off.
extern "C" void shim_switch(void** save, void* restore);
asm(R"(
.text
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch, .-shim_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void start(char* stack, void (*entry)()) {
        auto** top = reinterpret_cast<void**>(stack + kStackBytes);
        *--top = nullptr;  // keeps the stack aligned as a call would leave it
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer = top;
    }
    static void change(Context& from, Context& to) { shim_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;

    void start(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Barrier {
    int arrived = 0, expected = 0;
    uint64_t generation = 0;
};

struct Warp {
    uint64_t values[32];
    const char* what = nullptr;
    Barrier entry, exit;
    int size = 0;
};

struct Block {
    dim3 index;
    int rank = 0;
    std::unique_ptr<char[]> shared;
    Barrier named[16];  // the first is that of __syncthreads, too
    std::vector<Warp> warps;
    int running = 0;
};

struct Fiber {
    Context context;
    dim3 thread;
    int linear = 0;
    Block* block = nullptr;
    bool done = false;
};

Context scheduler;
std::vector<Fiber> fibers;
std::vector<Block> blocks;
Barrier cluster;
Fiber* current = nullptr;
const std::function<void()>* kernel_body = nullptr;
size_t shared_bytes = 0;
uint64_t progress = 0;

void entry_point() {
    (*kernel_body)();
    current->done = true;
    ++progress;
    --current->block->running;
    Context::change(current->context, scheduler);
    fail("a finished thread was resumed");
}

// Until `count` threads have come.
void wait(Barrier& barrier, int count) {
    const uint64_t generation = barrier.generation;
    ++progress;
    if (barrier.arrived > 0 && barrier.expected != count) fail("threads meet at one barrier with different counts");
    barrier.expected = count;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) Context::change(current->context, scheduler);
}

Warp& warp_of(const Fiber& fiber) {
    return fiber.block->warps[static_cast<size_t>(fiber.linear) / 32];
}

char* stacks() {
    static char* const memory = [] {
        void* const p = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fail("no memory for stacks");
        return static_cast<char*>(p);
    }();
    return memory;
}

dim3 unravel(unsigned i, const dim3& extent) {
    return dim3(i % extent.x, i / extent.x % extent.y, i / extent.x / extent.y);
}

// Blocks first .. first + count - 1, side by side.
void run_blocks(unsigned first, unsigned count) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    blocks.clear();
    blocks.resize(count);
    fibers.clear();
    fibers.resize(count * static_cast<size_t>(threads));
    cluster = Barrier{};
    for (unsigned b = 0; b < count; ++b) {
        Block& block = blocks[b];
        block.index = unravel(first + b, gridDim);
        block.rank = static_cast<int>(b);
        block.running = threads;
        // Aligned as on a device, and full of NaN, as whatever ran before might leave it
        block.shared.reset(new char[shared_bytes + 16]);
        std::memset(block.shared.get(), 0xFF, shared_bytes + 16);
        block.warps.resize(static_cast<size_t>(threads + 31) / 32);
        for (int t = 0; t < threads; ++t) {
            Fiber& fiber = fibers[b * static_cast<size_t>(threads) + static_cast<size_t>(t)];
            fiber.thread = unravel(static_cast<unsigned>(t), blockDim);
            fiber.linear = t;
            fiber.block = &block;
            ++warp_of(fiber).size;
        }
    }
    for (size_t i = 0; i < fibers.size(); ++i) fibers[i].context.start(stacks() + i * kStackBytes, entry_point);

    size_t left = fibers.size();
    const auto turn = [&](Fiber& fiber) {
        if (fiber.done) return;
        current = &fiber;
        threadIdx = fiber.thread;
        blockIdx = fiber.block->index;
        Context::change(scheduler, fiber.context);
        if (fiber.done) --left;
    };
    while (left > 0) {
        const uint64_t before = progress;
        if (device.reverse) {  // the last warp first, and each warp as far as it gets alone
            for (size_t end = fibers.size(); end > 0;) {
                const size_t begin = (end - 1) / 32 * 32;
                for (uint64_t last = progress - 1; last != progress;) {
                    last = progress;
                    for (size_t i = end; i > begin; --i) turn(fibers[i - 1]);
                }
                end = begin;
            }
        } else {
            for (Fiber& fiber : fibers) turn(fiber);
        }
        if (left > 0 && progress == before) fail("deadlock: threads wait for others that never come");
    }
    current = nullptr;
}

struct {
    std::set<const void*> seen, raised;  // raised: may have more than 48 KiB of shared memory
} launches;

}  // namespace

void __syncthreads() {
    wait(current->block->named[0], current->block->running);
}
void __syncwarp(unsigned) {
    wait(warp_of(*current).entry, warp_of(*current).size);
}

namespace shim {

int lane() {
    return current->linear % 32;
}

uint64_t exchange(uint64_t value, int source, const char* what) {
    Warp& warp = warp_of(*current);
    if (warp.size != 32) fail("a shuffle in a warp that is not whole");
    if (warp.entry.arrived == 0) warp.what = what;
    if (std::strcmp(warp.what, what) != 0) fail("lanes of a warp meet in different shuffles");
    warp.values[lane()] = value;
    wait(warp.entry, warp.size);
    const uint64_t result = warp.values[source];
    wait(warp.exit, warp.size);
    return result;
}

unsigned ballot(bool predicate) {
    Warp& warp = warp_of(*current);
    warp.values[lane()] = predicate;
    wait(warp.entry, warp.size);
    unsigned result = 0;
    for (int i = 0; i < warp.size; ++i) result |= static_cast<unsigned>(warp.values[i]) << i;
    wait(warp.exit, warp.size);
    return result;
}

char* dynamic_shared() {
    char* const base = current->block->shared.get();
    return base + (16 - reinterpret_cast<uintptr_t>(base) % 16) % 16;
}

void named_barrier(int id, int threads) {
    if (id < 0 || id > 15) fail("there are 16 barriers");
    if (threads % 32 != 0) fail("a barrier takes whole warps");
    wait(current->block->named[id], threads);
}

int cluster_rank() {
    return current->block->rank;
}
void cluster_barrier() {
    wait(cluster, static_cast<int>(fibers.size()));
}

namespace {

// The 8 bytes of a barrier in shared memory.
struct Arrivals {
    int32_t bytes;  // expected and not arrived; negative while they come before they are expected
    uint16_t pending;
    uint16_t phase;
};

void complete(Arrivals& barrier) {
    ++progress;
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.pending = 1;
    barrier.phase ^= 1;
}

template <class T>
T* in_cluster(T* local, int rank) {
    Block& other = blocks.at(static_cast<size_t>(rank));
    if (other.running == 0) fail("shared memory of a CTA that has ended");
    const auto offset = reinterpret_cast<char*>(local) - dynamic_shared();
    if (offset < 0 || static_cast<size_t>(offset) >= shared_bytes) fail("not in shared memory");
    char* const base = other.shared.get();
    return reinterpret_cast<T*>(base + (16 - reinterpret_cast<uintptr_t>(base) % 16) % 16 + offset);
}

}  // namespace

void arrivals_init(uint64_t* barrier) {
    *reinterpret_cast<Arrivals*>(barrier) = {0, 1, 0};
}

void arrivals_expect(uint64_t* barrier, int bytes) {
    auto& arrivals = *reinterpret_cast<Arrivals*>(barrier);
    if (arrivals.pending == 0) fail("a second arrival at a barrier that expects one");
    --arrivals.pending;
    arrivals.bytes += bytes;
    complete(arrivals);
}

void arrivals_wait(uint64_t* barrier, int parity) {
    const auto* const arrivals = reinterpret_cast<volatile Arrivals*>(barrier);
    while (arrivals->phase == parity) Context::change(current->context, scheduler);
    ++progress;
}

void cluster_send(float* local, uint64_t* barrier, int rank, float value) {
    *in_cluster(local, rank) = value;
    auto& arrivals = *reinterpret_cast<Arrivals*>(in_cluster(barrier, rank));
    arrivals.bytes -= 4;
    complete(arrivals);
}

void misaligned(const void*, size_t) {
    fail("misaligned vector access");
}

uint16_t bf16_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

uint16_t f16_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return 0x7FFF;
    if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above round to infinity
    if (bits < 0x38800000u) {                                               // subnormal: steps of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 16777216.0f)));
    }
    bits += 0xFFFu + (bits >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}

float f16_value(uint16_t half) {
    const float sign = half & 0x8000u ? -1.0f : 1.0f;
    const int exponent = half >> 10 & 31, mantissa = half & 0x3FF;
    if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                 : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    unsigned side_by_side = 1;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) side_by_side = config.attrs[i].val.clusterDim.x;
    }
    const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
    const unsigned total = config.gridDim.x * config.gridDim.y * config.gridDim.z;
    const bool large = config.dynamicSmemBytes > 48 * 1024 && launches.raised.count(kernel) == 0;
    if (threads == 0 || threads > 1024 || total == 0 || config.gridDim.y > 65535 || total % side_by_side != 0 ||
        (side_by_side > 1 && device.major < 9) || side_by_side > 8 || large ||
        config.dynamicSmemBytes > static_cast<size_t>(device.shared_per_block)) {
        return cudaErrorInvalidConfiguration;
    }
    launches.seen.insert(kernel);
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    shared_bytes = config.dynamicSmemBytes;
    kernel_body = &body;
    for (unsigned first = 0; first < total; first += side_by_side) run_blocks(first, side_by_side);
    return cudaSuccess;
}

}  // namespace shim

cudaError_t cudaGetDevice(int* ordinal) {
    // Another device for each capability, so that nothing cached for one is used for another
    *ordinal = device.major * 4 + device.multiprocessors % 4;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = device.multiprocessors;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = device.shared_per_block;
            break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = device.shared_per_multiprocessor;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = device.major;
    }
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value > device.shared_per_block) return cudaErrorInvalidValue;
    launches.raised.insert(kernel);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->ptxVersion = device.major * 10;
    return cudaSuccess;
}

// ---- For the tests, through ctypes --------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) void shim_configure(int multiprocessors, int major, int reverse) {
    device.multiprocessors = multiprocessors;
    device.major = major;
    device.shared_per_block = major >= 9 ? 232448 : 166912;
    device.shared_per_multiprocessor = device.shared_per_block + 1024;
    device.reverse = reverse != 0;
}

// Addresses, relative to the module's own, of the kernels (template instances) that have run; returns how many.
extern "C" __attribute__((visibility("default"))) int shim_kernels_run(uint64_t* addresses, int room) {
    int count = 0;
    for (const void* kernel : launches.seen) {
        Dl_info module;
        if (count < room && dladdr(kernel, &module) != 0) {
            const auto base = static_cast<const char*>(module.dli_fbase);
            addresses[count++] = static_cast<uint64_t>(static_cast<const char*>(kernel) - base);
        }
    }
    return count;
}

// None has run.
extern "C" __attribute__((visibility("default"))) void shim_forget_kernels() {
    launches.seen.clear();
}
