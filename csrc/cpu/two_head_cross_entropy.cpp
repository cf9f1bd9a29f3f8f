#include "cpu/two_head_cross_entropy.h"

#include <algorithm>
#include <cstring>

#include "cpu/cross_entropy_row.h"
#include "cpu/parallel.h"
#include "cpu/row_mean.h"
#include "cpu/wide_row.h"

namespace mooring {

namespace {

// Wide enough for the rows of either head.
std::vector<float> buffer_for(const HeadRows& target, const HeadRows& source) {
    return std::vector<float>(std::max(wide_buffer(target.logits.dtype, target.C).size(),
                                       wide_buffer(source.logits.dtype, source.C).size()));
}

}  // namespace

void two_head_cross_entropy_forward(HeadRows target, HeadRows source, float weight, float smoothing,
                                    TwoHeadLosses losses, float* inverse_counts, float* lse, int threads) {
    const RowKernels& kernels = row_kernels();
    const int64_t rows = target.rows + source.rows;
    std::vector<float> loss_rows(static_cast<size_t>(rows));
    const int workers = useful_threads(threads, target.rows * target.C + source.rows * source.C);
#pragma omp parallel num_threads(workers)
    {
        std::vector<float> buffer = buffer_for(target, source);
        // one row after the other to each thread: the rows of the heads differ in length
#pragma omp for schedule(static, 1)
        for (int64_t n = 0; n < rows; ++n) {
            const HeadRows& head = n < target.rows ? target : source;
            const int64_t i = n < target.rows ? n : n - target.rows;
            lse[n] = 0.0f;
            if (!is_class(head.labels[i], head.C)) continue;
            const float* x = wide_row(kernels, head.logits, i, head.C, buffer.data());
            const CrossEntropyRow row = cross_entropy_row(kernels, x, head.labels[i], smoothing, head.C);
            loss_rows[static_cast<size_t>(n)] = row.loss;
            lse[n] = row.lse;
        }
    }
    mean_of_valid_rows(loss_rows.data(), target.labels, target.rows, target.C, losses.target, inverse_counts);
    mean_of_valid_rows(loss_rows.data() + target.rows, source.labels, source.rows, source.C, losses.source,
                       inverse_counts + 1);
    *losses.both = *losses.target + weight * *losses.source;
}

void two_head_cross_entropy_backward(HeadRows target, HeadRows source, const float* lse, float target_scale,
                                     float source_scale, float smoothing, void* grad_target,
                                     void* grad_source, int threads) {
    const RowKernels& kernels = row_kernels();
    const int workers = useful_threads(threads, target.rows * target.C + source.rows * source.C);
#pragma omp parallel num_threads(workers)
    {
        std::vector<float> buffer = buffer_for(target, source);
#pragma omp for schedule(static, 1)
        for (int64_t n = 0; n < target.rows + source.rows; ++n) {
            const bool is_target = n < target.rows;
            const HeadRows& head = is_target ? target : source;
            const int64_t i = is_target ? n : n - target.rows;
            void* out = is_target ? grad_target : grad_source;
            if (!out) continue;
            const DType dtype = head.logits.dtype;
            if (!is_class(head.labels[i], head.C)) {
                std::memset(row_at(out, dtype, i, head.C), 0,
                            static_cast<size_t>(head.C * element_size(dtype)));
                continue;
            }
            const float* x = wide_row(kernels, head.logits, i, head.C, buffer.data());
            float* grad = result_row(out, dtype, i, head.C, buffer.data());
            cross_entropy_row_grad(kernels, grad, x, head.labels[i], lse[n],
                                   is_target ? target_scale : source_scale, smoothing, head.C);
            round_row(kernels, out, dtype, i, head.C, grad);
        }
    }
}

}  // namespace mooring
