#pragma once

#include "cpu/ops.h"

namespace mooring {

// a = inverse_tau * cosines, r = softmax(a), and per row whose label y is a class
//   lse(z) - (1 - lambda_v) z_y - lambda_v sum_j r_j z_j + lambda_t (lse(a) - a_y).
struct TextSupervision {
    float inverse_tau, lambda_v, lambda_t;
};

// loss = mean over the valid rows (0 where there are none), inverse_count = 1 / max(their number, 1);
// lse_logits and lse_texts [B] are what the backward needs, 0 where masked.
void text_supervised_loss_forward(Matrix logits, Matrix cosines, const int64_t* labels, TextSupervision by,
                                  float* loss, float* inverse_count, float* lse_logits, float* lse_texts,
                                  int64_t B, int64_t C, int threads);

// Gradients times `scale`, in the dtypes of logits and cosines; r is a constant in that of the logits. Zero
// rows where masked. Either output may be null and is then not computed.
void text_supervised_loss_backward(Matrix logits, Matrix cosines, const int64_t* labels,
                                   const float* lse_logits, const float* lse_texts, TextSupervision by,
                                   float scale, void* grad_logits, void* grad_cosines, int64_t B, int64_t C,
                                   int threads);

}  // namespace mooring
