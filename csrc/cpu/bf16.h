// bfloat16 storage, converted by hand: no compiler support is needed.
#pragma once

#include <cstdint>
#include <cstring>

namespace mooring {
namespace MOORING_ISA {
namespace {

struct Bf16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float widen(Bf16 x) {
    return float_of(static_cast<uint32_t>(x.bits) << 16);
}

// To nearest, ties to even; a NaN stays a quiet NaN.
inline Bf16 narrow(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace
}  // namespace MOORING_ISA
}  // namespace mooring
