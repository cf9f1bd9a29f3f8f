#include <limits>

#include "check.h"

using mooring::DType;

namespace {

constexpr float kEps = 1e-12f;

void forward_and_backward(int64_t N, int64_t D) {
    std::vector<float> x = check::normal(N * D, 1);
    for (int64_t j = 0; j < D; ++j) x[static_cast<size_t>(j)] = 0.0f;  // row 0: a zero row
    const std::vector<float> grad_unit = check::normal(N * D, 2), grad_norm = check::normal(N, 3);
    std::vector<float> unit = check::unwritten(N * D), norm = check::unwritten(N),
                       grad = check::unwritten(N * D);
    mooring::row_normalise_forward({x.data(), DType::f32}, kEps, unit.data(), norm.data(), N, D,
                                   check::kThreads);
    mooring::row_normalise_backward(grad_unit.data(), grad_norm.data(), unit.data(), norm.data(), DType::f32,
                                    kEps, grad.data(), N, D, check::kThreads);
    const double tolerance = static_cast<double>(D + 8) * check::kUlp;
    for (int64_t i = 0; i < N; ++i) {
        const float* row = x.data() + i * D;
        const double exact = check::norm(row, D);
        CHECK_NEAR(norm[static_cast<size_t>(i)], exact, tolerance * exact);
        double along = 0, size = 0;
        const double divisor = exact > kEps ? exact : kEps;
        for (int64_t j = 0; j < D; ++j) {
            const size_t at = static_cast<size_t>(i * D + j);
            CHECK_NEAR(unit[at], row[j] / divisor, tolerance);
            along += row[j] / divisor * grad_unit[at];
            size += std::fabs(row[j] / divisor * grad_unit[at]);
        }
        for (int64_t j = 0; j < D; ++j) {
            const size_t at = static_cast<size_t>(i * D + j);
            const double u = row[j] / divisor, g = grad_unit[at], h = grad_norm[static_cast<size_t>(i)];
            const double expected = exact > kEps ? (g - along * u) / exact + h * u : g / divisor;
            CHECK_NEAR(grad[at], expected, 2 * tolerance * ((std::fabs(g) + size) / divisor + std::fabs(h)));
        }
    }
}

void extreme_rows() {
    // squares that overflow and underflow fp32
    const std::vector<float> x = {3e30f, 4e30f, 3e-30f, 4e-30f};
    std::vector<float> unit = check::unwritten(4), norm = check::unwritten(2);
    mooring::row_normalise_forward({x.data(), DType::f32}, 1e-35f, unit.data(), norm.data(), 2, 2, 1);
    CHECK_NEAR(norm[0], 5e30, 1e24);
    CHECK_NEAR(norm[1], 5e-30, 1e-36);
    for (int row : {0, 1}) {
        CHECK_NEAR(unit[static_cast<size_t>(2 * row)], 0.6, 1e-6);
        CHECK_NEAR(unit[static_cast<size_t>(2 * row + 1)], 0.8, 1e-6);
    }
    const float largest = std::numeric_limits<float>::max();
    const std::vector<float> beyond = {largest, largest}, broken = {1.0f, check::nan()};
    mooring::row_normalise_forward({beyond.data(), DType::f32}, kEps, unit.data(), norm.data(), 1, 2, 1);
    CHECK(std::isinf(norm[0]));
    mooring::row_normalise_forward({broken.data(), DType::f32}, kEps, unit.data(), norm.data(), 1, 2, 1);
    CHECK(std::isnan(norm[0]) && std::isnan(unit[0]));
}

}  // namespace

int main() {
    check::begin();
    for (int64_t D : {1, 2, 7, 16, 33, 768}) forward_and_backward(5, D);
    forward_and_backward(1, 5);
    extreme_rows();
    mooring::row_normalise_forward({nullptr, DType::f32}, kEps, nullptr, nullptr, 0, 4, check::kThreads);
}
