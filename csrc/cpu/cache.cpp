// The size of the last-level cache, and which results are stored past it.
#include <atomic>
#include <cstdio>

#include "kernels.h"

namespace seqpar::cpu {
namespace {

// The kernel's word for it: of one cache. sysconf(_SC_LEVEL3_CACHE_SIZE) gives the sum over a socket's on some
// machines.
int64_t cache_bytes() {
    int64_t largest = 0;
    for (int index = 0; index < 8; ++index) {
        char path[64];
        std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
        std::FILE* const file = std::fopen(path, "r");
        if (!file) break;
        long long kib = 0;
        if (std::fscanf(file, "%lldK", &kib) == 1 && kib * 1024 > largest) largest = kib * 1024;
        std::fclose(file);
    }
    constexpr int64_t usual = int64_t{32} << 20;
    return largest > 0 ? largest : usual;
}

// What a call reads goes through the cache as well, so results have half of it. Measured with a reader right behind the
// norm: from there on, stores past the cache make the two together faster.
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
