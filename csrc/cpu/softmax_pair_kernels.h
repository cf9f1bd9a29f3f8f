// Two softmaxes over the same columns, of z and of k v: what text_supervised_loss needs of a row.
#pragma once

#include <cstdint>

namespace mooring {

// Everything relative to the largest value of the row, so that no exp overflows and no large numbers cancel.
struct SoftmaxPair {
    float peak_z, total_z;  // max z; sum exp(z - peak_z)
    float peak_v, total_v;  // max v; sum exp(k (v - peak_v))
    float mixed;            // sum exp(k (v - peak_v)) (z - peak_z)
};

struct SoftmaxPairKernels {
    SoftmaxPair (*sums)(const float* z, const float* v, float k, int64_t n);
    // with r_i = exp(k v_i - lse_v): grad_z_i = s_z (exp(z_i - lse_z) - mix r_i), grad_v_i = s_v r_i;
    // either may be null and is then not computed
    void (*grads)(float* grad_z, float* grad_v, const float* z, const float* v, float k, float lse_z,
                  float lse_v, float s_z, float mix, float s_v, int64_t n);
};

// The table of the active capability.
const SoftmaxPairKernels& softmax_pair_kernels();

}  // namespace mooring
