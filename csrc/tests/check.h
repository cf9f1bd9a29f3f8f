// A test program is a main() that calls begin(), then CHECKs; the first failure ends it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu/capability.h"
#include "cpu/ops.h"
#include "cpu/row_pointer.h"

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)

#define CHECK_NEAR(actual, expected, tolerance)                                                            \
    do {                                                                                                   \
        const double check_got = (actual), check_want = (expected), check_allowed = (tolerance);           \
        if (!(std::fabs(check_got - check_want) <= check_allowed)) {                                       \
            std::fprintf(stderr, "%s:%d: %s = %.9g, expected %.9g +- %.3g\n", __FILE__, __LINE__, #actual, \
                         check_got, check_want, check_allowed);                                            \
            std::exit(1);                                                                                  \
        }                                                                                                  \
    } while (false)

namespace check {

constexpr double kUlp = 1.2e-7;  // spacing of fp32 numbers around 1
constexpr int kThreads = 3;
constexpr int kSkipped = 77;

// Ends the program as skipped where the CPU lacks the capability that MOORING_CPU asks for.
inline void begin() {
    try {
        std::printf("capability: %s\n", mooring::name_of(mooring::active_capability()));
    } catch (const std::invalid_argument& error) {
        std::printf("skipped: %s\n", error.what());
        std::exit(kSkipped);
    }
}

inline float nan() {
    return std::nanf("");
}

// Fresh results start as NaN, so that an element which is not written shows.
inline std::vector<float> unwritten(int64_t size) {
    return std::vector<float>(static_cast<size_t>(size), nan());
}

inline std::vector<float> normal(int64_t size, unsigned seed, float spread = 1.0f) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> draw(0.0f, spread);
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = draw(generator);
    return values;
}

inline uint32_t bits(float x) {
    uint32_t result;
    std::memcpy(&result, &x, sizeof result);
    return result;
}

// Truncates to bf16: the values become exactly representable.
inline std::vector<uint16_t> to_bf16(std::vector<float>& values) {
    std::vector<uint16_t> stored;
    for (float& value : values) {
        stored.push_back(static_cast<uint16_t>(bits(value) >> 16));
        const uint32_t widened = static_cast<uint32_t>(stored.back()) << 16;
        std::memcpy(&value, &widened, sizeof value);
    }
    return stored;
}

inline float from_bf16(uint16_t stored) {
    const uint32_t widened = static_cast<uint32_t>(stored) << 16;
    float value;
    std::memcpy(&value, &widened, sizeof value);
    return value;
}

// Element `at` of a result that was written as bf16 into memory allocated as fp32.
inline float bf16_at(const std::vector<float>& memory, size_t at) {
    uint16_t stored;
    std::memcpy(&stored, reinterpret_cast<const char*>(memory.data()) + at * sizeof stored, sizeof stored);
    return from_bf16(stored);
}

inline double norm(const float* row, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += static_cast<double>(row[i]) * row[i];
    return std::sqrt(total);
}

}  // namespace check
