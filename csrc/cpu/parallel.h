#pragma once

#include <cstdint>

namespace mooring {

// How many of `threads` are worth waking for this many elements: each should get some 10 microseconds of
// work.
inline int useful_threads(int threads, int64_t elements) {
    constexpr int64_t kElementsPerThread = 16 * 1024;
    const int64_t useful = 1 + elements / kElementsPerThread;
    return useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace mooring
