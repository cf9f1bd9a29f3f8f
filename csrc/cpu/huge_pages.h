// Fresh memory for a large result. The kernel hands it over page by page at the first write, which at 4 KiB
// each costs several times what the writing does.
#pragma once

#include <cstdint>

#if defined(__linux__)
#    include <sys/mman.h>
#endif

namespace mooring {

// Asks for pages of 2 MiB where a result has a mapping of its own (glibc: every allocation above 32 MiB), so
// that no other memory is touched by the wish. Only a wish: what the system says to it does not matter.
inline void prefer_huge_pages(void* result, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kMapped = 32 * 1024 * 1024;
    constexpr uintptr_t kPage = 2 * 1024 * 1024;
    if (bytes <= kMapped) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(result) + kPage - 1) / kPage * kPage;
    const uintptr_t end =
        (reinterpret_cast<uintptr_t>(result) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)result;
    (void)bytes;
#endif
}

}  // namespace mooring
