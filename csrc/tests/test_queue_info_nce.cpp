#include "cpu/queue_info_nce.h"

#include "check.h"

using mooring::DType;

namespace {

void against_fp64(int64_t B, int64_t N, int64_t D, DType dtype, bool has_own, bool gradients) {
    const float inverse_temperature = 5.0f;
    std::vector<float> query = check::normal(B * D, 1, 0.3f), own = check::normal(B * D, 2, 0.3f),
                       queue = check::normal(N * D, 3, 0.3f);
    std::vector<uint16_t> stored = check::to_bf16(queue);
    std::vector<int64_t> labels, queue_labels;
    for (int64_t i = 0; i < B; ++i) labels.push_back(i % 5 - 1);
    for (int64_t j = 0; j < N; ++j) queue_labels.push_back(j % 7 == 6 ? -1 : j % 3 * (j % 2));
    // exactly representable values, so that what lies in an empty slot must not be read
    std::vector<float> given = queue;
    for (int64_t j = 6; j < N; j += 7) {
        for (int64_t d = 0; d < D; ++d) {
            given[static_cast<size_t>(j * D + d)] = check::nan();
            stored[static_cast<size_t>(j * D + d)] = 0x7fc0;
        }
    }
    std::vector<float> loss = check::unwritten(B), positives = loss, factor = loss,
                       grad = check::unwritten(B * D);
    const void* rows = dtype == DType::f32 ? static_cast<const void*>(given.data()) : stored.data();
    const int64_t size = mooring::queue_info_nce_workspace(B, N, D, gradients, check::kThreads);
    std::vector<float> workspace = check::unwritten(size + 1);
    mooring::queue_info_nce({query.data(),
                             has_own ? own.data() : nullptr,
                             labels.data(),
                             {rows, dtype},
                             queue_labels.data(),
                             B,
                             N,
                             D,
                             inverse_temperature},
                            {loss.data(), positives.data(), gradients ? grad.data() : nullptr,
                             gradients ? factor.data() : nullptr},
                            workspace.data(), check::kThreads);
    CHECK(std::isnan(workspace.back()));

    for (int64_t i = 0; i < B; ++i) {
        const size_t s = static_cast<size_t>(i);
        auto dot = [&](const std::vector<float>& with, int64_t row) {
            double total = 0;
            for (int64_t d = 0; d < D; ++d) {
                total += static_cast<double>(query[static_cast<size_t>(i * D + d)]) *
                         with[static_cast<size_t>(row * D + d)];
            }
            return total * inverse_temperature;
        };
        double highest = -INFINITY, sum = 0, positive_sum = 0, count = 0;
        std::vector<double> logits;
        for (int64_t j = 0; j < N; ++j) {
            logits.push_back(queue_labels[static_cast<size_t>(j)] < 0 ? -INFINITY : dot(queue, j));
            highest = std::fmax(highest, logits.back());
            if (queue_labels[static_cast<size_t>(j)] == labels[s]) positive_sum += logits.back(), ++count;
        }
        const double own_logit = has_own ? dot(own, i) : -INFINITY;
        highest = std::fmax(highest, own_logit);
        if (has_own) positive_sum += own_logit, ++count;
        if (labels[s] < 0 || count == 0) {
            CHECK(loss[s] == 0 && positives[s] == 0);
            for (int64_t d = 0; gradients && d < D; ++d) CHECK(grad[static_cast<size_t>(i * D + d)] == 0);
            if (gradients) CHECK(factor[s] == 0);
            continue;
        }
        for (double logit : logits) sum += std::exp(logit - highest);
        sum += std::exp(own_logit - highest);
        const double tolerance = check::kUlp * 64 * (1 + std::fabs(highest));
        CHECK(positives[s] == static_cast<float>(count));
        CHECK_NEAR(loss[s], highest + std::log(sum) - positive_sum / count - std::log(count), tolerance);
        if (!gradients) continue;
        const double own_slope = std::exp(own_logit - highest) / sum - 1 / count;
        if (has_own) CHECK_NEAR(factor[s], own_slope * inverse_temperature, 8 * tolerance);
        for (int64_t d = 0; d < D; ++d) {
            double slope = has_own ? own_slope * own[static_cast<size_t>(i * D + d)] : 0;
            for (int64_t j = 0; j < N; ++j) {
                const size_t t = static_cast<size_t>(j);
                const double target = queue_labels[t] == labels[s] ? 1 / count : 0;
                slope += (std::exp(logits[t] - highest) / sum - target) *
                         queue[t * static_cast<size_t>(D) + static_cast<size_t>(d)];
            }
            CHECK_NEAR(grad[static_cast<size_t>(i * D + d)], slope * inverse_temperature, 16 * tolerance);
        }
    }
}

}  // namespace

int main() {
    check::begin();
    for (DType dtype : {DType::f32, DType::bf16}) {
        for (bool own : {false, true}) {
            for (bool gradients : {false, true}) {
                against_fp64(1, 0, 3, dtype, own, gradients);
                against_fp64(3, 5, 1, dtype, own, gradients);
                against_fp64(17, 65, 19, dtype, own, gradients);    // one row past a tile
                against_fp64(49, 130, 131, dtype, own, gradients);  // several panels; features past a block
                against_fp64(70, 600, 9, dtype, own, gradients);    // several chunks
                against_fp64(30, 7, 16, dtype, own, gradients);
            }
        }
    }
}
