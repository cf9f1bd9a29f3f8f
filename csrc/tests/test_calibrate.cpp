#include "check.h"

using mooring::DType;

namespace {

void against_a_loop(int64_t K, int64_t D, int64_t C) {
    std::vector<float> frozen = check::normal(K * D, 1);
    const std::vector<uint16_t> frozen_stored = check::to_bf16(frozen);
    const std::vector<float> frozen_mean = check::normal(C * D, 2), tuned_mean = check::normal(C * D, 3);
    std::vector<int64_t> labels(static_cast<size_t>(K));
    for (int64_t k = 0; k < K; ++k) labels[static_cast<size_t>(k)] = k % (C + 2) - 1;
    const float scale = 2.5f;
    for (DType dtype : {DType::f32, DType::bf16}) {
        const void* source =
            dtype == DType::f32 ? static_cast<const void*>(frozen.data()) : frozen_stored.data();
        std::vector<float> fused = check::unwritten(K * D), split = check::unwritten(K * D);
        mooring::calibrate_translate({source, dtype}, labels.data(), frozen_mean.data(), tuned_mean.data(),
                                     scale, fused.data(), K, D, C, check::kThreads);
        mooring::calibrate_residual({source, dtype}, labels.data(), frozen_mean.data(), split.data(), K, D, C,
                                    1);
        mooring::calibrate_place(split.data(), labels.data(), tuned_mean.data(), scale, K, D, C, 1);
        CHECK(fused == split);
        for (int64_t k = 0; k < K; ++k) {
            const int64_t c = labels[static_cast<size_t>(k)];
            if (c < 0 || c >= C) {
                for (int64_t j = 0; j < D; ++j) CHECK(fused[static_cast<size_t>(k * D + j)] == 0.0f);
                continue;
            }
            std::vector<double> moved;
            double squares = 0;
            for (int64_t j = 0; j < D; ++j) {
                moved.push_back(static_cast<double>(frozen[static_cast<size_t>(k * D + j)]) -
                                frozen_mean[static_cast<size_t>(c * D + j)] +
                                tuned_mean[static_cast<size_t>(c * D + j)]);
                squares += moved.back() * moved.back();
            }
            for (int64_t j = 0; j < D; ++j) {
                CHECK_NEAR(fused[static_cast<size_t>(k * D + j)],
                           scale * moved[static_cast<size_t>(j)] / std::sqrt(squares),
                           scale * static_cast<double>(D + 12) * check::kUlp * 8 /
                               std::fmin(1.0, std::sqrt(squares)));
            }
        }
    }
}

void a_vanishing_row_stays_zero() {
    const std::vector<float> row = check::normal(6, 1), zero(6, 0.0f);
    const int64_t label = 0;
    std::vector<float> out = check::unwritten(6);
    mooring::calibrate_translate({row.data(), DType::f32}, &label, row.data(), zero.data(), 3.0f, out.data(),
                                 1, 6, 1, 1);
    CHECK(out == zero);
}

}  // namespace

int main() {
    check::begin();
    against_a_loop(11, 33, 4);
    against_a_loop(5, 1, 2);
    against_a_loop(4, 2048, 1);
    against_a_loop(0, 3, 2);
    a_vanishing_row_stays_zero();
}
