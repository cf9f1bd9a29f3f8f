#include "cpu/capability.h"
#include "cpu/patch_match_kernels.h"

namespace mooring {

const PatchMatchKernels& patch_match_kernels() {
    switch (active_capability()) {
#ifdef MOORING_X86
        case Capability::avx512:
            return avx512::patch_match_kernels;
        case Capability::avx2:
            return avx2::patch_match_kernels;
#endif
        default:
            return scalar::patch_match_kernels;
    }
}

}  // namespace mooring
