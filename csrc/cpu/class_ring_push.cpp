#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace mooring {

void class_ring_push(const std::vector<ClassRingField>& fields, int64_t* bank_labels, int64_t* heads,
                     const int64_t* labels, int64_t* slots, int64_t C, int64_t K, int64_t B, bool normalise,
                     int threads) {
    constexpr float kEps = 1e-12f;
    const RowKernels& kernels = row_kernels();
    std::vector<int64_t> left(static_cast<size_t>(C), 0);  // rows of each class that are still to come
    for (int64_t i = 0; i < B; ++i) {
        if (is_class(labels[i], C)) ++left[static_cast<size_t>(labels[i])];
    }
    for (int64_t i = 0; i < B; ++i) {
        slots[i] = -1;
        if (!is_class(labels[i], C)) continue;
        int64_t& head = heads[labels[i]];
        head = (head % K + K) % K;  // never past the ring, whatever the caller holds
        if (--left[static_cast<size_t>(labels[i])] < K) {
            slots[i] = labels[i] * K + head;
            bank_labels[slots[i]] = labels[i];
        }
        head = (head + 1) % K;
    }
    int64_t elements = 0;
    for (const ClassRingField& field : fields) elements += B * field.P * field.D;
    const int workers = useful_threads(threads, elements);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t i = 0; i < B; ++i) {
        if (slots[i] < 0) continue;
        for (const ClassRingField& field : fields) {
            const DType from = field.rows.dtype, to = field.bank_dtype;
            for (int64_t p = 0; p < field.P; ++p) {
                const void* row = row_at(field.rows.data, from, i * field.P + p, field.D);
                float factor = 1.0f;
                if (normalise) {
                    const float norm = row_norm(kernels, row, from, field.D);
                    factor = 1.0f / (norm < kEps ? kEps : norm);
                }
                kernels.scale[index_of(to)][index_of(from)](
                    row_at(field.bank, to, slots[i] * field.P + p, field.D), row, factor, field.D);
            }
        }
    }
}

}  // namespace mooring
