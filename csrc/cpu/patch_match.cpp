#include "cpu/patch_match.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/patch_match_kernels.h"
#include "cpu/row_pointer.h"

namespace mooring {

namespace {

// The key sets are cut into this many slabs whatever the number of threads, and the slabs' results are
// combined in order: no result depends on the number of threads.
constexpr int64_t kSlabs = 16;

enum Role : int8_t { kUnused = 0, kNegative = 1, kPositive = 2 };

// One image's softmax over the pairs seen so far, relative to the largest of their logits.
struct Running {
    float peak = -std::numeric_limits<float>::infinity();
    double total = 0;
    float* sum = nullptr;  // [P, D], sum of exp(logit - peak) key; null without a gradient
};

// The positive pair of an image and one of its positive key sets.
struct Positive {
    int32_t entry = -1;  // a P + b
    float cosine = 0;
};

// Memory for one group of key sets, reused from group to group.
struct Workspace {
    Workspace(int64_t P, int64_t D, int lanes)
        : packed_(static_cast<size_t>(P * D * lanes) + kMostLanes), pairs(new Pairs) {
        const auto address = reinterpret_cast<uintptr_t>(packed_.data());
        packed = packed_.data() + (64 - address % 64) % 64 / sizeof(float);  // whole cache lines
    }

    std::vector<float> packed_;
    float* packed;
    alignas(64) float cosines[kMostEntries * kMostLanes];
    alignas(64) float codes[kMostEntries * kMostLanes];
    float weights[kMostLanes * kMostEntries];
    std::unique_ptr<Pairs> pairs;
};

class Contrast {
  public:
    Contrast(const PatchMatch& given, bool with_gradient)
        : given_(given),
          with_gradient_(with_gradient),
          kernels_(patch_match_kernels()),
          rows_(row_kernels()),
          roles_(static_cast<size_t>(given.B * given.C), kUnused),
          query_(static_cast<size_t>(given.B * given.D * given.P)),
          positives_(static_cast<size_t>(given.B * (1 + given.K))) {
        assign_roles();
        transpose_query();
        for (int64_t set = 0; set < given.C * given.K; ++set) {
            if (given.queue_valid[set]) sets_.push_back(set);
        }
        groups_ = (static_cast<int64_t>(sets_.size()) + kernels_.lanes - 1) / kernels_.lanes;
        slabs_ = std::min(kSlabs, groups_);
        running_.resize(static_cast<size_t>(slabs_ * given.B));
        if (with_gradient) {
            sums_.resize(static_cast<size_t>(slabs_ * given.B * given.P * given.D));
            for (size_t i = 0; i < running_.size(); ++i) {
                running_[i].sum = sums_.data() + i * static_cast<size_t>(given.P * given.D);
            }
        }
    }

    void run(float* loss, float* grad, int threads) {
        const int64_t work = static_cast<int64_t>(sets_.size()) * given_.B;
        const int workers = work < 256 ? 1 : threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
        for (int64_t slab = 0; slab < slabs_; ++slab) {
            Workspace space(given_.P, given_.D, kernels_.lanes);
            for (int64_t g = slab * groups_ / slabs_; g < (slab + 1) * groups_ / slabs_; ++g) {
                match_group(g, running_.data() + slab * given_.B, space);
            }
        }
#pragma omp parallel for schedule(static) num_threads(workers)
        for (int64_t i = 0; i < given_.B; ++i) {
            finish(i, loss + i, grad == nullptr ? nullptr : grad + i * given_.P * given_.D);
        }
    }

  private:
    void assign_roles() {
        for (int64_t i = 0; i < given_.B; ++i) {
            if (!is_class(given_.labels[i], given_.C)) continue;
            int8_t* roles = roles_.data() + i * given_.C;
            for (int64_t m = 0; m < given_.M; ++m) {
                const int64_t c = given_.negative_classes[i * given_.M + m];
                if (is_class(c, given_.C)) roles[c] = kNegative;
            }
            roles[given_.labels[i]] = kPositive;
        }
    }

    void transpose_query() {
        const int64_t P = given_.P, D = given_.D;
        for (int64_t i = 0; i < given_.B; ++i) {
            for (int64_t a = 0; a < P; ++a) {
                for (int64_t d = 0; d < D; ++d) {
                    query_[static_cast<size_t>((i * D + d) * P + a)] = given_.query[(i * P + a) * D + d];
                }
            }
        }
    }

    // Rank of the positive pair in its plan, from 1.
    int32_t rank_of(int64_t image, int64_t position) const {
        const int64_t last = std::min<int64_t>(3, given_.P * given_.P) - 1;
        const int64_t pick = given_.positive_pick[image * (1 + given_.K) + position];
        return static_cast<int32_t>(std::clamp<int64_t>(pick, 0, last)) + 1;
    }

    void match_group(int64_t group, Running* running, Workspace& space) {
        const int lanes = kernels_.lanes;
        const int64_t first = group * lanes;
        const int count =
            static_cast<int>(std::min<int64_t>(lanes, static_cast<int64_t>(sets_.size()) - first));
        const void* keys[kMostLanes] = {};
        for (int l = 0; l < count; ++l) {
            const int64_t set = sets_[static_cast<size_t>(first + l)];
            keys[l] = row_at(given_.queue.data, given_.queue.dtype, set * given_.P, given_.D);
        }
        bool packed = false;
        for (int64_t i = 0; i < given_.B; ++i) {
            int32_t take[kMostLanes] = {};
            Positive* positives[kMostLanes] = {};
            bool used = false;
            for (int l = 0; l < count; ++l) {
                const int64_t set = sets_[static_cast<size_t>(first + l)];
                const int8_t role = roles_[static_cast<size_t>(i * given_.C + set / given_.K)];
                used = used || role != kUnused;
                if (role == kNegative) take[l] = static_cast<int32_t>(given_.negatives_per_set);
                if (role == kPositive) {
                    const int64_t position = 1 + set % given_.K;
                    take[l] = -rank_of(i, position);
                    positives[l] = &positives_[static_cast<size_t>(i * (1 + given_.K) + position)];
                }
            }
            if (!used) continue;
            if (!packed) {
                kernels_.pack[index_of(given_.queue.dtype)](keys, count, given_.P, given_.D, space.packed);
                packed = true;
            }
            match(i, keys, given_.queue.dtype, take, positives, running + i, space);
        }
    }

    // One image against the group of key sets that lies packed in the workspace.
    void match(int64_t image, const void* const* keys, DType dtype, const int32_t* take,
               Positive* const* positives, Running* running, Workspace& space) const {
        const int64_t P = given_.P, D = given_.D;
        kernels_.cosines(query_.data() + image * D * P, space.packed, P, D, space.cosines);
        kernels_.rank(space.cosines, P, given_.epsilon, given_.rounds, space.codes);
        Pairs& pairs = *space.pairs;
        if (!kernels_.select(space.codes, space.cosines, P, take, &pairs)) {
            running->total = std::numeric_limits<double>::quiet_NaN();
            return;
        }
        const int64_t n = pairs.first[P];
        const float scale = 1.0f / given_.temperature;
        const float peak = rows_.maximum(pairs.cosine, n) * scale;
        if (!(peak <= running->peak)) {
            // 0 at the first group, whose sum is 0 already; and where the logits rise by more than 103
            const float shrink = std::exp(running->peak - peak);
            running->total *= shrink;
            if (with_gradient_ && running->peak > -std::numeric_limits<float>::infinity()) {
                rows_.scale[0][0](running->sum, running->sum, shrink, P * D);
            }
            running->peak = peak;
        }
        running->total += kernels_.exponentials(pairs.cosine, scale, running->peak, n, space.weights);
        for (int64_t a = 0; a < P; ++a) {
            const int64_t begin = pairs.first[a], end = pairs.first[a + 1];
            for (int64_t j = begin; j < end; ++j) {
                Positive* positive = positives[pairs.row[j] / P];
                if (positive == nullptr) continue;
                positive->entry = static_cast<int32_t>(a * P + pairs.row[j] % P);
                positive->cosine = pairs.cosine[j];
            }
            if (with_gradient_) {
                kernels_.accumulate[index_of(dtype)](keys, pairs.row + begin, space.weights + begin,
                                                     end - begin, P, D, running->sum + a * D);
            }
        }
    }

    void finish(int64_t image, float* loss, float* grad) {
        const int64_t P = given_.P, D = given_.D;
        *loss = 0.0f;
        if (grad != nullptr) std::fill(grad, grad + P * D, 0.0f);
        if (!is_class(given_.labels[image], given_.C)) return;

        Positive* positives = &positives_[static_cast<size_t>(image * (1 + given_.K))];
        const void* own = given_.own_key + image * P * D;
        Running whole;
        whole.sum = grad;
        match_own_key(image, own, positives, &whole);
        for (int64_t slab = 0; slab < slabs_; ++slab) {
            combine(running_[static_cast<size_t>(slab * given_.B + image)], &whole);
        }
        double positive_sum = 0;
        int64_t count = 0;
        for (int64_t position = 0; position <= given_.K; ++position) {
            if (positives[position].entry < 0) continue;
            positive_sum += positives[position].cosine;
            ++count;
        }
        const double temperature = given_.temperature, n = static_cast<double>(count);
        *loss = static_cast<float>(whole.peak + std::log(whole.total) - positive_sum / (n * temperature) -
                                   std::log(n));
        if (grad == nullptr) return;
        rows_.scale[0][0](grad, grad, static_cast<float>(1.0 / (whole.total * temperature)), P * D);
        const float share = static_cast<float>(-1.0 / (n * temperature));
        for (int64_t position = 0; position <= given_.K; ++position) {
            const int32_t entry = positives[position].entry;
            if (entry < 0) continue;
            const int64_t set = given_.labels[image] * given_.K + position - 1;
            const DType dtype = position == 0 ? DType::f32 : given_.queue.dtype;
            const void* keys =
                position == 0 ? own : row_at(given_.queue.data, given_.queue.dtype, set * P, D);
            rows_.accumulate[index_of(dtype)](grad + entry / P * D, share, row_at(keys, dtype, entry % P, D),
                                              D);
        }
    }

    void match_own_key(int64_t image, const void* own, Positive* positives, Running* whole) const {
        Workspace space(given_.P, given_.D, kernels_.lanes);
        kernels_.pack[index_of(DType::f32)](&own, 1, given_.P, given_.D, space.packed);
        int32_t take[kMostLanes] = {};
        take[0] = -rank_of(image, 0);
        Positive* kept[kMostLanes] = {positives};
        match(image, &own, DType::f32, take, kept, whole, space);
    }

    void combine(const Running& part, Running* whole) const {
        const int64_t size = given_.P * given_.D;
        if (part.total == 0) return;  // no key set of this slab was used
        const float peak = std::max(part.peak, whole->peak);
        const float old_share = std::exp(whole->peak - peak), new_share = std::exp(part.peak - peak);
        whole->total = whole->total * old_share + part.total * new_share;
        whole->peak = peak;
        if (whole->sum == nullptr) return;
        if (old_share != 1.0f) rows_.scale[0][0](whole->sum, whole->sum, old_share, size);
        rows_.accumulate[0](whole->sum, new_share, part.sum, size);
    }

    const PatchMatch& given_;
    const bool with_gradient_;
    const PatchMatchKernels& kernels_;
    const RowKernels& rows_;
    std::vector<int8_t> roles_;        // [B, C]
    std::vector<float> query_;         // [B, D, P]
    std::vector<Positive> positives_;  // [B, 1 + K]
    std::vector<int64_t> sets_;        // valid key sets of the queue
    std::vector<Running> running_;     // [slabs, B]
    std::vector<float> sums_;          // [slabs, B, P, D]
    int64_t groups_ = 0, slabs_ = 0;
};

}  // namespace

void patch_match_info_nce(const PatchMatch& given, float* loss, float* grad, int threads) {
    Contrast(given, grad != nullptr).run(loss, grad, threads);
}

}  // namespace mooring
