#include "cpu/two_head_cross_entropy.h"

#include "check.h"

using mooring::DType;
using mooring::HeadRows;

namespace {

// The rows of one head, and what is expected of them.
struct Head {
    std::vector<float> logits;
    std::vector<uint16_t> stored;
    std::vector<int64_t> labels;
    int64_t rows, C;
    DType dtype;

    Head(int64_t rows_, int64_t C_, DType dtype_, unsigned seed)
        : logits(check::normal(rows_ * C_, seed, 3.0f)),
          stored(check::to_bf16(logits)),
          rows(rows_),
          C(C_),
          dtype(dtype_) {
        for (int64_t i = 0; i < rows; ++i) labels.push_back(i % (C + 2) - 1);  // -1 and C too
    }
    bool valid(int64_t i) const {
        return labels[static_cast<size_t>(i)] >= 0 && labels[static_cast<size_t>(i)] < C;
    }
    int64_t count() const {
        int64_t found = 0;
        for (int64_t i = 0; i < rows; ++i) found += valid(i);
        return found;
    }
    HeadRows given() const {
        const void* data = dtype == DType::f32 ? static_cast<const void*>(logits.data()) : stored.data();
        return {{data, dtype}, labels.data(), rows, C};
    }
    double lse(int64_t i) const {
        double highest = -INFINITY, total = 0;
        for (int64_t c = 0; c < C; ++c) highest = std::fmax(highest, at(i, c));
        for (int64_t c = 0; c < C; ++c) total += std::exp(at(i, c) - highest);
        return highest + std::log(total);
    }
    double at(int64_t i, int64_t c) const { return logits[static_cast<size_t>(i * C + c)]; }
    double mean_loss(double smoothing) const {
        double total = 0;
        for (int64_t i = 0; i < rows; ++i) {
            if (!valid(i)) continue;
            double mean = 0;
            for (int64_t c = 0; c < C; ++c) mean += at(i, c) / static_cast<double>(C);
            total += lse(i) - (1 - smoothing) * at(i, labels[static_cast<size_t>(i)]) - smoothing * mean;
        }
        return total / std::fmax(static_cast<double>(count()), 1);
    }
    void check_gradient(const std::vector<float>& grad, double scale, double smoothing) const {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t c = 0; c < C; ++c) {
                const size_t place = static_cast<size_t>(i * C + c);
                const double slope = dtype == DType::f32 ? grad[place] : check::bf16_at(grad, place);
                const double own = c == labels[static_cast<size_t>(i)] ? 1 - smoothing : 0;
                const double exact =
                    valid(i)
                        ? scale * (std::exp(at(i, c) - lse(i)) - own - smoothing / static_cast<double>(C))
                        : 0;
                const double rounding = dtype == DType::f32 ? 0 : std::fabs(exact) / 250;
                CHECK_NEAR(slope, exact, check::kUlp * static_cast<double>(C + 24) * 16 + rounding);
            }
        }
    }
};

void against_fp64(const Head& target, const Head& source, float smoothing) {
    const float weight = 0.4f;
    float both = check::nan(), target_loss = check::nan(), source_loss = check::nan();
    std::vector<float> inverse_counts = check::unwritten(2),
                       lse = check::unwritten(target.rows + source.rows);
    mooring::two_head_cross_entropy_forward(target.given(), source.given(), weight, smoothing,
                                            {&both, &target_loss, &source_loss}, inverse_counts.data(),
                                            lse.data(), check::kThreads);
    const double tolerance = check::kUlp * static_cast<double>(target.C + source.C + 24) * 16;
    CHECK_NEAR(target_loss, target.mean_loss(smoothing), tolerance);
    CHECK_NEAR(source_loss, source.mean_loss(smoothing), tolerance);
    CHECK_NEAR(both, target_loss + weight * source_loss, tolerance);
    for (int64_t n = 0; n < target.rows + source.rows; ++n) {
        const Head& head = n < target.rows ? target : source;
        const int64_t i = n < target.rows ? n : n - target.rows;
        CHECK_NEAR(lse[static_cast<size_t>(n)], head.valid(i) ? head.lse(i) : 0, tolerance);
    }
    CHECK_NEAR(inverse_counts[0], 1 / std::fmax(static_cast<double>(target.count()), 1), check::kUlp);
    CHECK_NEAR(inverse_counts[1], 1 / std::fmax(static_cast<double>(source.count()), 1), check::kUlp);

    std::vector<float> grad_target = check::unwritten(target.rows * target.C),
                       grad_source = check::unwritten(source.rows * source.C);
    mooring::two_head_cross_entropy_backward(target.given(), source.given(), lse.data(), 0.7f, -0.3f,
                                             smoothing, grad_target.data(), grad_source.data(),
                                             check::kThreads);
    target.check_gradient(grad_target, static_cast<double>(0.7f), smoothing);
    source.check_gradient(grad_source, static_cast<double>(-0.3f), smoothing);
    std::vector<float> alone = check::unwritten(source.rows * source.C);
    mooring::two_head_cross_entropy_backward(target.given(), source.given(), lse.data(), 0.7f, -0.3f,
                                             smoothing, nullptr, alone.data(), 1);
    source.check_gradient(alone, static_cast<double>(-0.3f), smoothing);
}

}  // namespace

int main() {
    check::begin();
    for (float smoothing : {0.0f, 0.1f}) {
        for (DType dtype : {DType::f32, DType::bf16}) {
            against_fp64({9, 5, dtype, 1}, {7, 37, dtype, 2}, smoothing);
            against_fp64({3, 1000, dtype, 3}, {21, 16, DType::f32, 4}, smoothing);
            against_fp64({4, 2, DType::f32, 5}, {0, 9, dtype, 6}, smoothing);
            against_fp64({0, 3, dtype, 7}, {1, 4, dtype, 8}, smoothing);  // its only label is -1
        }
    }
}
