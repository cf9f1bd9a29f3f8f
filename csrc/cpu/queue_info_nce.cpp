// Flash-style pass over the queue: tiles of its rows against panels of queries. A panel's queries lie side by
// side in vector lanes, so that the queue is read where it lies, without packing, and the softmax over its
// rows runs down the columns of a tile of logits. The sum of softmax-weighted rows, which is half of the
// gradient, is formed in the same pass.
#include "cpu/queue_info_nce.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#ifdef _OPENMP
#    include <omp.h>
#endif

#include "cpu/parallel.h"
#include "cpu/queue_tile_kernels.h"
#include "cpu/row_pointer.h"

namespace mooring {

namespace {

constexpr int64_t kTile = 64;    // queue rows at once: their exponentials stay in the first-level cache
constexpr int64_t kTerms = 128;  // features at once, for the same reason
constexpr int64_t kTasks =
    16;  // pieces of work for the threads; fixed, so that no sum depends on their number
constexpr int64_t kLeastRows = 256;  // of a chunk of the queue: below, adding up the pieces costs more

// How the work is cut: panels of queries times chunks of the queue.
struct Plan {
    int64_t lanes, panels, chunks;
    int64_t query_floats, part_floats, scratch_floats;
    bool weighted;  // the sum of softmax-weighted rows is wanted

    Plan(int64_t B, int64_t N, int64_t D, bool weighted_) : weighted(weighted_) {
        const QueueTileKernels& kernels = queue_tile_kernels();
        const int64_t vectors = std::max<int64_t>((B + kernels.width - 1) / kernels.width, 1);
        panels = (vectors + kernels.most_vectors - 1) / kernels.most_vectors;
        lanes = (vectors + panels - 1) / panels * kernels.width;
        chunks = std::max<int64_t>(std::min((kTasks + panels - 1) / panels, N / kLeastRows), 1);
        query_floats = panels * D * lanes;
        part_floats = (2 + (weighted ? D : 0)) * lanes;  // peak, total, weighted sum
        scratch_floats = kTile * (lanes + D) + 2 * lanes;
    }
    int64_t tasks() const { return panels * chunks; }
};

// The queue's rows begin..end-1 that are not empty, in fp32: where they lie, or gathered.
int64_t present_rows(const QueueRows& rows, int64_t begin, int64_t end, float* gathered, const float** out) {
    const RowKernels& kernels = row_kernels();
    const DType dtype = rows.queue.dtype;
    int64_t present = 0;
    for (int64_t j = begin; j < end; ++j) present += rows.queue_labels[j] >= 0;
    if (present == end - begin && dtype == DType::f32) {
        *out = static_cast<const float*>(row_at(rows.queue.data, dtype, begin, rows.D));
        return present;
    }
    float* to = gathered;
    for (int64_t j = begin; j < end; ++j) {
        if (rows.queue_labels[j] < 0) continue;
        kernels.scale[index_of(DType::f32)][index_of(dtype)](to, row_at(rows.queue.data, dtype, j, rows.D),
                                                             1.0f, rows.D);
        to += rows.D;
    }
    *out = gathered;
    return present;
}

// Peak, total and weighted sum [D, lanes] of one chunk for one panel of queries [D, lanes].
void pass_over_chunk(const QueueRows& rows, const Plan& plan, const float* queries, int64_t begin,
                     int64_t end, float* part, float* scratch) {
    const QueueTileKernels& kernels = queue_tile_kernels();
    const int64_t lanes = plan.lanes, D = rows.D;
    float *peak = part, *total = part + lanes, *weighted = part + 2 * lanes;
    float *logits = scratch, *gathered = logits + kTile * lanes, *shrink = gathered + kTile * D,
          *ones = shrink + lanes;
    std::fill(peak, peak + lanes, -std::numeric_limits<float>::infinity());
    std::fill(total, total + lanes, 0.0f);
    if (plan.weighted) std::fill(weighted, weighted + D * lanes, 0.0f);
    std::fill(ones, ones + lanes, 1.0f);
    for (int64_t tile = begin; tile < end; tile += kTile) {
        const float* keys;
        const int64_t present = present_rows(rows, tile, std::min(tile + kTile, end), gathered, &keys);
        if (present == 0) continue;
        for (int64_t d = 0; d < D; d += kTerms) {
            kernels.product(logits, d == 0 ? nullptr : ones, keys + d, D, 1, queries + d * lanes, present,
                            std::min(kTerms, D - d), lanes);
        }
        kernels.online_softmax(logits, peak, total, shrink, present, lanes);
        if (plan.weighted) kernels.product(weighted, shrink, keys, 1, D, logits, D, present, lanes);
    }
}

// Adds up the chunks of one panel into the first one's part, in order.
void add_chunks(const Plan& plan, int64_t D, float* parts) {
    const int64_t lanes = plan.lanes;
    for (int64_t c = 1; c < plan.chunks; ++c) {
        float *peak = parts, *total = parts + lanes;
        const float* other = parts + c * plan.part_floats;
        for (int64_t l = 0; l < lanes; ++l) {
            const float highest = std::max(peak[l], other[l]);
            // neither has seen a row yet: exp(-inf + inf) would be NaN
            const bool none = highest == -std::numeric_limits<float>::infinity();
            const float mine = none ? 0.0f : std::exp(peak[l] - highest);
            const float theirs = none ? 0.0f : std::exp(other[l] - highest);
            total[l] = mine * total[l] + theirs * other[lanes + l];
            if (plan.weighted) {
                for (int64_t d = 2; d < D + 2; ++d) {
                    float& sum = parts[d * lanes + l];
                    sum = mine * sum + theirs * other[d * lanes + l];
                }
            }
            peak[l] = highest;
        }
    }
}

// Loss and gradients of query i from what the pass over the queue found.
void finish_query(const QueueRows& rows, const Plan& plan, const QueueLosses& out, const float* part,
                  int64_t lane, int64_t i) {
    const RowKernels& kernels = row_kernels();
    const QueueTileKernels& tile_kernels = queue_tile_kernels();
    const int64_t D = rows.D, label = rows.labels[i];
    const float* query = rows.query + i * D;
    const float* own = rows.own ? rows.own + i * D : nullptr;
    float* grad = out.grad_query ? out.grad_query + i * D : nullptr;
    out.loss[i] = out.positives[i] = 0.0f;
    if (out.own_factor) out.own_factor[i] = 0.0f;
    if (grad) std::fill(grad, grad + D, 0.0f);
    if (label < 0) return;

    const int dtype = index_of(rows.queue.dtype);
    double positive_sum = 0.0, own_logit = 0.0;
    int64_t positives = 0;
    for (int64_t j = tile_kernels.next_match(rows.queue_labels, 0, rows.N, label); j < rows.N;
         j = tile_kernels.next_match(rows.queue_labels, j + 1, rows.N, label)) {
        const void* key = row_at(rows.queue.data, rows.queue.dtype, j, D);
        positive_sum += kernels.dot[dtype](key, query, D);
        if (grad) kernels.accumulate[dtype](grad, 1.0f, key, D);
        ++positives;
    }
    positive_sum *= rows.inverse_temperature;
    if (own) {
        own_logit = static_cast<double>(kernels.dot[0](own, query, D)) * rows.inverse_temperature;
        positive_sum += own_logit;
        if (grad) kernels.accumulate[0](grad, 1.0f, own, D);
        ++positives;
    }
    if (positives == 0) return;

    // -inf and 0 where the queue holds no row; the own key, always there then, replaces them
    double peak = part[lane], total = part[plan.lanes + lane], shrink = 1.0, own_term = 0.0;
    if (own) {
        const double highest = std::max(peak, own_logit);
        shrink = total == 0.0 ? 0.0 : std::exp(peak - highest);
        own_term = std::exp(own_logit - highest);
        total = shrink * total + own_term;
        peak = highest;
    }
    const double share = 1.0 / static_cast<double>(positives);
    out.loss[i] = static_cast<float>(std::log(total) + (peak - positive_sum * share) + std::log(share));
    out.positives[i] = static_cast<float>(positives);
    if (out.own_factor) {
        out.own_factor[i] = static_cast<float>((own_term / total - share) * rows.inverse_temperature);
    }
    if (grad) {
        const double over_temperature = rows.inverse_temperature;
        kernels.affine(grad, static_cast<float>(-share * over_temperature), 0.0f, D);
        const float* weighted = part + 2 * plan.lanes + lane;
        const float factor = static_cast<float>(shrink / total * over_temperature);
        for (int64_t d = 0; d < D; ++d) grad[d] += factor * weighted[d * plan.lanes];
        if (own) kernels.accumulate[0](grad, static_cast<float>(own_term / total * over_temperature), own, D);
    }
}

}  // namespace

int64_t queue_info_nce_workspace(int64_t B, int64_t N, int64_t D, bool grad_query, int threads) {
    const Plan plan(B, N, D, grad_query);
    return plan.query_floats + plan.tasks() * plan.part_floats + threads * plan.scratch_floats;
}

void queue_info_nce(const QueueRows& rows, const QueueLosses& out, float* workspace, int threads) {
    const Plan plan(rows.B, rows.N, rows.D, out.grad_query != nullptr);
    const int64_t lanes = plan.lanes, D = rows.D;
    float *queries = workspace, *parts = queries + plan.query_floats,
          *scratch = parts + plan.tasks() * plan.part_floats;
    // [panels, D, lanes], over the temperature; masked queries and lanes without one are zero
    for (int64_t i = 0; i < plan.panels * lanes; ++i) {
        float* column = queries + (i / lanes * D) * lanes + i % lanes;
        const bool present = i < rows.B && rows.labels[i] >= 0;
        for (int64_t d = 0; d < D; ++d) {
            column[d * lanes] = present ? rows.query[i * D + d] * rows.inverse_temperature : 0.0f;
        }
    }
    const int workers = useful_threads(threads, rows.N * D);
    const int64_t tiles = (rows.N + kTile - 1) / kTile;
#pragma omp parallel num_threads(workers)
    {
#ifdef _OPENMP
        float* own_scratch = scratch + omp_get_thread_num() * plan.scratch_floats;
#else
        float* own_scratch = scratch;
#endif
#pragma omp for schedule(static)
        for (int64_t task = 0; task < plan.tasks(); ++task) {
            const int64_t panel = task / plan.chunks, chunk = task % plan.chunks;
            const int64_t begin = tiles * chunk / plan.chunks * kTile;
            const int64_t end = std::min(tiles * (chunk + 1) / plan.chunks * kTile, rows.N);
            pass_over_chunk(rows, plan, queries + panel * D * lanes, begin, end,
                            parts + task * plan.part_floats, own_scratch);
        }
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < plan.panels; ++panel) {
            add_chunks(plan, D, parts + panel * plan.chunks * plan.part_floats);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.B; ++i) {
            finish_query(rows, plan, out, parts + i / lanes * plan.chunks * plan.part_floats, i % lanes, i);
        }
    }
}

}  // namespace mooring
