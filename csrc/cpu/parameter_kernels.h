// Primitives over whole parameters: what L2-SP and the weight average need of an instruction set.
#pragma once

#include <cstdint>

#include "cpu/row_kernels.h"

namespace mooring {

// One table per instruction set; the first index is the DType of x, the second that of y.
struct ParameterKernels {
    // sum_i (x_i - y_i)^2
    float (*squared_distance[kDTypes][kDTypes])(const void* x, const void* y, int64_t n);
    // out_i = s (x_i - y_i), rounded to nearest even to the dtype of x. `past_cache`: fp32 results go around
    // the cache where the instruction set can, which saves reading the lines that are overwritten.
    void (*scaled_difference[kDTypes][kDTypes])(void* out, const void* x, const void* y, float s, int64_t n,
                                                bool past_cache);
    // y_i += w (x_i - y_i) for a bf16 x, in the two forms of torch.lerp: exact at w = 0 and at w = 1
    void (*lerp_from_bf16)(float* y, const void* x, float w, int64_t n);
};

namespace scalar {
extern const ParameterKernels parameter_kernels;
}
#ifdef MOORING_X86
namespace avx2 {
extern const ParameterKernels parameter_kernels;
}
namespace avx512 {
extern const ParameterKernels parameter_kernels;
}
#endif

// The table of the active capability.
const ParameterKernels& parameter_kernels();

}  // namespace mooring
