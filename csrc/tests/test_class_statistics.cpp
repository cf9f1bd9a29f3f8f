#include "check.h"

using mooring::DType;
using mooring::Matrix;

namespace {

struct Means {
    std::vector<float> frozen, tuned, count;
};

Means run(Matrix frozen, Matrix tuned, const std::vector<int64_t>& labels, const std::vector<float>& head,
          float cga_scale, int64_t K, int64_t D, int64_t C, int threads) {
    Means means{check::unwritten(C * D), check::unwritten(C * D), check::unwritten(C)};
    mooring::class_statistics(frozen, tuned, labels.data(), head.data(), cga_scale, means.frozen.data(),
                              means.tuned.data(), means.count.data(), K, D, C, threads);
    return means;
}

void against_a_loop(int64_t K, int64_t D, int64_t C, float cga_scale) {
    std::vector<float> frozen = check::normal(K * D, 1), tuned = check::normal(K * D, 2);
    const std::vector<float> head = check::normal(C * D, 3, 0.01f);
    const std::vector<uint16_t> frozen_stored = check::to_bf16(frozen), tuned_stored = check::to_bf16(tuned);
    std::vector<int64_t> labels(static_cast<size_t>(K));
    for (int64_t k = 0; k < K; ++k)
        labels[static_cast<size_t>(k)] = k * 7919 % (C + 3) - 1;  // -1, C and C + 1 too
    const Means means = run({frozen.data(), DType::f32}, {tuned.data(), DType::f32}, labels, head, cga_scale,
                            K, D, C, check::kThreads);
    const Means from_bf16 = run({frozen_stored.data(), DType::bf16}, {tuned_stored.data(), DType::bf16},
                                labels, head, cga_scale, K, D, C, 1);
    for (int64_t c = 0; c < C; ++c) {
        std::vector<double> weights;
        std::vector<int64_t> members;
        double highest = -INFINITY, total = 0;
        const double length = check::norm(head.data() + c * D, D);
        for (int64_t k = 0; k < K; ++k) {
            if (labels[static_cast<size_t>(k)] != c) continue;
            double dot = 0;
            for (int64_t j = 0; j < D; ++j) {
                dot += static_cast<double>(tuned[static_cast<size_t>(k * D + j)]) *
                       head[static_cast<size_t>(c * D + j)];
            }
            members.push_back(k);
            weights.push_back(cga_scale * dot / length);
            highest = std::fmax(highest, weights.back());
        }
        for (double& weight : weights) total += weight = std::exp(weight - highest);
        CHECK(means.count[static_cast<size_t>(c)] == static_cast<float>(members.size()));
        // exponents of size s = cga_scale |d| are off by D s ulp, and each weight relatively by as much
        const double exponent = cga_scale * std::sqrt(static_cast<double>(D)) * 4;
        const double tolerance =
            check::kUlp * (static_cast<double>(K) + 8 + 4 * exponent * static_cast<double>(D));
        for (int64_t j = 0; j < D; ++j) {
            double frozen_mean = 0, tuned_mean = 0;
            for (size_t m = 0; m < members.size(); ++m) {
                const size_t at = static_cast<size_t>(members[m] * D + j);
                frozen_mean += frozen[at] / static_cast<double>(members.size());
                tuned_mean += weights[m] / total * tuned[at];
            }
            const size_t at = static_cast<size_t>(c * D + j);
            CHECK_NEAR(means.frozen[at], frozen_mean, tolerance * 4);
            CHECK_NEAR(means.tuned[at], tuned_mean, tolerance * 4);
            // the same numbers in another storage, and another number of threads: the same sums
            CHECK(means.frozen[at] == from_bf16.frozen[at] && means.tuned[at] == from_bf16.tuned[at]);
        }
    }
}

void one_member_is_returned_exactly() {
    const int64_t D = 37;
    const std::vector<float> frozen = check::normal(D, 1), tuned = check::normal(D, 2),
                             head = check::normal(D, 3);
    for (float cga_scale : {0.0f, 1.0f, 500.0f}) {
        const Means means =
            run({frozen.data(), DType::f32}, {tuned.data(), DType::f32}, {0}, head, cga_scale, 1, D, 1, 1);
        CHECK(means.frozen == frozen && means.tuned == tuned);
    }
}

void masked_rows_are_not_read() {
    const int64_t D = 5;
    std::vector<float> rows = check::normal(3 * D, 1);
    for (int64_t j = 0; j < D; ++j) rows[static_cast<size_t>(D + j)] = check::nan();
    const Means means = run({rows.data(), DType::f32}, {rows.data(), DType::f32}, {1, -1, 1},
                            check::normal(2 * D, 2), 1.0f, 3, D, 2, 1);
    for (size_t j = 0; j < static_cast<size_t>(D); ++j) {
        CHECK(means.frozen[j] == 0.0f && means.tuned[j] == 0.0f);  // class 0 is absent
        CHECK(std::isfinite(means.frozen[D + j]) && std::isfinite(means.tuned[D + j]));
    }
}

}  // namespace

int main() {
    check::begin();
    against_a_loop(40, 33, 7, 1.0f);
    against_a_loop(40, 33, 7, 30.0f);
    against_a_loop(700, 5, 2, 1.0f);   // more members than one block of rows
    against_a_loop(9, 1100, 3, 0.0f);  // more columns than one tile
    against_a_loop(1, 1, 1, 1.0f);
    against_a_loop(0, 4, 3, 1.0f);
    one_member_is_returned_exactly();
    masked_rows_are_not_read();
}
