#include <algorithm>

#include "check.h"

namespace {

void against_fp64(int64_t N, int64_t C, float smoothing, float spread) {
    const std::vector<float> logits = check::normal(N * C, 1, spread);
    std::vector<int64_t> labels(static_cast<size_t>(N));
    for (int64_t i = 0; i < N; ++i) labels[static_cast<size_t>(i)] = i % (C + 2) - 1;  // -1 and C too
    // rows further apart than they are long: no gap is read or written
    const int64_t stride = C + 3;
    const float gap = -7.0f;
    std::vector<float> rows(static_cast<size_t>(N * stride), gap);
    for (int64_t i = 0; i < N; ++i) std::copy_n(logits.data() + i * C, C, rows.data() + i * stride);
    const std::vector<float> given = rows;
    std::vector<float> loss_alone = check::unwritten(N), loss = check::unwritten(N);
    mooring::softmax_cross_entropy_in_place(rows.data(), stride, labels.data(), smoothing, false,
                                            loss_alone.data(), N, C, check::kThreads);
    CHECK(rows == given);
    mooring::softmax_cross_entropy_in_place(rows.data(), stride, labels.data(), smoothing, true, loss.data(),
                                            N, C, check::kThreads);
    std::vector<float> dense = logits, dense_loss = check::unwritten(N);
    mooring::softmax_cross_entropy_in_place(dense.data(), C, labels.data(), smoothing, true,
                                            dense_loss.data(), N, C, 1);
    CHECK(dense_loss == loss);
    for (int64_t i = 0; i < N; ++i) {
        const size_t at = static_cast<size_t>(i);
        const float* x = logits.data() + i * C;
        const float* grad = rows.data() + i * stride;
        const int64_t label = labels[at];
        CHECK(std::equal(grad, grad + C, dense.data() + i * C));
        for (int64_t c = C; c < stride; ++c) CHECK(grad[c] == gap);
        if (label < 0 || label >= C) {
            CHECK(loss[at] == 0.0f && loss_alone[at] == 0.0f);
            for (int64_t c = 0; c < C; ++c) CHECK(grad[c] == 0.0f);
            continue;
        }
        double highest = -INFINITY, total = 0, mean = 0, size = 0;
        for (int64_t c = 0; c < C; ++c) highest = std::fmax(highest, x[c]);
        for (int64_t c = 0; c < C; ++c) {
            total += std::exp(x[c] - highest);
            mean += static_cast<double>(x[c]) / static_cast<double>(C);
            size = std::fmax(size, std::fabs(x[c]));
        }
        const double exact = highest + std::log(total);
        const double tolerance = check::kUlp * (static_cast<double>(C) + 8) * (size + 1);
        const double expected = exact - (1.0 - smoothing) * x[label] - smoothing * mean;
        CHECK_NEAR(loss_alone[at], expected, tolerance);
        CHECK_NEAR(loss[at], expected, tolerance);
        for (int64_t c = 0; c < C; ++c) {
            const double p = std::exp(x[c] - exact);
            const double target = (c == label ? 1.0 - smoothing : 0.0) + smoothing / static_cast<double>(C);
            CHECK_NEAR(grad[c], p - target, tolerance);
        }
    }
}

void large_logits_do_not_cancel() {
    const int64_t label = 0;
    for (bool gradient : {false, true}) {
        std::vector<float> shifted = {10000.0f, 10001.0f};
        float loss = check::nan();
        mooring::softmax_cross_entropy_in_place(shifted.data(), 2, &label, 0.0f, gradient, &loss, 1, 2, 1);
        CHECK_NEAR(loss, 1.3132616875, 1e-6);
        if (gradient) CHECK_NEAR(shifted[1], 0.7310585786, 1e-6);
    }
}

void a_forbidden_class_has_no_gradient_and_a_nan_is_not_hidden() {
    std::vector<float> rows = {1.0f, -INFINITY, 2.0f, 1.0f, check::nan(), 2.0f};
    const std::vector<int64_t> labels = {0, 0};
    std::vector<float> loss = check::unwritten(2);
    mooring::softmax_cross_entropy_in_place(rows.data(), 3, labels.data(), 0.0f, true, loss.data(), 2, 3, 1);
    CHECK_NEAR(loss[0], 1.3132616875, 1e-6);
    CHECK(rows[1] == 0.0f && std::isnan(loss[1]) && std::isnan(rows[3]));
}

void masked_rows_are_not_read() {
    std::vector<float> rows = check::unwritten(6);
    const std::vector<int64_t> labels = {-1, 3};
    std::vector<float> loss = check::unwritten(2);
    mooring::softmax_cross_entropy_in_place(rows.data(), 3, labels.data(), 0.1f, true, loss.data(), 2, 3, 1);
    CHECK(loss == std::vector<float>(2, 0.0f) && rows == std::vector<float>(6, 0.0f));
}

}  // namespace

int main() {
    check::begin();
    for (float smoothing : {0.0f, 0.1f, 1.0f}) {
        for (int64_t C : {1, 2, 10, 16, 37, 1000}) against_fp64(C + 5 < 40 ? C + 5 : 40, C, smoothing, 3.0f);
    }
    against_fp64(12, 9, 0.1f, 30.0f);
    large_logits_do_not_cancel();
    a_forbidden_class_has_no_gradient_and_a_nan_is_not_hidden();
    masked_rows_are_not_read();
}
