// What the concept-level contrast does with one group of key sets: all that depends on the instruction set.
//
// A group is `lanes` key sets, one per vector lane, so that every loop below runs over whole vectors: an
// entry (a, b) of the P x P problems of a group is `lanes` consecutive floats at (a P + b) lanes.
#pragma once

#include <cstdint>

#include "cpu/row_kernels.h"

namespace mooring {

constexpr int kMostLanes = 16;
constexpr int kMostPatches = 16;  // an entry of a plan is then named by one byte
constexpr int kMostEntries = kMostPatches * kMostPatches;

// Pairs taken from the plans of a group, ordered by flat index, then by lane.
struct Pairs {
    int32_t first[kMostPatches + 1];  // pairs of query patch a are first[a] .. first[a + 1] - 1
    int32_t row[kMostLanes * kMostEntries];
    float cosine[kMostLanes * kMostEntries];  // row: lane P + b
};

struct PatchMatchKernels {
    int lanes;
    // packed[(b D + d) lanes + l] = sets[l][b D + d] for the P rows of each of `count` sets; 0 in the others
    void (*pack[kDTypes])(const void* const* sets, int count, int64_t P, int64_t D, float* packed);
    // cosines[a, b] = sum_d query[d, a] packed[b, d]; query is [D, P], transposed
    void (*cosines)(const float* query, const float* packed, int64_t P, int64_t D, float* cosines);
    // Codes whose falling order is that of the entries of the entropic plan after `rounds` rounds from zero
    // potentials: 256 times the rounded key of an entry, plus 255 less its flat index. False if a lane needed
    // the logarithmic domain.
    bool (*rank)(const float* cosines, int64_t P, float epsilon, int rounds, float* codes);
    // take[l] = n > 0: the n largest entries of the plan of lane l; -r < 0: its r-th largest alone; 0: none.
    // False if a NaN leaves the order undefined.
    bool (*select)(const float* codes, const float* cosines, int64_t P, const int32_t* take, Pairs* pairs);
    // weights_i = exp(scale x_i - shift); returns their sum
    float (*exponentials)(const float* x, float scale, float shift, int64_t n, float* weights);
    // sum[0..D) += sum_j weights[j] row(rows[j]), where row(l P + b) is row b of sets[l]
    void (*accumulate[kDTypes])(const void* const* sets, const int32_t* rows, const float* weights, int64_t n,
                                int64_t P, int64_t D, float* sum);
};

namespace scalar {
extern const PatchMatchKernels patch_match_kernels;
}
#ifdef MOORING_X86
namespace avx2 {
extern const PatchMatchKernels patch_match_kernels;
}
namespace avx512 {
extern const PatchMatchKernels patch_match_kernels;
}
#endif

// The table of the active capability.
const PatchMatchKernels& patch_match_kernels();

}  // namespace mooring
