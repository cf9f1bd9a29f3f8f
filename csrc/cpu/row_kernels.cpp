// Compiled once per instruction set, with MOORING_ISA naming the namespace and the compiler flags
// the instructions. Everything here lies in that namespace and nothing from the standard library's
// templates is used: an inline function shared by name with another translation unit could be linked
// in its AVX-512 form and run on a CPU without it.
#include "cpu/row_kernels.h"

#include "cpu/vec.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

constexpr int64_t W = Vec::width;

// Calls full(i) for whole vectors and tail(i, count) for the rest, if any.
template <typename Full, typename Tail>
inline void for_each_vec(int64_t n, Full full, Tail tail) {
    int64_t i = 0;
    for (; i + W <= n; i += W) full(i);
    if (i < n) tail(i, static_cast<int>(n - i));
}

// sum over i of term(vector of row elements); two accumulators hide the latency of the addition.
// term(i) loads a whole vector, tail(i, count) one whose missing lanes contribute zero.
template <typename Term, typename Tail>
inline float reduce_sum(int64_t n, Term term, Tail tail) {
    Vec even = Vec::broadcast(0.0f), odd = Vec::broadcast(0.0f);
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        even = term(i, even);
        odd = term(i + W, odd);
    }
    if (i + W <= n) {
        even = term(i, even);
        i += W;
    }
    if (i < n) odd = tail(i, static_cast<int>(n - i), odd);
    return (even + odd).sum();
}

template <typename T>
float sum_of_squares(const void* x_void, int64_t n) {
    const T* x = static_cast<const T*>(x_void);
    auto term = [&](Vec v, Vec acc) { return fma(v, v, acc); };
    return reduce_sum(
        n, [&](int64_t i, Vec acc) { return term(Vec::load(x + i), acc); },
        [&](int64_t i, int count, Vec acc) { return term(Vec::load(x + i, count, 0.0f), acc); });
}

template <typename T>
float dot(const void* x_void, const float* y, int64_t n) {
    const T* x = static_cast<const T*>(x_void);
    return reduce_sum(
        n, [&](int64_t i, Vec acc) { return fma(Vec::load(x + i), Vec::load(y + i), acc); },
        [&](int64_t i, int count, Vec acc) {
            return fma(Vec::load(x + i, count, 0.0f), Vec::load(y + i, count, 0.0f), acc);
        });
}

template <typename T>
void accumulate(float* acc, float a, const void* x_void, int64_t n) {
    const T* x = static_cast<const T*>(x_void);
    const Vec factor = Vec::broadcast(a);
    for_each_vec(
        n, [&](int64_t i) { fma(factor, Vec::load(x + i), Vec::load(acc + i)).store(acc + i); },
        [&](int64_t i, int count) {
            fma(factor, Vec::load(x + i, count, 0.0f), Vec::load(acc + i, count, 0.0f)).store(acc + i, count);
        });
}

template <typename T>
void subtract(float* out, const void* x_void, const float* y, int64_t n) {
    const T* x = static_cast<const T*>(x_void);
    for_each_vec(
        n, [&](int64_t i) { (Vec::load(x + i) - Vec::load(y + i)).store(out + i); },
        [&](int64_t i, int count) {
            (Vec::load(x + i, count, 0.0f) - Vec::load(y + i, count, 0.0f)).store(out + i, count);
        });
}

// Elements before the first address that a vector may be streamed to.
template <typename Out>
inline int64_t before_aligned(const Out* out, int64_t n) {
    constexpr uintptr_t kBytes = W * sizeof(Out);
    const int64_t elements =
        static_cast<int64_t>((kBytes - reinterpret_cast<uintptr_t>(out) % kBytes) % kBytes / sizeof(Out));
    return elements < n ? elements : n;
}

// Calls store(i, vec(i)) for the whole row: value(i) gives a vector, tail(i, count) a part of one.
template <bool kStream, typename Out, typename Value, typename Tail>
inline void write_row(Out* out, int64_t n, Value value, Tail tail) {
    int64_t i = 0;
    if (kStream) {
        i = before_aligned(out, n);
        if (i > 0) tail(0, static_cast<int>(i)).store(out, static_cast<int>(i));
        for (; i + W <= n; i += W) value(i).stream(out + i);
    }
    for (; i + W <= n; i += W) value(i).store(out + i);
    if (i < n) tail(i, static_cast<int>(n - i)).store(out + i, static_cast<int>(n - i));
}

template <bool kStream, typename Out, typename T>
void scale(void* out_void, const void* x_void, float s, int64_t n) {
    const T* x = static_cast<const T*>(x_void);
    const Vec factor = Vec::broadcast(s);
    write_row<kStream>(
        static_cast<Out*>(out_void), n, [&](int64_t i) { return Vec::load(x + i) * factor; },
        [&](int64_t i, int count) { return Vec::load(x + i, count, 0.0f) * factor; });
}

template <bool kStream, typename T>
void combine(void* out_void, float a, const void* g_void, float b, const void* x_void, int64_t n) {
    const T* g = static_cast<const T*>(g_void);
    const T* x = static_cast<const T*>(x_void);
    const Vec va = Vec::broadcast(a), vb = Vec::broadcast(b);
    write_row<kStream>(
        static_cast<T*>(out_void), n,
        [&](int64_t i) { return fma(va, Vec::load(g + i), vb * Vec::load(x + i)); },
        [&](int64_t i, int count) {
            return fma(va, Vec::load(g + i, count, 0.0f), vb * Vec::load(x + i, count, 0.0f));
        });
}

// Asks for the cache lines of elements begin .. end - 1; the second level is where a group of rows waits.
inline void fetch(Ahead ahead, int64_t begin, int64_t end) {
    constexpr int64_t kLine = 64;
    for (int r = 0; r < ahead.count; ++r) {
        const char* row = static_cast<const char*>(ahead.rows[r]);
        for (int64_t at = begin * ahead.element_bytes; at < end * ahead.element_bytes; at += kLine) {
            __builtin_prefetch(row + at, 0, 2);
        }
    }
}

template <typename T>
float dot_fetching(const void* x_void, const float* y, int64_t n, Ahead ahead) {
    const T* x = static_cast<const T*>(x_void);
    constexpr int kVecs = 4;
    Vec part[kVecs] = {Vec::broadcast(0.0f), Vec::broadcast(0.0f), Vec::broadcast(0.0f),
                       Vec::broadcast(0.0f)};
    int64_t i = 0;
    for (; i + kVecs * W <= n; i += kVecs * W) {
        fetch(ahead, i, i + kVecs * W);
        for (int v = 0; v < kVecs; ++v) {
            part[v] = fma(Vec::load(x + i + v * W), Vec::load(y + i + v * W), part[v]);
        }
    }
    for (; i + W <= n; i += W) part[0] = fma(Vec::load(x + i), Vec::load(y + i), part[0]);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        part[1] = fma(Vec::load(x + i, rest, 0.0f), Vec::load(y + i, rest, 0.0f), part[1]);
    }
    return ((part[0] + part[1]) + (part[2] + part[3])).sum();
}

// Columns i .. i + kVecs W - 1 of accumulate_rows: their sums stay in registers over all rows.
template <int kVecs, typename T>
inline void accumulate_columns(float* acc, float decay, const void* const* rows, const float* weight,
                               int count, int64_t i) {
    Vec total[kVecs];
    const Vec kept = Vec::broadcast(decay);
    for (int v = 0; v < kVecs; ++v) {
        total[v] = decay == 0.0f ? Vec::broadcast(0.0f) : kept * Vec::load(acc + i + v * W);
    }
    for (int r = 0; r < count; ++r) {
        const T* row = static_cast<const T*>(rows[r]) + i;
        const Vec factor = Vec::broadcast(weight[r]);
        for (int v = 0; v < kVecs; ++v) total[v] = fma(factor, Vec::load(row + v * W), total[v]);
    }
    for (int v = 0; v < kVecs; ++v) total[v].store(acc + i + v * W);
}

template <typename T>
void accumulate_rows(float* acc, float decay, const void* const* rows, const float* weight, int count,
                     int64_t n, Ahead ahead) {
    constexpr int kVecs = 8;
    int64_t i = 0;
    for (; i + kVecs * W <= n; i += kVecs * W) {
        fetch(ahead, i, i + kVecs * W);
        accumulate_columns<kVecs, T>(acc, decay, rows, weight, count, i);
    }
    fetch(ahead, i, n);
    for (; i + W <= n; i += W) accumulate_columns<1, T>(acc, decay, rows, weight, count, i);
    if (i == n) return;
    const int lanes = static_cast<int>(n - i);
    Vec total = Vec::broadcast(0.0f);
    if (decay != 0.0f) total = Vec::broadcast(decay) * Vec::load(acc + i, lanes, 0.0f);
    for (int r = 0; r < count; ++r) {
        const T* row = static_cast<const T*>(rows[r]) + i;
        total = fma(Vec::broadcast(weight[r]), Vec::load(row, lanes, 0.0f), total);
    }
    total.store(acc + i, lanes);
}

void fence() {
    Vec::fence();
}

float add_and_sum_squares(float* y, const float* x, int64_t n) {
    return reduce_sum(
        n,
        [&](int64_t i, Vec acc) {
            const Vec v = Vec::load(y + i) + Vec::load(x + i);
            v.store(y + i);
            return fma(v, v, acc);
        },
        [&](int64_t i, int count, Vec acc) {
            const Vec v = Vec::load(y + i, count, 0.0f) + Vec::load(x + i, count, 0.0f);
            v.store(y + i, count);
            return fma(v, v, acc);
        });
}

float maximum(const float* x, int64_t n) {
    const float lowest = -__builtin_inff();
    Vec best = Vec::broadcast(lowest);
    for_each_vec(
        n, [&](int64_t i) { best = max(best, Vec::load(x + i)); },
        [&](int64_t i, int count) { best = max(best, Vec::load(x + i, count, lowest)); });
    return best.maximum();
}

float sum(const float* x, int64_t n) {
    return reduce_sum(
        n, [&](int64_t i, Vec acc) { return acc + Vec::load(x + i); },
        [&](int64_t i, int count, Vec acc) { return acc + Vec::load(x + i, count, 0.0f); });
}

float sum_exp(const float* x, float shift, int64_t n) {
    const Vec offset = Vec::broadcast(shift);
    // a lane of -inf gives exp = 0; it is subtracted first only where shift is finite, so the tail
    // is padded after the subtraction
    return reduce_sum(
        n, [&](int64_t i, Vec acc) { return acc + exp(Vec::load(x + i) - offset); },
        [&](int64_t i, int count, Vec acc) {
            float padded[W];
            (Vec::load(x + i, count, 0.0f) - offset).store(padded);
            return acc + exp(Vec::load(padded, count, -__builtin_inff()));
        });
}

float exp_and_sum(float* x, float shift, int64_t n) {
    const Vec offset = Vec::broadcast(shift);
    return reduce_sum(
        n,
        [&](int64_t i, Vec acc) {
            const Vec e = exp(Vec::load(x + i) - offset);
            e.store(x + i);
            return acc + e;
        },
        [&](int64_t i, int count, Vec acc) {
            exp(Vec::load(x + i, count, 0.0f) - offset).store(x + i, count);
            return acc + Vec::load(x + i, count, 0.0f);
        });
}

void affine(float* x, float a, float b, int64_t n) {
    const Vec factor = Vec::broadcast(a), offset = Vec::broadcast(b);
    for_each_vec(
        n, [&](int64_t i) { fma(factor, Vec::load(x + i), offset).store(x + i); },
        [&](int64_t i, int count) {
            fma(factor, Vec::load(x + i, count, 0.0f), offset).store(x + i, count);
        });
}

void softmax_grad(float* out, const float* x, float lse, float uniform, float s, int64_t n) {
    const Vec offset = Vec::broadcast(lse), floor = Vec::broadcast(uniform), factor = Vec::broadcast(s);
    for_each_vec(
        n, [&](int64_t i) { (factor * (exp(Vec::load(x + i) - offset) - floor)).store(out + i); },
        [&](int64_t i, int count) {
            (factor * (exp(Vec::load(x + i, count, 0.0f) - offset) - floor)).store(out + i, count);
        });
}

}  // namespace

const RowKernels row_kernels = {
    {sum_of_squares<float>, sum_of_squares<Bf16>},
    {dot<float>, dot<Bf16>},
    {accumulate<float>, accumulate<Bf16>},
    {subtract<float>, subtract<Bf16>},
    {dot_fetching<float>, dot_fetching<Bf16>},
    {accumulate_rows<float>, accumulate_rows<Bf16>},
    {{scale<false, float, float>, scale<false, float, Bf16>},
     {scale<false, Bf16, float>, scale<false, Bf16, Bf16>}},
    {{scale<true, float, float>, scale<true, float, Bf16>},
     {scale<true, Bf16, float>, scale<true, Bf16, Bf16>}},
    {combine<false, float>, combine<false, Bf16>},
    {combine<true, float>, combine<true, Bf16>},
    fence,
    add_and_sum_squares,
    maximum,
    sum,
    sum_exp,
    exp_and_sum,
    affine,
    softmax_grad,
};

}  // namespace MOORING_ISA
}  // namespace mooring
