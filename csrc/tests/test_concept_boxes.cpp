#include "cpu/concept_boxes.h"

#include <algorithm>
#include <numeric>

#include "check.h"

using mooring::DType;

namespace {

// Whole numbers from -8 to 8: every sum is exact, and ties are many.
std::vector<float> integers(int64_t size, unsigned seed) {
    std::mt19937 generator(seed);
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = static_cast<float>(static_cast<int>(generator() % 17u) - 8);
    return values;
}

std::vector<size_t> falling(const std::vector<double>& values) {
    std::vector<size_t> order(values.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
    return order;
}

void search(int64_t D, int64_t rows, int64_t columns, int64_t C, bool channels_last, DType dtype,
            bool centred) {
    constexpr int64_t B = 6, P = 3, M_most = 4;
    const int64_t N = rows * columns, width = D / 4 + 1, stride = (D - width) / (P - 1);
    const int64_t kappa = std::min<int64_t>(3, C - 1), M = std::min(M_most, C - 1);
    std::vector<float> map = integers(B * D * N, 1);
    const std::vector<uint16_t> half = check::to_bf16(map);
    const std::vector<float> logits = integers(B * C, 2), weight = integers(C * D, 3);
    std::vector<int64_t> labels;
    for (int64_t i = 0; i < B; ++i) labels.push_back(i % (C + 2) - 1);  // -1 and C are masked
    const int64_t stride_channel = channels_last ? 1 : N, stride_position = channels_last ? D : 1;
    const void* data = dtype == DType::bf16 ? static_cast<const void*>(half.data()) : map.data();
    // cells of 8 x 16 pixels, boxes of 20
    const mooring::ConceptRule rule = {C, P, width, stride, kappa, M, 8 * rows, 16 * columns, 20, centred};
    std::vector<float> boxes = check::unwritten(B * P * 4 + 1);
    std::vector<int64_t> negatives(static_cast<size_t>(B * M) + 1, -77);
    mooring::concept_boxes({data, dtype, D * N, stride_channel, stride_position, D, rows, columns},
                           logits.data(), labels.data(), weight.data(), rule, boxes.data(), negatives.data(),
                           B, check::kThreads);
    CHECK(std::isnan(boxes.back()) && negatives.back() == -77);
    for (int64_t i = 0; i < B; ++i) {
        const int64_t label = labels[static_cast<size_t>(i)];
        const bool valid = label >= 0 && label < C;
        const int64_t* own = negatives.data() + i * M;
        if (!valid) {
            for (int64_t m = 0; m < M; ++m) CHECK(own[m] == -1);
        }
        std::vector<size_t> rank;
        if (valid) {
            const auto class_weight = [&](size_t c, int64_t d) {
                return static_cast<double>(weight[c * static_cast<size_t>(D) + static_cast<size_t>(d)]);
            };
            std::vector<size_t> others =
                falling(std::vector<double>(logits.begin() + i * C, logits.begin() + (i + 1) * C));
            others.erase(std::find(others.begin(), others.end(), static_cast<size_t>(label)));
            for (int64_t m = 0; m < M; ++m)
                CHECK(own[m] == static_cast<int64_t>(others[static_cast<size_t>(m)]));
            std::vector<double> score;
            for (int64_t d = 0; d < D; ++d) {
                double value = static_cast<double>(kappa) * class_weight(static_cast<size_t>(label), d);
                for (int64_t j = 0; j < kappa; ++j) value -= class_weight(others[static_cast<size_t>(j)], d);
                score.push_back(value);
            }
            rank = falling(score);
        }
        for (int64_t j = 0; j < P; ++j) {
            double x = 8.0 * static_cast<double>(columns), y = 4.0 * static_cast<double>(rows);
            if (valid) {
                std::vector<double> response(static_cast<size_t>(N), 0.0);
                for (int64_t n = 0; n < N; ++n) {
                    for (int64_t t = 0; t < width; ++t) {
                        const int64_t d = static_cast<int64_t>(rank[static_cast<size_t>(j * stride + t)]);
                        response[static_cast<size_t>(n)] +=
                            map[static_cast<size_t>(i * D * N + d * stride_channel + n * stride_position)];
                    }
                }
                const int64_t peak = std::max_element(response.begin(), response.end()) - response.begin();
                x = 16.0 * static_cast<double>(peak % columns) + (centred ? 8.0 : 0.0);
                y = 8.0 * static_cast<double>(peak / columns) + (centred ? 4.0 : 0.0);
            }
            const double right = 16.0 * static_cast<double>(columns),
                         bottom = 8.0 * static_cast<double>(rows);
            double left = x - 10, top = y - 10;
            if (centred || !valid) {
                left = std::max(0.0, std::min(left, std::max(0.0, right - 20)));
                top = std::max(0.0, std::min(top, std::max(0.0, bottom - 20)));
            }
            const double expected[4] = {std::max(0.0, left), std::max(0.0, top), std::min(left + 20, right),
                                        std::min(top + 20, bottom)};
            for (int64_t k = 0; k < 4; ++k) {
                CHECK_NEAR(boxes[static_cast<size_t>((i * P + j) * 4 + k)], expected[k], 0.0);
            }
        }
    }
}

}  // namespace

int main() {
    check::begin();
    for (bool channels_last : {false, true}) {
        for (bool centred : {false, true}) {
            for (DType dtype : {DType::f32, DType::bf16}) {
                search(37, 3, 5, 4, channels_last, dtype, centred);
                search(300, 7, 7, 9, channels_last, dtype, centred);
                search(4, 1, 1, 1, channels_last, dtype, centred);
                search(5, 2, 1, 2, channels_last, dtype, centred);
            }
        }
    }
}
