#pragma once

#include <immintrin.h>

#include "cpu/bf16.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

struct Vec {
    static constexpr int width = 8;
    __m256 v;

    static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const Bf16* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
    }
    // The first `count` lanes from memory, the others `fill`.
    static Vec load(const float* p, int count, float fill) {
        float padded[width];
        for (int i = 0; i < width; ++i) padded[i] = i < count ? p[i] : fill;
        return load(padded);
    }
    static Vec load(const Bf16* p, int count, float fill) {
        float padded[width];
        for (int i = 0; i < width; ++i) padded[i] = i < count ? widen(p[i]) : fill;
        return load(padded);
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(Bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed()); }
    // Past the caches, to an address that is a multiple of the stored size.
    void stream(float* p) const { _mm256_stream_ps(p, v); }
    void stream(Bf16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrowed()); }
    static void fence() { _mm_sfence(); }
    __m128i narrowed() const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    }
    void store(float* p, int count) const {
        float lanes[width];
        store(lanes);
        for (int i = 0; i < count; ++i) p[i] = lanes[i];
    }
    void store(Bf16* p, int count) const {
        float lanes[width];
        store(lanes);
        for (int i = 0; i < count; ++i) p[i] = narrow(lanes[i]);
    }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    float maximum() const {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }
};

inline Vec operator+(Vec a, Vec b) {
    return {_mm256_add_ps(a.v, b.v)};
}
inline Vec operator-(Vec a, Vec b) {
    return {_mm256_sub_ps(a.v, b.v)};
}
inline Vec operator*(Vec a, Vec b) {
    return {_mm256_mul_ps(a.v, b.v)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec max(Vec a, Vec b) {
    return {_mm256_max_ps(a.v, b.v)};
}
inline Vec min(Vec a, Vec b) {
    return {_mm256_min_ps(a.v, b.v)};
}
// yes where a < b, no elsewhere
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
// p * 2^n where the low bits of `shifted` hold the integer n
inline Vec scale_by_power_of_two(Vec p, Vec shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), exponent))};
}

}  // namespace
}  // namespace MOORING_ISA
}  // namespace mooring
