#include "cpu/huge_pages.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace mooring {

void row_normalise_forward(Matrix x, float eps, void* unit, float* norm, int64_t N, int64_t D, int threads) {
    const RowKernels& kernels = row_kernels();
    const auto& variants = exceeds_caches(N * D, x.dtype) ? kernels.scale_streamed : kernels.scale;
    const auto scale = variants[index_of(x.dtype)][index_of(x.dtype)];
    prefer_huge_pages(unit, N * D * element_size(x.dtype));
    const int workers = useful_threads(threads, N * D);
#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < N; ++i) {
            const void* row = row_at(x.data, x.dtype, i, D);
            norm[i] = row_norm(kernels, row, x.dtype, D);
            scale(row_at(unit, x.dtype, i, D), row, 1.0f / (norm[i] < eps ? eps : norm[i]), D);
        }
        kernels.fence();
    }
}

void row_normalise_backward(const void* grad_unit, const float* grad_norm, const void* unit,
                            const float* norm, DType dtype, float eps, void* grad_x, int64_t N, int64_t D,
                            int threads) {
    const RowKernels& kernels = row_kernels();
    const auto& variants = exceeds_caches(N * D, dtype) ? kernels.combine_streamed : kernels.combine;
    const auto combine = variants[index_of(dtype)];
    const auto dot = kernels.dot[index_of(dtype)];
    const auto widen = kernels.scale[index_of(DType::f32)][index_of(dtype)];
    prefer_huge_pages(grad_x, N * D * element_size(dtype));
    const int workers = useful_threads(threads, N * D);
#pragma omp parallel num_threads(workers)
    {
        std::vector<float> wide(static_cast<size_t>(D));
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < N; ++i) {
            const void* g = row_at(grad_unit, dtype, i, D);
            const void* u = row_at(unit, dtype, i, D);
            // A clamped row is x / eps: its direction is free, and x / |x| = unit * eps / |x|.
            const bool clamped = norm[i] < eps;
            const float inverse = 1.0f / (clamped ? eps : norm[i]);
            float along = 0.0f;
            if (clamped) {
                along = norm[i] > 0.0f ? grad_norm[i] * (eps / norm[i]) : 0.0f;
            } else {
                widen(wide.data(), u, 1.0f, D);
                along = grad_norm[i] - inverse * dot(g, wide.data(), D);
            }
            combine(row_at(grad_x, dtype, i, D), inverse, g, along, u, D);
        }
        kernels.fence();
    }
}

}  // namespace mooring
