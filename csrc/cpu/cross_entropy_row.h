// Softmax cross-entropy of one fp32 row whose label is a class.
#pragma once

#include <cmath>

#include "cpu/row_kernels.h"

namespace mooring {

struct CrossEntropyRow {
    float loss, lse;
};

inline CrossEntropyRow cross_entropy_row(const RowKernels& kernels, const float* x, int64_t label,
                                         float smoothing, int64_t C) {
    const float highest = kernels.maximum(x, C);
    const float log_sum = std::log(kernels.sum_exp(x, highest, C));
    // relative to the row's maximum, so that large logits do not cancel
    float loss = log_sum - (1.0f - smoothing) * (x[label] - highest);
    if (smoothing != 0.0f) loss -= smoothing * (kernels.sum(x, C) / static_cast<float>(C) - highest);
    return {loss, highest + log_sum};
}

// grad may be x itself
inline void cross_entropy_row_grad(const RowKernels& kernels, float* grad, const float* x, int64_t label,
                                   float lse, float scale, float smoothing, int64_t C) {
    kernels.softmax_grad(grad, x, lse, smoothing / static_cast<float>(C), scale, C);
    grad[label] -= scale * (1.0f - smoothing);
}

}  // namespace mooring
