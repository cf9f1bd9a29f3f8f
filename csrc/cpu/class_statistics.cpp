#include <cmath>
#include <utility>

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
// Rows whose confidence is found before they are added up: as many as stay in the second-level cache
// meanwhile.
constexpr int64_t kGroup = 64;
constexpr int64_t kGroupElements = 48 * 1024;

int64_t group_rows(int64_t D) {
    const int64_t rows = kGroupElements / D;
    return rows < 1 ? 1 : rows > kGroup ? kGroup : rows;
}

struct Block {
    int64_t c, first, members;  // members order[first] .. order[first + members - 1], all of class c
    bool whole;                 // they are all of the class
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

// The rows of a group in both banks.
struct Group {
    const void* frozen[kGroup];
    const void* tuned[kGroup];
    int64_t members = 0;

    void point_to(Matrix frozen_bank, Matrix tuned_bank, const int64_t* order, int64_t count, int64_t D) {
        members = count;
        for (int64_t r = 0; r < count; ++r) {
            frozen[r] = row_at(frozen_bank.data, frozen_bank.dtype, order[r], D);
            tuned[r] = row_at(tuned_bank.data, tuned_bank.dtype, order[r], D);
        }
    }
};

// One thread's way through its blocks. Rows lie anywhere in the banks, too short for the processor to foresee
// the next: so each step asks for what the following one reads. Memory is never idle while rows that have
// arrived are worked on.
class Pass {
  public:
    Pass(Matrix frozen, Matrix tuned, const int64_t* order, const float* head_weight, float cga_scale,
         int64_t D)
        : frozen_(frozen),
          tuned_(tuned),
          order_(order),
          head_weight_(head_weight),
          cga_scale_(cga_scale),
          D_(D),
          rows_(group_rows(D)) {}

    // Sums blocks begin .. end - 1. Those that are whole classes become means.
    void run(const std::vector<Block>& blocks, size_t begin, size_t end, std::vector<Sums>& sums) {
        Group now, next;
        if (begin < end) point(now, blocks[begin], 0);
        for (size_t b = begin; b < end; ++b) {
            const Block& block = blocks[b];
            const float* prototype = head_weight_ + block.c * D_;
            const float norm = row_norm(kernels_, prototype, DType::f32, D_);
            const float sharpness = cga_scale_ / (norm < kEps ? kEps : norm);
            for (int64_t start = 0; start < block.members;) {
                const int64_t after = start + now.members;
                const bool last = after == block.members;
                const void* next_prototype = nullptr;
                next.members = 0;
                if (!last) {
                    point(next, block, after);
                } else if (b + 1 < end) {
                    point(next, blocks[b + 1], 0);
                    next_prototype = head_weight_ + blocks[b + 1].c * D_;
                }
                add(now, next, block, start == 0, last, prototype, next_prototype, sharpness, sums[b]);
                start = after;
                std::swap(now, next);
            }
        }
    }

  private:
    static constexpr float kEps = 1e-12f;

    void point(Group& group, const Block& block, int64_t start) const {
        const int64_t left = block.members - start;
        group.point_to(frozen_, tuned_, order_ + block.first + start, left < rows_ ? left : rows_, D_);
    }

    void add(const Group& now, const Group& next, const Block& block, bool first, bool last,
             const float* prototype, const void* next_prototype, float sharpness, Sums& sums) const {
        const auto dot = kernels_.dot_fetching[index_of(tuned_.dtype)];
        const int frozen_bytes = static_cast<int>(element_size(frozen_.dtype));
        const int count = static_cast<int>(now.members);
        float weight[kGroup], equal[kGroup];
        float highest = sums.highest;
        for (int r = 0; r < count; ++r) {
            weight[r] = sharpness * dot(now.tuned[r], prototype, D_, Ahead{now.frozen + r, 1, frozen_bytes});
            highest = weight[r] > highest ? weight[r] : highest;
        }
        float decay = raise(sums, highest);
        for (int r = 0; r < count; ++r) {
            weight[r] = std::exp(weight[r] - highest);
            sums.total += weight[r];
        }
        float share = 1.0f;
        if (last && block.whole) {
            share = 1.0f / static_cast<float>(block.members);
            decay /= sums.total;
            for (int r = 0; r < count; ++r) weight[r] /= sums.total;
        }
        for (int r = 0; r < count; ++r) equal[r] = share;
        const Ahead rows = {next.tuned, static_cast<int>(next.members),
                            static_cast<int>(element_size(tuned_.dtype))};
        const Ahead prototype_ahead = {&next_prototype, next_prototype ? 1 : 0,
                                       static_cast<int>(sizeof(float))};
        kernels_.accumulate_rows[index_of(frozen_.dtype)](sums.frozen, first ? 0.0f : share, now.frozen,
                                                          equal, count, D_, rows);
        kernels_.accumulate_rows[index_of(tuned_.dtype)](sums.tuned, decay, now.tuned, weight, count, D_,
                                                         prototype_ahead);
    }

    const RowKernels& kernels_ = row_kernels();
    const Matrix frozen_, tuned_;
    const int64_t* const order_;
    const float* const head_weight_;
    const float cga_scale_;
    const int64_t D_, rows_;
};

// Adds the sums of a class's further blocks to those of its first, and divides.
void merge(const RowKernels& kernels, Sums* begin, const Sums* end, float count, int64_t D) {
    Sums& whole = *begin;
    const auto add = kernels.accumulate_rows[index_of(DType::f32)];
    for (Sums* part = begin + 1; part < end; ++part) {
        const float highest = part->highest > whole.highest ? part->highest : whole.highest;
        const float kept = raise(whole, highest), one = 1.0f;
        const float share = raise(*part, highest);
        const void *frozen_row = part->frozen, *tuned_row = part->tuned;
        add(whole.tuned, kept, &tuned_row, &share, 1, D, kNothingAhead);
        add(whole.frozen, 1.0f, &frozen_row, &one, 1, D, kNothingAhead);
        whole.total += part->total;
    }
    const auto scale = kernels.scale[index_of(DType::f32)][index_of(DType::f32)];
    scale(whole.tuned, whole.tuned, 1.0f / whole.total, D);
    scale(whole.frozen, whole.frozen, 1.0f / count, D);
}

}  // namespace

void class_statistics(Matrix frozen, Matrix tuned, const int64_t* labels, const float* head_weight,
                      float cga_scale, float* frozen_mean, float* tuned_mean, float* count, int64_t K,
                      int64_t D, int64_t C, int threads) {
    const RowKernels& kernels = row_kernels();
    const ClassIndex index(labels, K, C);
    std::vector<Block> blocks;
    std::vector<size_t> first_block(static_cast<size_t>(C) + 1, 0);
    for (int64_t c = 0; c < C; ++c) {
        const int64_t begin = index.begin[static_cast<size_t>(c)],
                      end = index.begin[static_cast<size_t>(c) + 1];
        for (int64_t first = begin; first < end; first += kBlock) {
            blocks.push_back({c, first, end - first < kBlock ? end - first : kBlock, end - begin <= kBlock});
        }
        first_block[static_cast<size_t>(c) + 1] = blocks.size();
    }
    // The first block of a class is summed in the results themselves, each further one in a row of its own.
    std::vector<Sums> sums(blocks.size());
    int64_t further = 0;
    for (size_t b = 0; b < blocks.size(); ++b) further += b > 0 && blocks[b].c == blocks[b - 1].c;
    std::vector<float> own(static_cast<size_t>(2 * further * D));
    float* next = own.data();
    for (size_t b = 0; b < blocks.size(); ++b) {
        const bool in_place = b == 0 || blocks[b].c != blocks[b - 1].c;
        sums[b].frozen = in_place ? frozen_mean + blocks[b].c * D : next;
        sums[b].tuned = in_place ? tuned_mean + blocks[b].c * D : next + D;
        if (!in_place) next += 2 * D;
    }

    const int workers = useful_threads(threads, K * D);
    // Neighbouring blocks go to one thread, which fetches the rows of the next; few enough for all to be
    // busy.
    const size_t run = workers == 1 ? blocks.size() : 1 + blocks.size() / static_cast<size_t>(16 * workers);
#pragma omp parallel num_threads(workers)
    {
        // Reads each bank once. A block is summed by one thread in row order, and blocks are merged in
        // order, so the result does not depend on the number of threads.
        Pass pass(frozen, tuned, index.order.data(), head_weight, cga_scale, D);
        const int64_t runs = static_cast<int64_t>(run ? (blocks.size() + run - 1) / run : 0);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < runs; ++i) {
            const size_t begin = static_cast<size_t>(i) * run;
            pass.run(blocks, begin, begin + run < blocks.size() ? begin + run : blocks.size(), sums);
        }

#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; ++c) {
            const size_t begin = first_block[static_cast<size_t>(c)];
            const size_t end = first_block[static_cast<size_t>(c) + 1];
            count[c] = static_cast<float>(index.begin[static_cast<size_t>(c) + 1] -
                                          index.begin[static_cast<size_t>(c)]);
            if (begin == end) {
                for (int64_t j = 0; j < D; ++j) frozen_mean[c * D + j] = tuned_mean[c * D + j] = 0.0f;
            } else if (end - begin > 1) {
                merge(kernels, &sums[begin], &sums[begin] + (end - begin), count[c], D);
            }
        }
    }
}

}  // namespace mooring
