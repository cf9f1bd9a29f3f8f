#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace mooring {

void ring_push(const std::vector<RingField>& fields, int64_t* bank_labels, const int64_t* labels, int64_t K,
               int64_t B, int64_t head, bool normalise, int threads) {
    constexpr float kEps = 1e-12f;
    const RowKernels& kernels = row_kernels();
    int64_t elements = 0;
    for (const RingField& field : fields) elements += B * field.D;
    const int workers = useful_threads(threads, elements);
    const auto& variants = exceeds_caches(elements, DType::f32) ? kernels.scale_streamed : kernels.scale;
#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < B; ++i) {
            const int64_t slot = (head + i) % K;
            bank_labels[slot] = labels[i];
            for (const RingField& field : fields) {
                const DType from = field.rows.dtype;
                const void* row = row_at(field.rows.data, from, i, field.D);
                float factor = 1.0f;
                if (normalise) {
                    const float norm = row_norm(kernels, row, from, field.D);
                    factor = 1.0f / (norm < kEps ? kEps : norm);
                }
                void* target = row_at(field.bank, field.bank_dtype, slot, field.D);
                variants[index_of(field.bank_dtype)][index_of(from)](target, row, factor, field.D);
            }
        }
        kernels.fence();
    }
}

}  // namespace mooring
