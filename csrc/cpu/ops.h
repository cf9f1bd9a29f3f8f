// The CPU ops behind mooring_kernels._C. Dimension letters as in kernels/README.md; all matrices are
// row-major and contiguous; labels are int64 and a row whose label is outside 0..C-1 is masked.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/row_kernels.h"

namespace mooring {

// A read-only [rows, D] matrix of either storage type.
struct Matrix {
    const void* data;
    DType dtype;
};

// norm[i] = |x_i|, unit[i] = x_i / max(norm[i], eps). unit has the dtype of x.
void row_normalise_forward(Matrix x, float eps, void* unit, float* norm, int64_t N, int64_t D, int threads);

// Gradient of the above: grad_unit, unit and grad_x have one dtype; grad_norm is fp32 [N].
void row_normalise_backward(const void* grad_unit, const float* grad_norm, const void* unit,
                            const float* norm, DType dtype, float eps, void* grad_x, int64_t N, int64_t D,
                            int threads);

// One field of a bank and the rows to put into it.
struct RingField {
    void* bank;  // [K, D]
    DType bank_dtype;
    Matrix rows;  // [B, D]
    int64_t D;
};

// Row i goes to slot (head + i) mod K, unit length if `normalise`; B <= K.
void ring_push(const std::vector<RingField>& fields, int64_t* bank_labels, const int64_t* labels, int64_t K,
               int64_t B, int64_t head, bool normalise, int threads);

// One field of a bank with a ring per class; a row is P vectors of D.
struct ClassRingField {
    void* bank;  // [C, K, P, D]
    DType bank_dtype;
    Matrix rows;  // [B, P, D]
    int64_t P, D;
};

// Row i goes to slot (heads[c] + earlier rows of its class c) mod K of c, its vectors at unit length if
// `normalise`, unless K later rows have the same class or its label is none; bank_labels [C, K]. slots[i] is
// the flat slot or -1. heads [C] move on.
void class_ring_push(const std::vector<ClassRingField>& fields, int64_t* bank_labels, int64_t* heads,
                     const int64_t* labels, int64_t* slots, int64_t C, int64_t K, int64_t B, bool normalise,
                     int threads);

// frozen_mean[c] = mean of frozen rows with label c; tuned_mean[c] = mean of tuned rows weighted by
// exp(cga_scale * tuned_k . head_weight_c / |head_weight_c|); count[c] = their number. Zero where count is.
void class_statistics(Matrix frozen, Matrix tuned, const int64_t* labels, const float* head_weight,
                      float cga_scale, float* frozen_mean, float* tuned_mean, float* count, int64_t K,
                      int64_t D, int64_t C, int threads);

// out[k] = frozen[k] - frozen_mean[label]; zero rows where masked.
void calibrate_residual(Matrix frozen, const int64_t* labels, const float* frozen_mean, float* out, int64_t K,
                        int64_t D, int64_t C, int threads);

// rows[k] = scale * v / max(|v|, 1e-12) with v = rows[k] + tuned_mean[label]; zero rows where masked.
void calibrate_place(float* rows, const int64_t* labels, const float* tuned_mean, float scale, int64_t K,
                     int64_t D, int64_t C, int threads);

// Both of the above with no rotation between them: each row is read from memory once.
void calibrate_translate(Matrix frozen, const int64_t* labels, const float* frozen_mean,
                         const float* tuned_mean, float scale, float* out, int64_t K, int64_t D, int64_t C,
                         int threads);

// loss[i] = log sum_c exp(x_ic) - (1 - s) x_iy - (s / C) sum_c x_ic, zero where masked. Each row of logits,
// `stride` floats apart, becomes softmax(x_i) - (1 - s) onehot(y_i) - s / C, zero where masked, or is left as
// it is where no gradient is wanted.
void softmax_cross_entropy_in_place(float* logits, int64_t stride, const int64_t* labels, float smoothing,
                                    bool gradient, float* loss, int64_t N, int64_t C, int threads);

}  // namespace mooring
