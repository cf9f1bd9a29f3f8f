// Vec: `width` fp32 lanes of the instruction set this file is compiled for, and exp() on them.
//
// max(a, b) and min(a, b) return b where either is NaN, as the x86 instructions do.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#    include "cpu/vec_avx512.h"
#elif defined(__AVX2__)
#    include "cpu/vec_avx2.h"
#else
#    include "cpu/vec_scalar.h"
#endif

namespace mooring {
namespace MOORING_ISA {
namespace {

// exp(x) to about 1 ulp for x in [-87.3, 88.3]; 0 below, +inf above, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a degree-6 polynomial for exp(r) (coefficients of Cephes expf).
inline Vec exp(Vec x) {
    const Vec lowest = Vec::broadcast(-87.3f), highest = Vec::broadcast(88.3f);
    const Vec inside = min(highest, max(lowest, x));  // x is the second argument, so that a NaN stays one
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
    const Vec magic = Vec::broadcast(12582912.0f);
    const Vec shifted = fma(inside, Vec::broadcast(1.44269504f), magic);
    const Vec n = shifted - magic;
    Vec r = fma(n, Vec::broadcast(-0.693359375f), inside);
    r = fma(n, Vec::broadcast(2.12194440e-4f), r);
    Vec p = Vec::broadcast(1.9875691500e-4f);
    p = fma(p, r, Vec::broadcast(1.3981999507e-3f));
    p = fma(p, r, Vec::broadcast(8.3334519073e-3f));
    p = fma(p, r, Vec::broadcast(4.1665795894e-2f));
    p = fma(p, r, Vec::broadcast(1.6666665459e-1f));
    p = fma(p, r, Vec::broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r + Vec::broadcast(1.0f));
    const Vec result = scale_by_power_of_two(p, shifted);
    const Vec bounded = select_less(highest, x, Vec::broadcast(__builtin_inff()), result);
    return select_less(x, lowest, Vec::broadcast(0.0f), bounded);
}

}  // namespace
}  // namespace MOORING_ISA
}  // namespace mooring
