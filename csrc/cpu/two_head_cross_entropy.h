#pragma once

#include "cpu/ops.h"

namespace mooring {

// The rows of one head with their labels.
struct HeadRows {
    Matrix logits;  // [rows, C]
    const int64_t* labels;
    int64_t rows, C;
};

// both = target + weight * source; each of these a mean over the valid rows of its head, 0 where there are
// none.
struct TwoHeadLosses {
    float *both, *target, *source;
};

// inverse_counts = 1 / max(number of valid rows, 1) of {target, source}; lse [target.rows + source.rows], 0
// where masked.
void two_head_cross_entropy_forward(HeadRows target, HeadRows source, float weight, float smoothing,
                                    TwoHeadLosses losses, float* inverse_counts, float* lse, int threads);

// scale * (softmax - smoothed one-hot) in the dtype of each head's logits, zero rows where masked. Either
// output may be null and is then not computed.
void two_head_cross_entropy_backward(HeadRows target, HeadRows source, const float* lse, float target_scale,
                                     float source_scale, float smoothing, void* grad_target,
                                     void* grad_source, int threads);

}  // namespace mooring
