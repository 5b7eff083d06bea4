// The threads of the kernels: the OpenMP team that torch has started, so that the kernels' threads do not compete with
// torch's; plain threads without OpenMP. Nothing here links OpenMP; the runtime is found by name.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace seqpar::cpu {
namespace {

// The entry point gcc compiles `#pragma omp parallel` to; libgomp, LLVM's and Intel's libomp all have it.
using GompParallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

// The threads of a team do not survive fork(), and the runtime would wait for them for ever: a forked child uses plain
// threads instead.
std::atomic<bool> forked{false};

GompParallel gomp_parallel() {
    static const GompParallel found = [] {
        pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
        return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    }();
    return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

struct Job {
    int64_t count;
    Task run;
    const void* context;
    std::atomic<int64_t> next_task{0};
    std::atomic<int> next_worker{0};
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int worker = job.next_worker.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
        const int64_t task = job.next_task.fetch_add(1, std::memory_order_relaxed);
        if (task >= job.count) return;
        job.run(job.context, task, worker);
    }
}

void run_on_plain_threads(Job& job, int threads) {
    std::vector<std::thread> team;
    try {
        team.reserve(static_cast<size_t>(threads) - 1);
        while (static_cast<int>(team.size()) < threads - 1) team.emplace_back(work, &job);
    } catch (const std::exception&) {
        // No more threads can be started: this thread and those that started do the work.
    }
    work(&job);
    for (std::thread& thread : team) thread.join();
}

constexpr size_t kKeptScratch = size_t{1} << 20;

struct Block {
    void* data = nullptr;
    size_t size = 0;
    bool busy = false;
    ~Block() { std::free(data); }
};
thread_local Block kept;

}  // namespace

void parallel(int64_t count, int threads, Task run, const void* context) {
    if (count < threads) threads = static_cast<int>(count);
    if (threads <= 1) {
        for (int64_t task = 0; task < count; ++task) run(context, task, 0);
        return;
    }
    Job job{count, run, context};
    if (const GompParallel team = gomp_parallel()) {
        team(work, &job, static_cast<unsigned>(threads), 0);
    } else {
        run_on_plain_threads(job, threads);
    }
}

int useful_threads(int64_t elements, int threads) {
    constexpr int64_t worthwhile = 16384;  // elements a thread: some 10 us, about what waking a thread costs
    const int64_t most = elements / worthwhile;
    return most <= 1 || threads <= 1 ? 1 : static_cast<int>(most < threads ? most : threads);
}

Scratch::Scratch(size_t bytes) : data_(nullptr), owned_(false) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes <= kKeptScratch && !kept.busy) {
        if (kept.size < bytes) {
            std::free(kept.data);
            kept.data = std::aligned_alloc(64, bytes);
            kept.size = kept.data ? bytes : 0;
        }
        kept.busy = kept.data != nullptr;
        data_ = kept.data;
    } else {
        data_ = std::aligned_alloc(64, bytes);
        owned_ = true;
    }
}

Scratch::~Scratch() {
    if (owned_) {
        std::free(data_);
    } else {
        kept.busy = false;
    }
}

const char* threading() {
    return gomp_parallel() ? "openmp" : "std::thread";
}

}  // namespace seqpar::cpu
