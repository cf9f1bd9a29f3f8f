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

// Columns summed at a time: two accumulators of this many floats stay in the first-level cache.
constexpr int64_t kTile = 512;
// Rows summed before they are added to the total, so that rounding grows with K / 256 + 256, not K.
constexpr int64_t kBlock = 256;

// total += sum over members m of weight[m] * x[order[m], tile]; weight null means one.
void weighted_sum(const RowKernels& kernels, Matrix x, const int64_t* order, const float* weight,
                  int64_t members, int64_t first_column, int64_t columns, int64_t D, float* total) {
    const auto accumulate = kernels.accumulate[index_of(x.dtype)];
    const auto add = kernels.accumulate[index_of(DType::f32)];
    float block[kTile];
    for (int64_t start = 0; start < members; start += kBlock) {
        const int64_t end = start + kBlock < members ? start + kBlock : members;
        for (int64_t j = 0; j < columns; ++j) block[j] = 0.0f;
        for (int64_t m = start; m < end; ++m) {
            const char* row = static_cast<const char*>(row_at(x.data, x.dtype, order[m], D));
            accumulate(block, weight ? weight[m] : 1.0f, row + first_column * element_size(x.dtype), columns);
        }
        add(total, 1.0f, block, columns);
    }
}

}  // namespace

void class_statistics(Matrix frozen, Matrix tuned, const int64_t* labels, const float* head_weight,
                      float cga_scale, float* frozen_mean, float* tuned_mean, float* count, int64_t K,
                      int64_t D, int64_t C, int threads) {
    constexpr float kEps = 1e-12f;
    const RowKernels& kernels = row_kernels();
    const auto dot = kernels.dot[index_of(tuned.dtype)];
    const ClassIndex index(labels, K, C);
    const int64_t valid = index.begin.back();
    std::vector<float> sharpness(static_cast<size_t>(C));
    std::vector<float> weight(static_cast<size_t>(valid));

    const int workers = useful_threads(threads, K * D);
#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; ++c) {
            const size_t at = static_cast<size_t>(c);
            count[c] = static_cast<float>(index.begin[at + 1] - index.begin[at]);
            if (count[c] == 0.0f) continue;
            const float norm = row_norm(kernels, head_weight + c * D, DType::f32, D);
            sharpness[at] = cga_scale / (norm < kEps ? kEps : norm);
        }

        // Phase 1, over rows: the confidence logit of each member. Reads the tuned bank once.
#pragma omp for schedule(static)
        for (int64_t m = 0; m < valid; ++m) {
            const int64_t k = index.order[static_cast<size_t>(m)];
            const int64_t c = labels[k];
            weight[static_cast<size_t>(m)] =
                sharpness[static_cast<size_t>(c)] *
                dot(row_at(tuned.data, tuned.dtype, k, D), head_weight + c * D, D);
        }

        // Softmax over the members of each class.
#pragma omp for schedule(dynamic, 16)
        for (int64_t c = 0; c < C; ++c) {
            const size_t begin = static_cast<size_t>(index.begin[static_cast<size_t>(c)]);
            const size_t end = static_cast<size_t>(index.begin[static_cast<size_t>(c) + 1]);
            if (begin == end) continue;
            const float highest = kernels.maximum(weight.data() + begin, static_cast<int64_t>(end - begin));
            double total = 0;
            for (size_t m = begin; m < end; ++m) {
                weight[m] = std::exp(weight[m] - highest);
                total += weight[m];
            }
            for (size_t m = begin; m < end; ++m) weight[m] = static_cast<float>(weight[m] / total);
        }

        // Phase 2, over tiles of classes x columns: both means. Reads each bank once. A tile is summed
        // by one thread in row order, so the result does not depend on the number of threads.
        const int64_t tiles = (D + kTile - 1) / kTile;
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < C * tiles; ++task) {
            const int64_t c = task / tiles, first = task % tiles * kTile;
            const int64_t columns = D - first < kTile ? D - first : kTile;
            float* frozen_row = frozen_mean + c * D + first;
            float* tuned_row = tuned_mean + c * D + first;
            for (int64_t j = 0; j < columns; ++j) frozen_row[j] = tuned_row[j] = 0.0f;
            const size_t begin = static_cast<size_t>(index.begin[static_cast<size_t>(c)]);
            const int64_t members = index.begin[static_cast<size_t>(c) + 1] - static_cast<int64_t>(begin);
            if (members == 0) continue;
            const int64_t* order = index.order.data() + begin;
            weighted_sum(kernels, frozen, order, nullptr, members, first, columns, D, frozen_row);
            weighted_sum(kernels, tuned, order, weight.data() + begin, members, first, columns, D, tuned_row);
            for (int64_t j = 0; j < columns; ++j) frozen_row[j] /= static_cast<float>(members);
        }
    }
}

}  // namespace mooring
