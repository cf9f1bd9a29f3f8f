#pragma once

#include "cpu/ops.h"

namespace mooring {

// Queries against a queue. A query whose label is negative is masked; a queue row whose label is negative is
// empty: neither is read.
struct QueueRows {
    const float* query;     // [B, D]
    const float* own;       // [B, D], one more positive of each query, or null
    const int64_t* labels;  // [B]
    Matrix queue;           // [N, D]
    const int64_t* queue_labels;
    int64_t B, N, D;
    float inverse_temperature;
};

// Per query, 0 where it is masked or has no positive. Of the sum of losses; either gradient may be null and
// is then not computed.
struct QueueLosses {
    float* loss;       // [B] log-sum-exp of all logits - mean of the positive ones - log(number of positives)
    float* positives;  // [B] how many
    float* grad_query;  // [B, D]
    float* own_factor;  // [B], the gradient of own is own_factor times the query
};

// Floats of workspace; it depends neither on N, beyond a small bound, nor on B beyond the rounding of the
// queries.
int64_t queue_info_nce_workspace(int64_t B, int64_t N, int64_t D, bool grad_query, int threads);

void queue_info_nce(const QueueRows& rows, const QueueLosses& out, float* workspace, int threads);

}  // namespace mooring
