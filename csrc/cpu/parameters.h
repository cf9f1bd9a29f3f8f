// Ops over lists of parameters, each a block of contiguous values.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/row_kernels.h"

namespace mooring {

// One parameter and what it is drawn to; no anchor means zeros.
struct Anchored {
    const void* parameter;
    DType dtype;
    const void* anchor;  // may be null
    DType anchor_dtype;
    int64_t size;
};

// sum over all parameters of |p - p0|^2. Does not depend on `threads`.
double l2_sp_forward(const std::vector<Anchored>& list, int threads);

// grads[i] = scale (p - p0), in the dtype of the parameter.
void l2_sp_backward(const std::vector<Anchored>& list, const std::vector<void*>& grads, float scale,
                    int threads);

// An fp32 average and the bf16 values it follows.
struct Followed {
    float* average;
    const void* source;
    int64_t size;
};

// average += weight (source - average)
void lerp_from_bf16(const std::vector<Followed>& list, float weight, int threads);

}  // namespace mooring
