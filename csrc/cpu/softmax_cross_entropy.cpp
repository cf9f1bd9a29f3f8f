#include <cmath>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "cpu/row_pointer.h"

namespace mooring {

void softmax_cross_entropy_in_place(float* logits, int64_t stride, const int64_t* labels, float smoothing,
                                    bool gradient, float* loss, int64_t N, int64_t C, int threads) {
    const RowKernels& kernels = row_kernels();
    const float uniform = smoothing / static_cast<float>(C);
    const int workers = useful_threads(threads, N * C);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t i = 0; i < N; ++i) {
        float* x = logits + i * stride;
        loss[i] = 0.0f;
        if (!is_class(labels[i], C)) {
            for (int64_t j = 0; gradient && j < C; ++j) x[j] = 0.0f;
            continue;
        }
        const float highest = kernels.maximum(x, C);
        const float target = x[labels[i]] - highest;
        const float mean = smoothing == 0.0f ? 0.0f : kernels.sum(x, C) / static_cast<float>(C) - highest;
        const float total = gradient ? kernels.exp_and_sum(x, highest, C) : kernels.sum_exp(x, highest, C);
        loss[i] = std::log(total) - (1.0f - smoothing) * target - smoothing * mean;
        if (!gradient) continue;
        kernels.affine(x, 1.0f / total, -uniform, C);
        x[labels[i]] -= 1.0f - smoothing;
    }
}

}  // namespace mooring
