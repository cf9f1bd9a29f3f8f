#include <cmath>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace mooring {
namespace {

// Rows in the order of their class: members of c are order[begin[c]] .. order[begin[c + 1] - 1].
struct ClassIndex {
    std::vector<int64_t> begin;
    std::vector<int64_t> order;

    ClassIndex(const int64_t* labels, int64_t K, int64_t C)
        : begin(static_cast<size_t>(C) + 1, 0), order(static_cast<size_t>(K)) {
        for (int64_t k = 0; k < K; ++k) {
            if (is_class(labels[k], C)) ++begin[static_cast<size_t>(labels[k]) + 1];
        }
        for (size_t c = 0; c < static_cast<size_t>(C); ++c) begin[c + 1] += begin[c];
        std::vector<int64_t> next(begin.begin(), begin.end() - 1);
        for (int64_t k = 0; k < K; ++k) {
            if (is_class(labels[k], C))
                order[static_cast<size_t>(next[static_cast<size_t>(labels[k])]++)] = k;
        }
    }
};

// Members whose sums are one task: with more of them a class is several tasks, whose sums are then merged, so
// that rounding grows with members / 256 + 256 and one large class does not lie on one thread.
constexpr int64_t kBlock = 256;
// Rows of the tuned bank that are read for their confidence and, while they are in cache, added up.
constexpr int kGroup = 8;

struct Block {
    int64_t c, first, members;  // members order[first] .. order[first + members - 1], all of class c
};

// Sums over members: the exponentials are relative to `highest`, the largest confidence logit so far.
struct Sums {
    float highest = -HUGE_VALF;
    float total = 0.0f;
    float* frozen;
    float* tuned;
};

// Brings `sums` to another origin of the exponentials, which is not lower; returns the factor.
float raise(Sums& sums, float highest) {
    const float decay = sums.total == 0.0f ? 0.0f : std::exp(sums.highest - highest);
    sums.highest = highest;
    sums.total *= decay;
    return decay;
}

void add_block(const RowKernels& kernels, Matrix frozen, Matrix tuned, const int64_t* order, int64_t members,
               const float* prototype, float sharpness, int64_t D, Sums& sums) {
    const auto dot = kernels.dot[index_of(tuned.dtype)];
    const float ones[kGroup] = {1, 1, 1, 1, 1, 1, 1, 1};
    for (int64_t start = 0; start < members; start += kGroup) {
        const int count = static_cast<int>(members - start < kGroup ? members - start : kGroup);
        const void *frozen_rows[kGroup], *tuned_rows[kGroup];
        float weight[kGroup];
        float highest = sums.highest;
        for (int r = 0; r < count; ++r) {
            const int64_t k = order[start + r];
            frozen_rows[r] = row_at(frozen.data, frozen.dtype, k, D);
            tuned_rows[r] = row_at(tuned.data, tuned.dtype, k, D);
            weight[r] = sharpness * dot(tuned_rows[r], prototype, D);
            highest = weight[r] > highest ? weight[r] : highest;
        }
        const float decay = raise(sums, highest);
        for (int r = 0; r < count; ++r) {
            weight[r] = std::exp(weight[r] - highest);
            sums.total += weight[r];
        }
        kernels.accumulate_rows[index_of(tuned.dtype)](sums.tuned, decay, tuned_rows, weight, count, D);
        kernels.accumulate_rows[index_of(frozen.dtype)](sums.frozen, 1.0f, frozen_rows, ones, count, D);
    }
}

}  // namespace

void class_statistics(Matrix frozen, Matrix tuned, const int64_t* labels, const float* head_weight,
                      float cga_scale, float* frozen_mean, float* tuned_mean, float* count, int64_t K,
                      int64_t D, int64_t C, int threads) {
    constexpr float kEps = 1e-12f;
    const RowKernels& kernels = row_kernels();
    const ClassIndex index(labels, K, C);
    std::vector<Block> blocks;
    std::vector<int64_t> first_block(static_cast<size_t>(C) + 1, 0);
    for (int64_t c = 0; c < C; ++c) {
        const int64_t end = index.begin[static_cast<size_t>(c) + 1];
        for (int64_t first = index.begin[static_cast<size_t>(c)]; first < end; first += kBlock) {
            blocks.push_back({c, first, end - first < kBlock ? end - first : kBlock});
        }
        first_block[static_cast<size_t>(c) + 1] = static_cast<int64_t>(blocks.size());
    }
    // The first block of a class is summed in the results themselves, each further one in a row of its own.
    std::vector<Sums> sums(blocks.size());
    int64_t further = 0;
    for (size_t b = 0; b < blocks.size(); ++b) further += b > 0 && blocks[b].c == blocks[b - 1].c;
    std::vector<float> own(static_cast<size_t>(2 * further * D), 0.0f);
    float* next = own.data();
    for (size_t b = 0; b < blocks.size(); ++b) {
        const bool in_place = b == 0 || blocks[b].c != blocks[b - 1].c;
        sums[b].frozen = in_place ? frozen_mean + blocks[b].c * D : next;
        sums[b].tuned = in_place ? tuned_mean + blocks[b].c * D : next + D;
        if (!in_place) next += 2 * D;
    }

    const int workers = useful_threads(threads, K * D);
#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; ++c) {
            const size_t at = static_cast<size_t>(c);
            count[c] = static_cast<float>(index.begin[at + 1] - index.begin[at]);
            for (int64_t j = 0; j < D; ++j) frozen_mean[c * D + j] = tuned_mean[c * D + j] = 0.0f;
        }

        // Reads each bank once. A block is summed by one thread in row order, and blocks are merged in
        // order, so the result does not depend on the number of threads.
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < static_cast<int64_t>(blocks.size()); ++b) {
            const Block& block = blocks[static_cast<size_t>(b)];
            const float* prototype = head_weight + block.c * D;
            const float norm = row_norm(kernels, prototype, DType::f32, D);
            add_block(kernels, frozen, tuned, index.order.data() + block.first, block.members, prototype,
                      cga_scale / (norm < kEps ? kEps : norm), D, sums[static_cast<size_t>(b)]);
        }

#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; ++c) {
            const size_t begin = static_cast<size_t>(first_block[static_cast<size_t>(c)]);
            const size_t end = static_cast<size_t>(first_block[static_cast<size_t>(c) + 1]);
            if (begin == end) continue;
            Sums& whole = sums[begin];
            for (size_t b = begin + 1; b < end; ++b) {
                Sums& part = sums[b];
                const float highest = part.highest > whole.highest ? part.highest : whole.highest;
                const float kept = raise(whole, highest), one = 1.0f;
                const float share = raise(part, highest);
                const void *frozen_row = part.frozen, *tuned_row = part.tuned;
                const auto add = kernels.accumulate_rows[index_of(DType::f32)];
                add(whole.tuned, kept, &tuned_row, &share, 1, D);
                add(whole.frozen, 1.0f, &frozen_row, &one, 1, D);
                whole.total += part.total;
            }
            const auto scale = kernels.scale[index_of(DType::f32)][index_of(DType::f32)];
            scale(whole.tuned, whole.tuned, 1.0f / whole.total, D);
            scale(whole.frozen, whole.frozen, 1.0f / count[c], D);
        }
    }
}

}  // namespace mooring
