// What problems laid out one per lane need beyond Vec's arithmetic: transposes, masks of lanes, 1 / x and
// log.
#pragma once

#include "cpu/vec.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

#if defined(__AVX512F__)

// Bit l is set where a < b in lane l; no bit for NaN.
inline uint32_t less_mask(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
}
// 1 / x to about 1 ulp, for x and 1 / x normal
inline Vec reciprocal(Vec x) {
    const Vec r = {_mm512_rcp14_ps(x.v)};
    return r * (Vec::broadcast(2.0f) - x * r);
}
// x = mantissa 2^exponent with mantissa in [1, 2), for normal x > 0
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
    mantissa->v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    exponent->v = _mm512_getexp_ps(x.v);
}
// rows[l] lane j <-> rows[j] lane l
inline void transpose(Vec* rows) {
    __m512 r[16], t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        const auto pd = [&](int j) { return _mm512_castps_pd(t[i + j]); };
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(0), pd(2)));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(0), pd(2)));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(1), pd(3)));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(1), pd(3)));
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        rows[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        rows[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
}

#elif defined(__AVX2__)

inline uint32_t less_mask(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
inline Vec reciprocal(Vec x) {
    const Vec one = Vec::broadcast(1.0f);
    return {_mm256_div_ps(one.v, x.v)};
}
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
    mantissa->v = _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000)));
    exponent->v = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
}
inline void transpose(Vec* rows) {
    __m256 r[8], t[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        rows[i + 4].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
}

#else

inline uint32_t less_mask(const Vec& a, const Vec& b) {
    uint32_t mask = 0;
    for (int i = 0; i < Vec::width; ++i) mask |= static_cast<uint32_t>(a.lane[i] < b.lane[i]) << i;
    return mask;
}
inline Vec reciprocal(const Vec& x) {
    return lanewise([&](int i) { return 1.0f / x.lane[i]; });
}
inline void split(const Vec& x, Vec* mantissa, Vec* exponent) {
    *mantissa = lanewise([&](int i) { return float_of((bits_of(x.lane[i]) & 0x7fffffu) | 0x3f800000u); });
    *exponent = lanewise(
        [&](int i) { return static_cast<float>(static_cast<int32_t>(bits_of(x.lane[i]) >> 23) - 127); });
}
inline void transpose(Vec* rows) {
    for (int i = 0; i < Vec::width; ++i) {
        for (int j = 0; j < i; ++j) {
            const float kept = rows[i].lane[j];
            rows[i].lane[j] = rows[j].lane[i];
            rows[j].lane[i] = kept;
        }
    }
}

#endif

// log(x) to about 1 ulp for normal x > 0 (polynomial of Cephes logf on [sqrt(1/2), sqrt(2)]).
inline Vec log(Vec x) {
    const Vec one = Vec::broadcast(1.0f), root = Vec::broadcast(1.41421356f);
    Vec m, e;
    split(x, &m, &e);
    e = select_less(root, m, e + one, e);
    m = select_less(root, m, m * Vec::broadcast(0.5f), m) - one;
    Vec p = Vec::broadcast(7.0376836292e-2f);
    p = fma(p, m, Vec::broadcast(-1.1514610310e-1f));
    p = fma(p, m, Vec::broadcast(1.1676998740e-1f));
    p = fma(p, m, Vec::broadcast(-1.2420140846e-1f));
    p = fma(p, m, Vec::broadcast(1.4249322787e-1f));
    p = fma(p, m, Vec::broadcast(-1.6668057665e-1f));
    p = fma(p, m, Vec::broadcast(2.0000714765e-1f));
    p = fma(p, m, Vec::broadcast(-2.4999993993e-1f));
    p = fma(p, m, Vec::broadcast(3.3333331174e-1f));
    const Vec square = m * m;
    Vec tail = p * m * square;
    tail = fma(e, Vec::broadcast(-2.12194440e-4f), tail);
    tail = fma(square, Vec::broadcast(-0.5f), tail);
    return fma(e, Vec::broadcast(0.693359375f), m + tail);
}

}  // namespace
}  // namespace MOORING_ISA
}  // namespace mooring
