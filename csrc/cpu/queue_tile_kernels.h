// Products of a tile of queue rows with queries that lie side by side in vector lanes, and the softmax over
// the rows that comes in tiles: what queue_info_nce needs of an instruction set.
#pragma once

#include <cstdint>

namespace mooring {

struct QueueTileKernels {
    int64_t width;         // fp32 lanes of a vector; `lanes` below is a multiple of it
    int64_t most_vectors;  // `lanes` is at most width * most_vectors: the accumulators stay in registers
    // out[r][l] = keep[l] out[r][l] + sum_t a[r row_step + t term_step] b[t][l]; without `keep` the old out
    // is not read. out and b have `lanes` columns.
    void (*product)(float* out, const float* keep, const float* a, int64_t row_step, int64_t term_step,
                    const float* b, int64_t rows, int64_t terms, int64_t lanes);
    // Each column goes on with an online softmax: peak rises to the largest s so far, s becomes
    // exp(s - peak), total = shrink total + sum s, where shrink = exp(old peak - peak). rows >= 1.
    void (*online_softmax)(float* s, float* peak, float* total, float* shrink, int64_t rows, int64_t lanes);
    // The first i in begin..n-1 with labels[i] = label, or n.
    int64_t (*next_match)(const int64_t* labels, int64_t begin, int64_t n, int64_t label);
};

// The table of the active capability.
const QueueTileKernels& queue_tile_kernels();

}  // namespace mooring
