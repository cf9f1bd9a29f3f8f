#include <cmath>

#include "cpu/huge_pages.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/row_pointer.h"

namespace mooring {
namespace {

void fill_zero(float* row, int64_t D) {
    for (int64_t j = 0; j < D; ++j) row[j] = 0.0f;
}

void place_row(const RowKernels& kernels, float* row, const float* mean, float scale, int64_t D) {
    constexpr float kEps = 1e-12f;
    const float norm = std::sqrt(kernels.add_and_sum_squares(row, mean, D));
    const float factor = scale / (norm < kEps ? kEps : norm);
    kernels.scale[index_of(DType::f32)][index_of(DType::f32)](row, row, factor, D);
}

}  // namespace

void calibrate_residual(Matrix frozen, const int64_t* labels, const float* frozen_mean, float* out, int64_t K,
                        int64_t D, int64_t C, int threads) {
    const auto subtract = row_kernels().subtract[index_of(frozen.dtype)];
    prefer_huge_pages(out, K * D * element_size(DType::f32));
    const int workers = useful_threads(threads, K * D);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t k = 0; k < K; ++k) {
        if (is_class(labels[k], C)) {
            subtract(out + k * D, row_at(frozen.data, frozen.dtype, k, D), frozen_mean + labels[k] * D, D);
        } else {
            fill_zero(out + k * D, D);
        }
    }
}

void calibrate_place(float* rows, const int64_t* labels, const float* tuned_mean, float scale, int64_t K,
                     int64_t D, int64_t C, int threads) {
    const RowKernels& kernels = row_kernels();
    const int workers = useful_threads(threads, K * D);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t k = 0; k < K; ++k) {
        if (is_class(labels[k], C)) {
            place_row(kernels, rows + k * D, tuned_mean + labels[k] * D, scale, D);
        } else {
            fill_zero(rows + k * D, D);
        }
    }
}

void calibrate_translate(Matrix frozen, const int64_t* labels, const float* frozen_mean,
                         const float* tuned_mean, float scale, float* out, int64_t K, int64_t D, int64_t C,
                         int threads) {
    const RowKernels& kernels = row_kernels();
    const auto subtract = kernels.subtract[index_of(frozen.dtype)];
    prefer_huge_pages(out, K * D * element_size(DType::f32));
    const int workers = useful_threads(threads, K * D);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t k = 0; k < K; ++k) {
        float* row = out + k * D;
        if (is_class(labels[k], C)) {
            subtract(row, row_at(frozen.data, frozen.dtype, k, D), frozen_mean + labels[k] * D, D);
            place_row(kernels, row, tuned_mean + labels[k] * D, scale, D);
        } else {
            fill_zero(row, D);
        }
    }
}

}  // namespace mooring
