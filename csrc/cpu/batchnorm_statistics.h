// BatchNorm in eval mode with the batch's own statistics, in one pass over x.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/row_kernels.h"

namespace mooring {

struct BatchnormLayer {
    const float* running_mean;  // [C]
    const float* running_var;   // [C]
    const float* weight;        // [C] or null: 1
    const float* bias;          // [C] or null: 0
    double eps;
    int64_t C;
};

// x, y: [B, C, P], contiguous. mean, var: [C], of x, var unbiased (0 where B P = 1).
void batchnorm_statistics_planes(const void* x, DType dtype, const BatchnormLayer& layer, void* y,
                                 float* mean, float* var, int64_t B, int64_t P, int threads);

// The same for x, y: [R, C], which is [B, P, C]: channels last.
void batchnorm_statistics_rows(const void* x, DType dtype, const BatchnormLayer& layer, void* y, float* mean,
                               float* var, int64_t R, int threads);

}  // namespace mooring
