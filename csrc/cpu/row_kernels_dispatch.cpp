#include "cpu/capability.h"
#include "cpu/row_kernels.h"

namespace mooring {

const RowKernels& row_kernels() {
    switch (active_capability()) {
#ifdef MOORING_X86
        case Capability::avx512:
            return avx512::row_kernels;
        case Capability::avx2:
            return avx2::row_kernels;
#endif
        default:
            return scalar::row_kernels;
    }
}

}  // namespace mooring
