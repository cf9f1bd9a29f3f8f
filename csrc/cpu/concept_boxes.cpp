#include "cpu/concept_boxes.h"

#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/row_pointer.h"

namespace mooring {
namespace {

// Increasing in the value; NaN is above all, +0 and -0 are equal, as in torch.sort.
uint32_t ordered_key(float value) {
    if (value != value) return 0xffffffffu;
    if (value == 0.0f) value = 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Indices of a row by falling value; equal values keep their order. Three passes of a radix sort: a
// comparison sort of D = 2048 costs five times as much.
class FallingOrder {
  public:
    explicit FallingOrder(int64_t size)
        : keys_(static_cast<size_t>(size)), first_(keys_.size()), second_(keys_.size()) {}

    const std::vector<int32_t>& of(const float* values) {
        for (size_t i = 0; i < keys_.size(); ++i) {
            keys_[i] = ~ordered_key(values[i]);
            first_[i] = static_cast<int32_t>(i);
        }
        pass(0, first_, second_);
        pass(11, second_, first_);
        pass(22, first_, second_);
        return second_;
    }

  private:
    void pass(int shift, const std::vector<int32_t>& from, std::vector<int32_t>& to) {
        uint32_t start[2048] = {};
        for (uint32_t key : keys_) ++start[(key >> shift) & 2047u];
        uint32_t before = 0;
        for (uint32_t& bucket : start) {
            const uint32_t size = bucket;
            bucket = before;
            before += size;
        }
        for (int32_t index : from) {
            to[start[(keys_[static_cast<size_t>(index)] >> shift) & 2047u]++] = index;
        }
    }

    std::vector<uint32_t> keys_;
    std::vector<int32_t> first_, second_;
};

float value_at(const void* data, DType dtype, int64_t index) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[index];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// response[n] = sum of the group's channels at position n, added in rank order whatever the layout.
void group_response(const FeatureMap& map, int64_t image, const int32_t* channels, int64_t width,
                    float* response) {
    const int64_t positions = map.rows * map.columns, base = image * map.stride_image;
    for (int64_t n = 0; n < positions; ++n) response[n] = 0.0f;
    if (map.stride_position == 1) {
        const auto accumulate = row_kernels().accumulate[index_of(map.dtype)];
        for (int64_t t = 0; t < width; ++t) {
            accumulate(response, 1.0f,
                       row_at(map.data, map.dtype, base + channels[t] * map.stride_channel, 1), positions);
        }
        return;
    }
    for (int64_t n = 0; n < positions; ++n) {
        const int64_t at = base + n * map.stride_position;
        for (int64_t t = 0; t < width; ++t) {
            response[n] += value_at(map.data, map.dtype, at + channels[t] * map.stride_channel);
        }
    }
}

// First of the largest; a NaN counts as larger than any number.
int64_t peak_of(const std::vector<float>& response) {
    size_t best = 0;
    for (size_t n = 1; n < response.size() && response[best] == response[best]; ++n) {
        if (response[n] > response[best] || response[n] != response[n]) best = n;
    }
    return static_cast<int64_t>(best);
}

// One axis of a box around `middle`, in pixels.
void place(float middle, float extent, float side, bool shift, float* low, float* high) {
    const float from = middle - 0.5f * side;
    if (shift) {
        const float room = extent - side > 0.0f ? extent - side : 0.0f;
        *low = from < 0.0f ? 0.0f : (from > room ? room : from);
        *high = *low + side < extent ? *low + side : extent;
    } else {
        *low = from > 0.0f ? from : 0.0f;
        *high = middle + 0.5f * side < extent ? middle + 0.5f * side : extent;
    }
}

}  // namespace

void concept_boxes(const FeatureMap& map, const float* logits, const int64_t* labels,
                   const float* head_weight, const ConceptRule& rule, float* boxes, int64_t* negative_classes,
                   int64_t B, int threads) {
    const int64_t D = map.D, C = rule.C, P = rule.patches, M = rule.negatives;
    const auto accumulate = row_kernels().accumulate[index_of(DType::f32)];
    const float width = static_cast<float>(rule.image_width), height = static_cast<float>(rule.image_height);
    const float side = static_cast<float>(rule.patch_side);
    const float cell_x = width / static_cast<float>(map.columns);
    const float cell_y = height / static_cast<float>(map.rows);
    const float inside_cell = rule.centred ? 0.5f : 0.0f;
    const int workers = useful_threads(threads, B * D * 16);
#pragma omp parallel num_threads(workers)
    {
        FallingOrder by_class(C), by_channel(D);
        std::vector<float> score(static_cast<size_t>(D));
        std::vector<float> response(static_cast<size_t>(map.rows * map.columns));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B; ++i) {
            float* box = boxes + i * P * 4;
            int64_t* negatives = negative_classes + i * M;
            const int64_t label = labels[i];
            if (!is_class(label, C)) {
                for (int64_t j = 0; j < P; ++j, box += 4) {
                    place(0.5f * width, width, side, true, box, box + 2);
                    place(0.5f * height, height, side, true, box + 1, box + 3);
                }
                for (int64_t m = 0; m < M; ++m) negatives[m] = -1;
                continue;
            }
            for (float& value : score) value = 0.0f;
            accumulate(score.data(), static_cast<float>(rule.rivals), head_weight + label * D, D);
            int64_t found = 0;
            for (int32_t c : by_class.of(logits + i * C)) {
                if (c == label) continue;
                if (found < rule.rivals) accumulate(score.data(), -1.0f, head_weight + c * D, D);
                if (found < M) negatives[found] = c;
                ++found;
            }
            const std::vector<int32_t>& rank = by_channel.of(score.data());
            for (int64_t j = 0; j < P; ++j, box += 4) {
                group_response(map, i, rank.data() + j * rule.rank_stride, rule.group_width, response.data());
                const int64_t peak = peak_of(response);
                const float x = static_cast<float>(peak % map.columns) + inside_cell;
                const float y = static_cast<float>(peak / map.columns) + inside_cell;
                place(x * cell_x, width, side, rule.centred, box, box + 2);
                place(y * cell_y, height, side, rule.centred, box + 1, box + 3);
            }
        }
    }
}

}  // namespace mooring
