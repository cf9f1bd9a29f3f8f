#include "cpu/capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mooring {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

Capability parse(const std::string& name, const std::string& source) {
    std::string listed;
    for (Capability capability : available_capabilities()) {
        if (name == name_of(capability)) return capability;
        if (!listed.empty()) listed += ", ";
        listed += name_of(capability);
    }
    throw std::invalid_argument(source + " must be one that this build and this CPU have (" + listed +
                                "); got '" + name + "'");
}

}  // namespace

const char* name_of(Capability capability) {
    switch (capability) {
        case Capability::avx512:
            return "avx512";
        case Capability::avx2:
            return "avx2";
        default:
            return "scalar";
    }
}

std::vector<Capability> available_capabilities() {
    std::vector<Capability> found{Capability::scalar};
#ifdef MOORING_X86
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx2")) {
        found.push_back(Capability::avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            found.push_back(Capability::avx512);
        }
    }
#endif
    return found;
}

Capability active_capability() {
    const int current = chosen.load(std::memory_order_relaxed);
    if (current != kUnset) return static_cast<Capability>(current);
    const char* requested = std::getenv("MOORING_CPU");
    const bool set = requested != nullptr && *requested != '\0';
    const Capability capability = set ? parse(requested, "MOORING_CPU") : available_capabilities().back();
    chosen.store(static_cast<int>(capability), std::memory_order_relaxed);
    return capability;
}

void set_capability(const std::string& name) {
    chosen.store(static_cast<int>(parse(name, "the CPU capability")), std::memory_order_relaxed);
}

}  // namespace mooring
