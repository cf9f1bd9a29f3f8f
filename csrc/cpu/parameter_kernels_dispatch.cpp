#include "cpu/capability.h"
#include "cpu/parameter_kernels.h"

namespace mooring {

const ParameterKernels& parameter_kernels() {
    switch (active_capability()) {
#ifdef MOORING_X86
        case Capability::avx512:
            return avx512::parameter_kernels;
        case Capability::avx2:
            return avx2::parameter_kernels;
#endif
        default:
            return scalar::parameter_kernels;
    }
}

}  // namespace mooring
