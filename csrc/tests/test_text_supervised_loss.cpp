#include "cpu/text_supervised_loss.h"

#include "check.h"

using mooring::DType;
using mooring::Matrix;
using mooring::TextSupervision;

namespace {

struct Exact {
    double loss, lse_logits, lse_texts;
    std::vector<double> grad_logits, grad_cosines;
};

Exact exact_row(const float* z, const float* v, int64_t y, TextSupervision by, int64_t C) {
    double total_z = 0, total_a = 0, peak_z = -INFINITY, peak_a = -INFINITY, expected_z = 0;
    const double k = by.inverse_tau, lambda_v = by.lambda_v, lambda_t = by.lambda_t;
    for (int64_t c = 0; c < C; ++c) {
        peak_z = std::fmax(peak_z, z[c]);
        peak_a = std::fmax(peak_a, k * v[c]);
    }
    for (int64_t c = 0; c < C; ++c) {
        total_z += std::exp(z[c] - peak_z);
        total_a += std::exp(k * v[c] - peak_a);
    }
    Exact row;
    row.lse_logits = peak_z + std::log(total_z);
    row.lse_texts = peak_a + std::log(total_a);
    for (int64_t c = 0; c < C; ++c) {
        const double p = std::exp(z[c] - row.lse_logits), r = std::exp(k * v[c] - row.lse_texts);
        const double own = c == y ? 1 : 0;
        expected_z += r * z[c];
        row.grad_logits.push_back(p - (1 - lambda_v) * own - lambda_v * r);
        row.grad_cosines.push_back(lambda_t * k * (r - own));
    }
    row.loss = row.lse_logits - (1 - lambda_v) * z[y] - lambda_v * expected_z +
               lambda_t * (row.lse_texts - k * v[y]);
    return row;
}

void against_fp64(int64_t B, int64_t C, TextSupervision by, DType logits_dtype, DType cosines_dtype) {
    std::vector<float> z = check::normal(B * C, 1, 3.0f), v = check::normal(B * C, 2, 0.3f);
    const std::vector<uint16_t> z_stored = check::to_bf16(z), v_stored = check::to_bf16(v);
    const auto matrix = [](DType dtype, const std::vector<float>& wide, const std::vector<uint16_t>& stored) {
        return Matrix{dtype == DType::f32 ? static_cast<const void*>(wide.data()) : stored.data(), dtype};
    };
    const Matrix logits = matrix(logits_dtype, z, z_stored), cosines = matrix(cosines_dtype, v, v_stored);
    std::vector<int64_t> labels(static_cast<size_t>(B));
    for (int64_t i = 0; i < B; ++i) labels[static_cast<size_t>(i)] = i % (C + 2) - 1;  // -1 and C too

    float loss = check::nan(), inverse_count = check::nan();
    std::vector<float> lse_logits = check::unwritten(B), lse_texts = check::unwritten(B);
    mooring::text_supervised_loss_forward(logits, cosines, labels.data(), by, &loss, &inverse_count,
                                          lse_logits.data(), lse_texts.data(), B, C, check::kThreads);
    const float scale = 0.7f;
    // fp32 fits either dtype
    std::vector<float> grad_logits = check::unwritten(B * C), grad_cosines = check::unwritten(B * C);
    mooring::text_supervised_loss_backward(logits, cosines, labels.data(), lse_logits.data(),
                                           lse_texts.data(), by, scale, grad_logits.data(),
                                           grad_cosines.data(), B, C, check::kThreads);
    const auto stored_at = [](DType dtype, const std::vector<float>& values, size_t at) {
        return dtype == DType::f32 ? values[at] : check::bf16_at(values, at);
    };
    double total = 0, count = 0;
    const double size = 16 + 2 * static_cast<double>(by.inverse_tau);
    const double tolerance = check::kUlp * (std::sqrt(static_cast<double>(C)) + 24) * size;
    for (int64_t i = 0; i < B; ++i) {
        const size_t at = static_cast<size_t>(i);
        const int64_t y = labels[at];
        const bool valid = y >= 0 && y < C;
        const Exact row = exact_row(z.data() + i * C, v.data() + i * C, valid ? y : 0, by, C);
        CHECK_NEAR(lse_logits[at], valid ? row.lse_logits : 0, tolerance);
        CHECK_NEAR(lse_texts[at], valid ? row.lse_texts : 0, tolerance);
        for (int64_t c = 0; c < C; ++c) {
            const size_t place = static_cast<size_t>(i * C + c), column = static_cast<size_t>(c);
            const double slope = valid ? static_cast<double>(scale) : 0;
            const double z_exact = slope * row.grad_logits[column],
                         v_exact = slope * row.grad_cosines[column];
            const double z_rounding = logits_dtype == DType::f32 ? 0 : std::fabs(z_exact) / 250;
            const double v_rounding = cosines_dtype == DType::f32 ? 0 : std::fabs(v_exact) / 250;
            CHECK_NEAR(stored_at(logits_dtype, grad_logits, place), z_exact, tolerance + z_rounding);
            CHECK_NEAR(stored_at(cosines_dtype, grad_cosines, place), v_exact,
                       tolerance * (1 + static_cast<double>(by.lambda_t * by.inverse_tau)) + v_rounding);
        }
        if (!valid) continue;
        total += row.loss;
        count += 1;
    }
    CHECK_NEAR(inverse_count, 1 / std::fmax(count, 1), 2 * check::kUlp);
    CHECK_NEAR(loss, total / std::fmax(count, 1), tolerance);
}

void one_gradient_alone_is_the_same() {
    const int64_t B = 2, C = 19;
    const std::vector<float> z = check::normal(B * C, 3), v = check::normal(B * C, 4, 0.3f);
    const std::vector<int64_t> labels = {18, -1};
    const std::vector<float> lse_logits = {2.5f, 0.0f}, lse_texts = {30.0f, 0.0f};
    const Matrix logits = {z.data(), DType::f32}, cosines = {v.data(), DType::f32};
    const auto run = [&](std::vector<float>* grad_logits, std::vector<float>* grad_cosines) {
        mooring::text_supervised_loss_backward(logits, cosines, labels.data(), lse_logits.data(),
                                               lse_texts.data(), {33.0f, 0.1f, 0.3f}, 1.0f,
                                               grad_logits ? grad_logits->data() : nullptr,
                                               grad_cosines ? grad_cosines->data() : nullptr, B, C, 1);
    };
    std::vector<float> both_z = check::unwritten(B * C), both_v = both_z, z_alone = both_z, v_alone = both_z;
    run(&both_z, &both_v);
    run(&z_alone, nullptr);
    run(nullptr, &v_alone);
    CHECK(both_z == z_alone && both_v == v_alone);
}

}  // namespace

int main() {
    check::begin();
    for (int64_t C : {1, 2, 10, 16, 37, 1000}) {
        const int64_t B = C + 5 < 40 ? C + 5 : 40;
        against_fp64(B, C, {1.0f / 0.03f, 0.1f, 0.3f}, DType::f32, DType::f32);
        against_fp64(B, C, {1.0f, 1.0f, 0.0f}, DType::bf16, DType::f32);
        against_fp64(B, C, {100.0f, 0.0f, 1.0f}, DType::bf16, DType::bf16);
        against_fp64(B, C, {1000.0f, 0.2f, 0.5f}, DType::f32, DType::bf16);
    }
    against_fp64(0, 3, {33.0f, 0.1f, 0.3f}, DType::f32, DType::f32);
    one_gradient_alone_is_the_same();
}
