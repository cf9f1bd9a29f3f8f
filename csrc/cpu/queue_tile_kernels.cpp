// Compiled once per instruction set, like row_kernels.cpp and under its rules: everything lies in the
// namespace MOORING_ISA and nothing from the standard library's templates is used.
#include "cpu/queue_tile_kernels.h"

#include "cpu/vec.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

constexpr int64_t W = Vec::width;
// With V vectors of lanes, this many rows are summed at once: rows * V accumulators, V factors and a
// broadcast fill the 32 registers of AVX-512 or the 16 of the others.
#if defined(__AVX512F__)
constexpr int kMostVectors = 4;
constexpr int rows_at_once(int vectors) {
    return vectors == 4 ? 6 : 8;
}
#else
constexpr int kMostVectors = 3;
constexpr int rows_at_once(int vectors) {
    return vectors == 3 ? 4 : (vectors == 2 ? 6 : 8);
}
#endif

template <int V, int R>
inline void product_of_rows(float* out, const float* keep, const float* a, int64_t row_step,
                            int64_t term_step, const float* b, int64_t terms) {
    Vec sums[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            sums[r][v] =
                keep ? Vec::load(keep + v * W) * Vec::load(out + (r * V + v) * W) : Vec::broadcast(0.0f);
        }
    }
    for (int64_t t = 0; t < terms; ++t) {
        Vec factors[V];
        for (int v = 0; v < V; ++v) factors[v] = Vec::load(b + (t * V + v) * W);
        for (int r = 0; r < R; ++r) {
            const Vec x = Vec::broadcast(a[r * row_step + t * term_step]);
            for (int v = 0; v < V; ++v) sums[r][v] = fma(x, factors[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sums[r][v].store(out + (r * V + v) * W);
    }
}

template <int V>
void product_of(float* out, const float* keep, const float* a, int64_t row_step, int64_t term_step,
                const float* b, int64_t rows, int64_t terms) {
    constexpr int R = rows_at_once(V);
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
        product_of_rows<V, R>(out + r * V * W, keep, a + r * row_step, row_step, term_step, b, terms);
    }
    for (; r < rows; ++r) {
        product_of_rows<V, 1>(out + r * V * W, keep, a + r * row_step, row_step, term_step, b, terms);
    }
}

void product(float* out, const float* keep, const float* a, int64_t row_step, int64_t term_step,
             const float* b, int64_t rows, int64_t terms, int64_t lanes) {
    switch (lanes / W) {
        case 1:
            return product_of<1>(out, keep, a, row_step, term_step, b, rows, terms);
        case 2:
            return product_of<2>(out, keep, a, row_step, term_step, b, rows, terms);
        case 3:
            return product_of<3>(out, keep, a, row_step, term_step, b, rows, terms);
#if defined(__AVX512F__)
        case 4:
            return product_of<4>(out, keep, a, row_step, term_step, b, rows, terms);
#endif
    }
}

void online_softmax(float* s, float* peak, float* total, float* shrink, int64_t rows, int64_t lanes) {
    for (int64_t l = 0; l < lanes; l += W) {
        const Vec before = Vec::load(peak + l);
        Vec highest = before;
        for (int64_t r = 0; r < rows; ++r) highest = max(highest, Vec::load(s + r * lanes + l));
        const Vec kept = exp(before - highest);
        Vec even = kept * Vec::load(total + l), odd = Vec::broadcast(0.0f);
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2) {
            float* at = s + r * lanes + l;
            const Vec first = exp(Vec::load(at) - highest), second = exp(Vec::load(at + lanes) - highest);
            first.store(at);
            second.store(at + lanes);
            even = even + first;
            odd = odd + second;
        }
        if (r < rows) {
            const Vec last = exp(Vec::load(s + r * lanes + l) - highest);
            last.store(s + r * lanes + l);
            even = even + last;
        }
        highest.store(peak + l);
        (even + odd).store(total + l);
        kept.store(shrink + l);
    }
}

int64_t next_match(const int64_t* labels, int64_t begin, int64_t n, int64_t label) {
    constexpr int64_t kBlock = 16;
    int64_t i = begin;
    for (; i + kBlock <= n; i += kBlock) {
        int64_t found = 0;
        for (int64_t k = 0; k < kBlock; ++k) found |= labels[i + k] == label;
        if (found) break;
    }
    for (; i < n; ++i) {
        if (labels[i] == label) return i;
    }
    return n;
}

}  // namespace

extern const QueueTileKernels queue_tile_kernels;
const QueueTileKernels queue_tile_kernels = {W, kMostVectors, product, online_softmax, next_match};

}  // namespace MOORING_ISA
}  // namespace mooring
