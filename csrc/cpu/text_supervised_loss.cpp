#include "cpu/text_supervised_loss.h"

#include <cmath>
#include <cstring>

#include "cpu/capability.h"
#include "cpu/parallel.h"
#include "cpu/row_mean.h"
#include "cpu/softmax_pair_kernels.h"
#include "cpu/wide_row.h"

namespace mooring {

namespace scalar {
extern const SoftmaxPairKernels softmax_pair_kernels;
}
#ifdef MOORING_X86
namespace avx2 {
extern const SoftmaxPairKernels softmax_pair_kernels;
}
namespace avx512 {
extern const SoftmaxPairKernels softmax_pair_kernels;
}
#endif

const SoftmaxPairKernels& softmax_pair_kernels() {
    switch (active_capability()) {
#ifdef MOORING_X86
        case Capability::avx512:
            return avx512::softmax_pair_kernels;
        case Capability::avx2:
            return avx2::softmax_pair_kernels;
#endif
        default:
            return scalar::softmax_pair_kernels;
    }
}

void text_supervised_loss_forward(Matrix logits, Matrix cosines, const int64_t* labels, TextSupervision by,
                                  float* loss, float* inverse_count, float* lse_logits, float* lse_texts,
                                  int64_t B, int64_t C, int threads) {
    const RowKernels& kernels = row_kernels();
    const SoftmaxPairKernels& pair = softmax_pair_kernels();
    const float k = by.inverse_tau;
    std::vector<float> loss_rows(static_cast<size_t>(B));
    const int workers = useful_threads(threads, 2 * B * C);
#pragma omp parallel num_threads(workers)
    {
        std::vector<float> z_buffer = wide_buffer(logits.dtype, C), v_buffer = wide_buffer(cosines.dtype, C);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B; ++i) {
            lse_logits[i] = lse_texts[i] = 0.0f;
            const int64_t y = labels[i];
            if (!is_class(y, C)) continue;
            const float* z = wide_row(kernels, logits, i, C, z_buffer.data());
            const float* v = wide_row(kernels, cosines, i, C, v_buffer.data());
            const SoftmaxPair s = pair.sums(z, v, k, C);
            const float log_z = std::log(s.total_z), log_v = std::log(s.total_v);
            lse_logits[i] = s.peak_z + log_z;
            lse_texts[i] = k * s.peak_v + log_v;
            float row = log_z - (1.0f - by.lambda_v) * (z[y] - s.peak_z);
            // a weight of 0 asks for nothing of that term, also where it is infinite
            if (by.lambda_v != 0.0f) row -= by.lambda_v * (s.mixed / s.total_v);
            if (by.lambda_t != 0.0f) row += by.lambda_t * (log_v - k * (v[y] - s.peak_v));
            loss_rows[static_cast<size_t>(i)] = row;
        }
    }
    mean_of_valid_rows(loss_rows.data(), labels, B, C, loss, inverse_count);
}

void text_supervised_loss_backward(Matrix logits, Matrix cosines, const int64_t* labels,
                                   const float* lse_logits, const float* lse_texts, TextSupervision by,
                                   float scale, void* grad_logits, void* grad_cosines, int64_t B, int64_t C,
                                   int threads) {
    const RowKernels& kernels = row_kernels();
    const SoftmaxPairKernels& pair = softmax_pair_kernels();
    const float k = by.inverse_tau, text_scale = scale * by.lambda_t * k;
    const int workers = useful_threads(threads, 2 * B * C);
#pragma omp parallel num_threads(workers)
    {
        std::vector<float> z_buffer = wide_buffer(logits.dtype, C), v_buffer = wide_buffer(cosines.dtype, C);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B; ++i) {
            const int64_t y = labels[i];
            if (!is_class(y, C)) {
                const auto clear = [&](void* out, DType dtype) {
                    if (out)
                        std::memset(row_at(out, dtype, i, C), 0,
                                    static_cast<size_t>(C * element_size(dtype)));
                };
                clear(grad_logits, logits.dtype);
                clear(grad_cosines, cosines.dtype);
                continue;
            }
            const float* z = wide_row(kernels, logits, i, C, z_buffer.data());
            const float* v = wide_row(kernels, cosines, i, C, v_buffer.data());
            // a widened row is overwritten by its gradient: each column is read before it is written
            float* grad_z =
                grad_logits ? result_row(grad_logits, logits.dtype, i, C, z_buffer.data()) : nullptr;
            float* grad_v =
                grad_cosines ? result_row(grad_cosines, cosines.dtype, i, C, v_buffer.data()) : nullptr;
            pair.grads(grad_z, grad_v, z, v, k, lse_logits[i], lse_texts[i], scale, by.lambda_v, text_scale,
                       C);
            if (grad_z) {
                grad_z[y] -= scale * (1.0f - by.lambda_v);
                round_row(kernels, grad_logits, logits.dtype, i, C, grad_z);
            }
            if (grad_v) {
                grad_v[y] -= text_scale;
                round_row(kernels, grad_cosines, cosines.dtype, i, C, grad_v);
            }
        }
    }
}

}  // namespace mooring
