#pragma once

#include <immintrin.h>

#include "cpu/bf16.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

struct Vec {
    static constexpr int width = 16;
    __m512 v;

    static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
    static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const Bf16* p) {
        return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // The first `count` lanes from memory, the others `fill`.
    static Vec load(const float* p, int count, float fill) {
        return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(count), p)};
    }
    static Vec load(const Bf16* p, int count, float fill) {
        const Vec loaded = widened(_mm256_maskz_loadu_epi16(first(count), p));
        return {_mm512_mask_blend_ps(first(count), _mm512_set1_ps(fill), loaded.v)};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(Bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed()); }
    void store(float* p, int count) const { _mm512_mask_storeu_ps(p, first(count), v); }
    void store(Bf16* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), narrowed()); }
    // Past the caches, to an address that is a multiple of the stored size.
    void stream(float* p) const { _mm512_stream_ps(p, v); }
    void stream(Bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrowed()); }
    static void fence() { _mm_sfence(); }
    float sum() const { return _mm512_reduce_add_ps(v); }
    float maximum() const { return _mm512_reduce_max_ps(v); }

  private:
    static Vec widened(__m256i half) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    __m256i narrowed() const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
    }
};

inline Vec operator+(Vec a, Vec b) {
    return {_mm512_add_ps(a.v, b.v)};
}
inline Vec operator-(Vec a, Vec b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
inline Vec operator*(Vec a, Vec b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec max(Vec a, Vec b) {
    return {_mm512_max_ps(a.v, b.v)};
}
inline Vec min(Vec a, Vec b) {
    return {_mm512_min_ps(a.v, b.v)};
}
// yes where a < b, no elsewhere
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// p * 2^n where the low bits of `shifted` hold the integer n
inline Vec scale_by_power_of_two(Vec p, Vec shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), exponent))};
}

}  // namespace
}  // namespace MOORING_ISA
}  // namespace mooring
