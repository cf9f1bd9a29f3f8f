// Compiled once per instruction set; see row_kernels.cpp for why nothing here leaves its namespace.
#include "cpu/parameter_kernels.h"

#include "cpu/vec.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

constexpr int64_t W = Vec::width;

template <typename X, typename Y>
float squared_distance(const void* x_void, const void* y_void, int64_t n) {
    const X* x = static_cast<const X*>(x_void);
    const Y* y = static_cast<const Y*>(y_void);
    const auto add = [](Vec d, Vec acc) { return fma(d, d, acc); };
    // four accumulators hide the latency of the addition and quarter the length of each sum
    Vec a = Vec::broadcast(0.0f), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        a = add(Vec::load(x + i) - Vec::load(y + i), a);
        b = add(Vec::load(x + i + W) - Vec::load(y + i + W), b);
        c = add(Vec::load(x + i + 2 * W) - Vec::load(y + i + 2 * W), c);
        d = add(Vec::load(x + i + 3 * W) - Vec::load(y + i + 3 * W), d);
    }
    for (; i + W <= n; i += W) a = add(Vec::load(x + i) - Vec::load(y + i), a);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        b = add(Vec::load(x + i, rest, 0.0f) - Vec::load(y + i, rest, 0.0f), b);
    }
    return ((a + b) + (c + d)).sum();
}

// Stores around the cache; bf16 and portable lanes have none of that kind.
template <typename T>
inline void stream(T* out, const Vec& v) {
    v.store(out);
}
#if defined(__AVX512F__)
inline void stream(float* out, const Vec& v) {
    _mm512_stream_ps(out, v.v);
}
#elif defined(__AVX2__)
inline void stream(float* out, const Vec& v) {
    _mm256_stream_ps(out, v.v);
}
#endif

// Later stores must not overtake the streamed ones: another thread may be told that they are done.
inline void finish_streams() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

template <typename X, typename Y>
void scaled_difference(void* out_void, const void* x_void, const void* y_void, float s, int64_t n,
                       bool past_cache) {
    X* out = static_cast<X*>(out_void);
    const X* x = static_cast<const X*>(x_void);
    const Y* y = static_cast<const Y*>(y_void);
    const Vec factor = Vec::broadcast(s);
    int64_t i = 0;
    if (past_cache && reinterpret_cast<uintptr_t>(out) % (W * sizeof(X)) == 0) {
        for (; i + W <= n; i += W) stream(out + i, factor * (Vec::load(x + i) - Vec::load(y + i)));
        finish_streams();
    }
    for (; i + W <= n; i += W) (factor * (Vec::load(x + i) - Vec::load(y + i))).store(out + i);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        (factor * (Vec::load(x + i, rest, 0.0f) - Vec::load(y + i, rest, 0.0f))).store(out + i, rest);
    }
}

// f(y, x) is written over y.
template <typename F>
inline void update(float* y, const Bf16* x, int64_t n, F f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(Vec::load(y + i), Vec::load(x + i)).store(y + i);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        f(Vec::load(y + i, rest, 0.0f), Vec::load(x + i, rest, 0.0f)).store(y + i, rest);
    }
}

void lerp_from_bf16(float* y, const void* x_void, float w, int64_t n) {
    const Bf16* x = static_cast<const Bf16*>(x_void);
    if (w < 0.5f) {
        const Vec weight = Vec::broadcast(w);
        update(y, x, n, [&](Vec from, Vec to) { return fma(weight, to - from, from); });
    } else {
        const Vec kept = Vec::broadcast(w - 1.0f);
        update(y, x, n, [&](Vec from, Vec to) { return fma(kept, to - from, to); });
    }
}

}  // namespace

const ParameterKernels parameter_kernels = {
    {{squared_distance<float, float>, squared_distance<float, Bf16>},
     {squared_distance<Bf16, float>, squared_distance<Bf16, Bf16>}},
    {{scaled_difference<float, float>, scaled_difference<float, Bf16>},
     {scaled_difference<Bf16, float>, scaled_difference<Bf16, Bf16>}},
    lerp_from_bf16,
};

}  // namespace MOORING_ISA
}  // namespace mooring
