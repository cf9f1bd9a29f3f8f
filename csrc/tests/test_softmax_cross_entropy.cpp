#include "check.h"

namespace {

void against_fp64(int64_t N, int64_t C, float smoothing, float spread) {
    const std::vector<float> logits = check::normal(N * C, 1, spread);
    std::vector<int64_t> labels(static_cast<size_t>(N));
    for (int64_t i = 0; i < N; ++i) labels[static_cast<size_t>(i)] = i % (C + 2) - 1;  // -1 and C too
    std::vector<float> loss = check::unwritten(N), lse = check::unwritten(N), grad = check::unwritten(N * C);
    mooring::softmax_cross_entropy_forward(logits.data(), labels.data(), smoothing, loss.data(), lse.data(),
                                           N, C, check::kThreads);
    const float scale = 0.7f;
    mooring::softmax_cross_entropy_backward(logits.data(), labels.data(), lse.data(), scale, smoothing,
                                            grad.data(), N, C, check::kThreads);
    // in place, with rows further apart than they are long: the same loss and gradient, and no gap written
    const int64_t stride = C + 3;
    std::vector<float> loss_alone = check::unwritten(N);
    std::vector<float> same = logits;
    mooring::softmax_cross_entropy_in_place(same.data(), C, labels.data(), smoothing, false,
                                            loss_alone.data(), N, C, check::kThreads);
    CHECK(same == logits);
    std::vector<float> wide(static_cast<size_t>(N * stride), -7.0f), loss_again = check::unwritten(N);
    for (int64_t i = 0; i < N * C; ++i)
        wide[static_cast<size_t>(i / C * stride + i % C)] = logits[static_cast<size_t>(i)];
    mooring::softmax_cross_entropy_in_place(wide.data(), stride, labels.data(), smoothing, true,
                                            loss_again.data(), N, C, check::kThreads);
    for (int64_t i = 0; i < N * stride; ++i) {
        const int64_t row = i / stride, column = i % stride;
        const float value = wide[static_cast<size_t>(i)];
        if (column >= C) {
            CHECK(value == -7.0f);
        } else {
            CHECK_NEAR(scale * value, grad[static_cast<size_t>(row * C + column)],
                       check::kUlp * (static_cast<double>(C) + 8) * (spread * 5 + 1));
        }
    }
    for (size_t i = 0; i < loss.size(); ++i) {
        CHECK_NEAR(loss_again[i], loss[i], check::kUlp * 8 * (spread * 5 + 1));
        CHECK_NEAR(loss_alone[i], loss[i], check::kUlp * 8 * (spread * 5 + 1));
    }
    for (int64_t i = 0; i < N; ++i) {
        const size_t at = static_cast<size_t>(i);
        const float* x = logits.data() + i * C;
        const int64_t label = labels[at];
        if (label < 0 || label >= C) {
            CHECK(loss[at] == 0.0f && lse[at] == 0.0f);
            for (int64_t c = 0; c < C; ++c) CHECK(grad[static_cast<size_t>(i * C + c)] == 0.0f);
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
        CHECK_NEAR(lse[at], exact, tolerance);
        CHECK_NEAR(loss[at], exact - (1.0 - smoothing) * x[label] - smoothing * mean, tolerance);
        for (int64_t c = 0; c < C; ++c) {
            const double p = std::exp(x[c] - exact);
            const double target = (c == label ? 1.0 - smoothing : 0.0) + smoothing / static_cast<double>(C);
            CHECK_NEAR(grad[static_cast<size_t>(i * C + c)], scale * (p - target), tolerance);
        }
    }
}

void large_logits_do_not_cancel() {
    const std::vector<float> shifted = {10000.0f, 10001.0f};
    const int64_t label = 0;
    float loss = check::nan(), lse = check::nan();
    mooring::softmax_cross_entropy_forward(shifted.data(), &label, 0.0f, &loss, &lse, 1, 2, 1);
    CHECK_NEAR(loss, 1.3132616875, 1e-6);
}

void a_forbidden_class_has_no_gradient_and_a_nan_is_not_hidden() {
    const std::vector<float> logits = {1.0f, -INFINITY, 2.0f, 1.0f, check::nan(), 2.0f};
    const std::vector<int64_t> labels = {0, 0};
    std::vector<float> loss = check::unwritten(2), lse = check::unwritten(2), grad = check::unwritten(6);
    mooring::softmax_cross_entropy_forward(logits.data(), labels.data(), 0.0f, loss.data(), lse.data(), 2, 3,
                                           1);
    mooring::softmax_cross_entropy_backward(logits.data(), labels.data(), lse.data(), 1.0f, 0.0f, grad.data(),
                                            2, 3, 1);
    CHECK_NEAR(loss[0], 1.3132616875, 1e-6);
    CHECK(grad[1] == 0.0f && std::isnan(loss[1]) && std::isnan(grad[3]));
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
}
