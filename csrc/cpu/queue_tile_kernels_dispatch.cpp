#include "cpu/queue_tile_kernels.h"

#include "cpu/capability.h"

namespace mooring {

#ifdef MOORING_X86
namespace avx2 {
extern const QueueTileKernels queue_tile_kernels;
}
namespace avx512 {
extern const QueueTileKernels queue_tile_kernels;
}
#endif
namespace scalar {
extern const QueueTileKernels queue_tile_kernels;
}

const QueueTileKernels& queue_tile_kernels() {
    switch (active_capability()) {
#ifdef MOORING_X86
        case Capability::avx512:
            return avx512::queue_tile_kernels;
        case Capability::avx2:
            return avx2::queue_tile_kernels;
#endif
        default:
            return scalar::queue_tile_kernels;
    }
}

}  // namespace mooring
