// Concept-level contrast: patches of an image against matched patches of its own class and of other classes.
#pragma once

#include <cstdint>

#include "cpu/ops.h"

namespace mooring {

struct PatchMatch {
    const float* query;               // [B, P, D]
    const float* own_key;             // [B, P, D]
    const int64_t* labels;            // [B]
    Matrix queue;                     // [C, K, P, D]
    const uint8_t* queue_valid;       // [C, K]
    const int64_t* negative_classes;  // [B, M]; what is no class, or the image's own, is passed over
    const int64_t* positive_pick;     // [B, 1 + K]
    int64_t B, C, K, P, D, M;
    int64_t negatives_per_set;  // at most P P
    float temperature, epsilon;
    int rounds;
};

// loss[i] = LSE_j(l_ij) - mean over positives of l_ij - log(positives), 0 where masked. If grad is not null:
// grad[i] = d loss[i] / d query[i], [P, D], 0 where masked. 1 <= P <= kMostPatches.
void patch_match_info_nce(const PatchMatch& given, float* loss, float* grad, int threads);

}  // namespace mooring
