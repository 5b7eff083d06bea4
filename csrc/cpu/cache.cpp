// The size of the last-level cache, and which results are stored past it.
#include <atomic>
#include <cstdio>

#include "kernels.h"

namespace seqpar::cpu {
namespace {

// The number that a file about a cache of the first CPU begins with; 0 where there is none.
int64_t cache_number(int index, const char* name) {
    char path[64];
    std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, name);
    std::FILE* const file = std::fopen(path, "r");
    if (!file) return 0;
    long long number = 0;  // of KiB in "32768K"
    if (std::fscanf(file, "%lld", &number) != 1) number = 0;
    std::fclose(file);
    return number;
}

// The size of one cache, from the files of the Linux kernel. On some machines sysconf(_SC_LEVEL3_CACHE_SIZE) returns
// the sum over the caches of a socket.
int64_t cache_bytes() {
    int64_t largest = 0;
    for (int index = 0; index < 8; ++index) {
        if (cache_number(index, "level") < 3) continue;  // a hypervisor may hide what lies behind the second
        const int64_t bytes = cache_number(index, "size") * 1024;
        if (bytes > largest) largest = bytes;
    }
    constexpr int64_t usual = int64_t{32} << 20;
    return largest > 0 ? largest : usual;
}

// Half of the cache is for results, since the data that a call reads goes through it too. Measured on one 32 MiB cache
// with a reader right after the norm: for results above a third of the cache, stores past it make both together faster.
// Threads on several caches have more room than this bound; ranks that share a cache have less.
std::atomic<int64_t>& most_cached() {
    static std::atomic<int64_t> most{cache_bytes() / 2};
    return most;
}

}  // namespace

bool exceeds_cache(int64_t bytes) {
    return bytes > most_cached().load(std::memory_order_relaxed);
}

int64_t stream_beyond(int64_t bytes) {
    return most_cached().exchange(bytes, std::memory_order_relaxed);
}

}  // namespace seqpar::cpu
