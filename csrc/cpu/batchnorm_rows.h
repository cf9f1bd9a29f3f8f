// What BatchNorm statistics do to stretches of memory: all of it that depends on the instruction set.
#pragma once

#include <cstdint>

#include "cpu/row_kernels.h"

namespace mooring {

// Per channel: y = (x - shift) scale + offset.
struct ChannelAffine {
    const float* shift;
    const float* scale;
    const float* offset;
};

// One table per instruction set, indexed by the DType of x and y. Sums are of d = x - shift and of d^2.
struct BatchnormKernels {
    // `count` planes of P elements, of the channels channel, channel + 1, ... C - 1, 0, 1, ...; plane i adds
    // nothing: it writes s1[i] and s2[i].
    void (*planes[kDTypes])(const void* x, void* y, const ChannelAffine& affine, int64_t channel,
                            int64_t count, int64_t C, int64_t P, float* s1, float* s2);
    // `rows` rows of C elements, one of each channel; writes s1[c] and s2[c]. At most 256 rows, in fp32.
    void (*rows[kDTypes])(const void* x, void* y, const ChannelAffine& affine, int64_t rows, int64_t C,
                          float* s1, float* s2);
};

namespace scalar {
extern const BatchnormKernels batchnorm_kernels;
}
#ifdef MOORING_X86
namespace avx2 {
extern const BatchnormKernels batchnorm_kernels;
}
namespace avx512 {
extern const BatchnormKernels batchnorm_kernels;
}
#endif

// The table of the active capability.
const BatchnormKernels& batchnorm_kernels();

}  // namespace mooring
