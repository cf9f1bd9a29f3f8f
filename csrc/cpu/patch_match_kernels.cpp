// Compiled once per instruction set; see patch_match_kernels.h.
#include "cpu/patch_match_kernels.h"

#include <limits>

#include "cpu/vec_lanes.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

constexpr int W = Vec::width;
constexpr int kConceptPatches = 9;  // the size in use; its loops have constant bounds and stay in registers
constexpr int kConceptPairs = 10;

constexpr float kDominant = 0.6f;        // of a column: more than half, with room for rounding
constexpr float kGrid = 32.0f;           // grid points per unit of a logarithm
constexpr float kLowestKey = -32767.0f;  // with it a code stays below 2^24: an exact fp32 integer
constexpr float kSmallestShare = 1.17549435e-38f;

template <typename T>
void pack(const void* const* sets, int count, int64_t P, int64_t D, float* packed) {
    const Vec zero = Vec::broadcast(0.0f);
    for (int64_t b = 0; b < P; ++b) {
        for (int64_t d = 0; d < D; d += W) {
            const int width = D - d < W ? static_cast<int>(D - d) : W;
            Vec rows[W];
            for (int l = 0; l < W; ++l) {
                if (l >= count) {
                    rows[l] = zero;
                    continue;
                }
                const T* from = static_cast<const T*>(sets[l]) + b * D + d;
                rows[l] = width == W ? Vec::load(from) : Vec::load(from, width, 0.0f);
            }
            transpose(rows);
            float* to = packed + (b * D + d) * W;
            for (int j = 0; j < width; ++j) rows[j].store(to + j * W);
        }
    }
}

// A x N entries of the cosines at once, in registers.
template <int A, int N>
void cosine_tile(const float* query, const float* packed, int64_t P, int64_t D, float* out) {
    Vec sum[A][N];
    for (int a = 0; a < A; ++a) {
        for (int n = 0; n < N; ++n) sum[a][n] = Vec::broadcast(0.0f);
    }
    for (int64_t d = 0; d < D; ++d) {
        Vec key[N];
        for (int n = 0; n < N; ++n) key[n] = Vec::load(packed + (n * D + d) * W);
        for (int a = 0; a < A; ++a) {
            const Vec q = Vec::broadcast(query[d * P + a]);
            for (int n = 0; n < N; ++n) sum[a][n] = fma(q, key[n], sum[a][n]);
        }
    }
    for (int a = 0; a < A; ++a) {
        for (int n = 0; n < N; ++n) sum[a][n].store(out + (a * P + n) * W);
    }
}

template <int A, int N>
void cosine_tiles(const float* query, const float* packed, int64_t P, int64_t D, float* cosines) {
    int64_t a = 0;
    const auto along_b = [&](auto tile, auto single) {
        int64_t b = 0;
        for (; b + N <= P; b += N) tile(query + a, packed + b * D * W, P, D, cosines + (a * P + b) * W);
        for (; b < P; ++b) single(query + a, packed + b * D * W, P, D, cosines + (a * P + b) * W);
    };
    for (; a + A <= P; a += A) along_b(cosine_tile<A, N>, cosine_tile<A, 1>);
    for (; a < P; ++a) along_b(cosine_tile<1, N>, cosine_tile<1, 1>);
}

void cosines_of_group(const float* query, const float* packed, int64_t P, int64_t D, float* cosines) {
    // 9 x 3 sums, three keys and one query value fill the 32 registers of AVX-512; 3 x 3 fit into 16.
    if (W == 16 && P == kConceptPatches) {
        for (int b = 0; b < kConceptPatches; b += 3) {
            cosine_tile<kConceptPatches, 3>(query, packed + b * D * W, kConceptPatches, D, cosines + b * W);
        }
        return;
    }
    cosine_tiles<3, 3>(query, packed, P, D, cosines);
}

// x = cosine / epsilon less the maxima of its rows, then of its columns: every row and every column has a 0
// and no entry is above. `column` is what the columns lost: the start of their potentials.
template <int Fixed>
void centre(const float* cosines, int64_t given, float epsilon, Vec* x, Vec* column) {
    const int64_t P = Fixed ? Fixed : given;
    const Vec scale = Vec::broadcast(1.0f / epsilon);
    for (int64_t b = 0; b < P; ++b) column[b] = Vec::broadcast(-std::numeric_limits<float>::infinity());
    for (int64_t a = 0; a < P; ++a) {
        const float* row = cosines + a * P * W;
        Vec highest = Vec::load(row);
        for (int64_t b = 1; b < P; ++b) highest = max(highest, Vec::load(row + b * W));
        for (int64_t b = 0; b < P; ++b) {
            // the difference first: it is exact where the two are close, and only those entries matter
            x[a * P + b] = (Vec::load(row + b * W) - highest) * scale;
            column[b] = max(column[b], x[a * P + b]);
        }
    }
    for (int64_t a = 0; a < P; ++a) {
        for (int64_t b = 0; b < P; ++b) x[a * P + b] = x[a * P + b] - column[b];
    }
}

// The rounds as they are defined, on logarithms: u_a <- -LSE_b(x + v), v_b <- -LSE_a(x + u).
void logarithmic_rounds(const Vec* x, const Vec* column, int64_t P, int rounds, Vec* u, Vec* v) {
    const auto minus_lse = [P](const Vec* entries, int64_t stride, const Vec* potential) {
        Vec terms[kMostPatches];
        for (int64_t i = 0; i < P; ++i) terms[i] = entries[i * stride] + potential[i];
        Vec highest = terms[0], sum = Vec::broadcast(0.0f);
        for (int64_t i = 1; i < P; ++i) highest = max(highest, terms[i]);
        for (int64_t i = 0; i < P; ++i) sum = sum + exp(terms[i] - highest);
        return Vec::broadcast(0.0f) - (highest + log(sum));
    };
    for (int64_t b = 0; b < P; ++b) v[b] = column[b];
    for (int round = 0; round < rounds; ++round) {
        for (int64_t a = 0; a < P; ++a) u[a] = minus_lse(x + a * P, 1, v);
        for (int64_t b = 0; b < P; ++b) v[b] = minus_lse(x + b, P, u);
    }
}

// The same rounds on the potentials' exponentials: u_a <- 1 / sum_b k v, v_b <- 1 / sum_a k u with k =
// exp(x), multiply-adds alone. Row a gives its share of all column sums as soon as u_a is known, so k is read
// once a round. (The marginals' constant would scale the whole plan and is left out.)
//
// exp flushes entries below e^-87 to 0. Each sum has a term with k = 1, so what is lost is at most
// P e^-87 (max v / min v) of it, and min v >= 1 / (P max u): where max u max v stays below e^60 the loss is
// under rounding. `range` returns max u max v over all rounds, infinite or NaN where it left the fp32
// numbers.
template <int Fixed>
Vec scaling_rounds(const Vec* k, const Vec* column, int64_t given, int rounds, Vec* u, Vec* v) {
    const int64_t P = Fixed ? Fixed : given;
    constexpr int kRoom = Fixed ? Fixed : kMostPatches;
    const Vec zero = Vec::broadcast(0.0f);
    Vec potential[kRoom], sum[kRoom], highest_u = zero, highest_v = zero;
    for (int64_t b = 0; b < P; ++b) potential[b] = exp(column[b]);
    for (int round = 0; round < rounds; ++round) {
        for (int64_t b = 0; b < P; ++b) sum[b] = zero;
        for (int64_t a = 0; a < P; ++a) {
            const Vec* row = k + a * P;
            Vec total = row[0] * potential[0];
            for (int64_t b = 1; b < P; ++b) total = fma(row[b], potential[b], total);
            const Vec scale = reciprocal(total);
            highest_u = max(highest_u, scale);
            u[a] = scale;
            for (int64_t b = 0; b < P; ++b) sum[b] = fma(row[b], scale, sum[b]);
        }
        for (int64_t b = 0; b < P; ++b) {
            potential[b] = reciprocal(sum[b]);
            highest_v = max(highest_v, potential[b]);
        }
    }
    Vec spoilt = zero;  // NaN if any potential is infinite or NaN: max() may have passed one over
    for (int64_t i = 0; i < P; ++i) {
        v[i] = potential[i];
        spoilt = fma(u[i] + v[i], zero, spoilt);
    }
    return fma(highest_u, highest_v, spoilt);
}

// Codes that order the entries of the plan exp(x + u + v), whose columns sum to 1 (the last update was v's).
//
// An entry that holds most of its column ranks by -log of what the others hold, every other one by its own
// logarithm: the same order, but entries near 1 are told apart by their small complements and not by their
// last digits. The key is rounded to a grid, because converged plans hold pairs that are equal but for
// rounding (two patches that exchange), and the flat index makes each code unique, lower indices first.
template <int Fixed>
void codes_of(const Vec* x, const Vec* u, const Vec* v, int64_t given, float* codes) {
    const int64_t P = Fixed ? Fixed : given;
    const Vec zero = Vec::broadcast(0.0f), most = Vec::broadcast(kDominant);
    const Vec grid = Vec::broadcast(kGrid),
              magic = Vec::broadcast(12582912.0f);  // 1.5 2^23 rounds to integers
    const Vec lowest = Vec::broadcast(kLowestKey), step = Vec::broadcast(256.0f);
    for (int64_t b = 0; b < P; ++b) {
        Vec key[Fixed ? Fixed : kMostPatches], share[Fixed ? Fixed : kMostPatches], rest = zero;
        for (int64_t a = 0; a < P; ++a) {
            key[a] = x[a * P + b] + (u[a] + v[b]);
            share[a] = exp(key[a]);
            rest = rest + select_less(most, share[a], zero, share[a]);
        }
        const Vec complement = zero - log(max(Vec::broadcast(kSmallestShare), rest));
        for (int64_t a = 0; a < P; ++a) {
            const Vec chosen = select_less(most, share[a], complement, key[a]);
            const Vec rounded = max(lowest, fma(chosen, grid, magic) - magic);
            const Vec index = Vec::broadcast(static_cast<float>(255 - (a * P + b)));
            fma(rounded, step, index).store(codes + (a * P + b) * W);
        }
    }
}

template <int Fixed>
bool rank_of_size(const float* cosines, int64_t given, float epsilon, int rounds, float* codes) {
    const int64_t P = Fixed ? Fixed : given;
    constexpr int kRoom = Fixed ? Fixed : kMostPatches;
    Vec x[kRoom * kRoom], k[kRoom * kRoom], column[kRoom], u[kRoom], v[kRoom];
    centre<Fixed>(cosines, P, epsilon, x, column);
    for (int64_t i = 0; i < P * P; ++i) k[i] = exp(x[i]);
    const Vec range = scaling_rounds<Fixed>(k, column, P, rounds, u, v);
    const Vec safe = Vec::broadcast(1.0e26f);  // e^60
    for (int64_t i = 0; i < P; ++i) {
        u[i] = log(u[i]);
        v[i] = log(v[i]);
    }
    const bool exact = less_mask(range, safe) == (1u << W) - 1u;
    if (!exact) {
        Vec log_u[kRoom], log_v[kRoom];
        logarithmic_rounds(x, column, P, rounds, log_u, log_v);
        for (int64_t i = 0; i < P; ++i) {  // only in the lanes that need it: a lane knows no neighbours
            u[i] = select_less(range, safe, u[i], log_u[i]);
            v[i] = select_less(range, safe, v[i], log_v[i]);
        }
    }
    codes_of<Fixed>(x, u, v, P, codes);
    return exact;
}

bool rank_entries(const float* cosines, int64_t P, float epsilon, int rounds, float* codes) {
    if (P == kConceptPatches) return rank_of_size<kConceptPatches>(cosines, P, epsilon, rounds, codes);
    return rank_of_size<0>(cosines, P, epsilon, rounds, codes);
}

// largest[0 .. most) in falling order
template <int Fixed>
void largest_codes(const float* codes, int64_t entries, int given, Vec* largest) {
    const int most = Fixed ? Fixed : given;
    Vec kept[Fixed ? Fixed : kMostEntries];
    for (int r = 0; r < most; ++r) kept[r] = Vec::broadcast(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < entries; ++i) {
        Vec falling = Vec::load(codes + i * W);
        for (int r = 0; r < most; ++r) {
            const Vec higher = max(kept[r], falling);
            falling = min(kept[r], falling);
            kept[r] = higher;
        }
    }
    for (int r = 0; r < most; ++r) largest[r] = kept[r];
}

bool select(const float* codes, const float* cosines, int64_t P, const int32_t* take, Pairs* pairs) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    int most = 0;
    uint32_t used = 0;  // lanes without a problem may hold anything, NaN and infinity too
    for (int l = 0; l < W; ++l) {
        used |= static_cast<uint32_t>(take[l] != 0) << l;
        // a NaN among the cosines of a problem is in every sum, and so in each of its codes
        if (take[l] != 0 && !(codes[l] == codes[l])) return false;
        const int reach = take[l] < 0 ? -take[l] : take[l];
        most = reach > most ? reach : most;
    }
    Vec largest[kMostEntries];
    if (most <= kConceptPairs && P * P >= kConceptPairs) {
        largest_codes<kConceptPairs>(codes, P * P, most, largest);
    } else {
        largest_codes<0>(codes, P * P, most, largest);
    }
    float lowest[W], highest[W];  // codes in between are taken
    for (int l = 0; l < W; ++l) {
        lowest[l] = highest[l] = kInfinity;
        if (take[l] == 0) continue;
        float lanes[W];
        largest[(take[l] < 0 ? -take[l] : take[l]) - 1].store(lanes);
        lowest[l] = lanes[l];
        if (take[l] < 0) highest[l] = lanes[l];
    }
    const Vec from = Vec::load(lowest), to = Vec::load(highest);
    int32_t found = 0;
    for (int64_t a = 0; a < P; ++a) {
        pairs->first[a] = found;
        for (int64_t b = 0; b < P; ++b) {
            const Vec code = Vec::load(codes + (a * P + b) * W);
            const uint32_t outside = less_mask(code, from) | less_mask(to, code);
            for (uint32_t taken = ~outside & used; taken != 0; taken &= taken - 1) {
                const int l = __builtin_ctz(taken);
                pairs->row[found] = static_cast<int32_t>(l * P + b);
                pairs->cosine[found] = cosines[(a * P + b) * W + l];
                ++found;
            }
        }
    }
    pairs->first[P] = found;
    return true;
}

float exponentials(const float* x, float scale, float shift, int64_t n, float* weights) {
    const Vec factor = Vec::broadcast(scale), offset = Vec::broadcast(-shift);
    Vec sum = Vec::broadcast(0.0f);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Vec weight = exp(fma(Vec::load(x + i), factor, offset));
        weight.store(weights + i);
        sum = sum + weight;
    }
    float total = sum.sum();
    if (i < n) {
        const int left = static_cast<int>(n - i);
        exp(fma(Vec::load(x + i, left, 0.0f), factor, offset)).store(weights + i, left);
        for (; i < n; ++i) total += weights[i];
    }
    return total;
}

// N vectors of the sum stay in registers while the rows stream by.
template <typename T, int N>
void accumulate_columns(const void* const* sets, const int32_t* rows, const float* weights, int64_t n,
                        int64_t P, int64_t D, int64_t d, float* sum) {
    Vec total[N];
    for (int i = 0; i < N; ++i) total[i] = Vec::load(sum + d + i * W);
    for (int64_t j = 0; j < n; ++j) {
        const T* row = static_cast<const T*>(sets[rows[j] / P]) + (rows[j] % P) * D + d;
        const Vec weight = Vec::broadcast(weights[j]);
        for (int i = 0; i < N; ++i) total[i] = fma(weight, Vec::load(row + i * W), total[i]);
    }
    for (int i = 0; i < N; ++i) total[i].store(sum + d + i * W);
}

template <typename T>
void accumulate(const void* const* sets, const int32_t* rows, const float* weights, int64_t n, int64_t P,
                int64_t D, float* sum) {
    constexpr int kWide = W == 16 ? 12 : 8;
    int64_t d = 0;
    for (; d + kWide * W <= D; d += kWide * W) {
        accumulate_columns<T, kWide>(sets, rows, weights, n, P, D, d, sum);
    }
    for (; d + W <= D; d += W) accumulate_columns<T, 1>(sets, rows, weights, n, P, D, d, sum);
    if (d == D) return;
    const int left = static_cast<int>(D - d);
    Vec total = Vec::load(sum + d, left, 0.0f);
    for (int64_t j = 0; j < n; ++j) {
        const T* row = static_cast<const T*>(sets[rows[j] / P]) + (rows[j] % P) * D + d;
        total = fma(Vec::broadcast(weights[j]), Vec::load(row, left, 0.0f), total);
    }
    total.store(sum + d, left);
}

}  // namespace

const PatchMatchKernels patch_match_kernels = {
    W,
    {pack<float>, pack<Bf16>},
    cosines_of_group,
    rank_entries,
    select,
    exponentials,
    {accumulate<float>, accumulate<Bf16>},
};

}  // namespace MOORING_ISA
}  // namespace mooring
