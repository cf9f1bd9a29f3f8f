// Each row primitive on every length around the vector widths, against fp64.
#include "check.h"

using mooring::DType;
using mooring::index_of;
using mooring::RowKernels;

namespace {

constexpr int f32 = 0, bf16 = 1;

void sums(const RowKernels& kernels, int64_t n) {
    std::vector<float> x = check::normal(n, 1), y = check::normal(n, 2);
    const std::vector<uint16_t> x_stored = check::to_bf16(x);
    double squares = 0, product = 0, total = 0, size = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        squares += static_cast<double>(x[i]) * x[i];
        product += static_cast<double>(x[i]) * y[i];
        size += std::fabs(static_cast<double>(x[i]) * y[i]);
        total += x[i];
    }
    // n roundings of terms whose sizes add up to `size`
    const double tolerance = static_cast<double>(n + 2) * check::kUlp;
    CHECK_NEAR(kernels.sum_of_squares[f32](x.data(), n), squares, tolerance * squares);
    CHECK_NEAR(kernels.sum_of_squares[bf16](x_stored.data(), n), squares, tolerance * squares);
    CHECK_NEAR(kernels.dot[f32](x.data(), y.data(), n), product, tolerance * size);
    CHECK_NEAR(kernels.dot[bf16](x_stored.data(), y.data(), n), product, tolerance * size);
    CHECK_NEAR(kernels.sum(x.data(), n), total, tolerance * static_cast<double>(n));
    float highest = -INFINITY;
    for (float value : x) highest = value > highest ? value : highest;
    CHECK(kernels.maximum(x.data(), n) == highest);
}

void elementwise(const RowKernels& kernels, int64_t n) {
    std::vector<float> x = check::normal(n, 3), y = check::normal(n, 4);
    const std::vector<uint16_t> x_stored = check::to_bf16(x), y_stored = [&] { return check::to_bf16(y); }();
    for (int dtype : {f32, bf16}) {
        const void* source = dtype == f32 ? static_cast<const void*>(x.data()) : x_stored.data();
        std::vector<float> accumulated = y, difference = check::unwritten(n), scaled = check::unwritten(n);
        kernels.accumulate[dtype](accumulated.data(), 0.75f, source, n);
        kernels.subtract[dtype](difference.data(), source, y.data(), n);
        kernels.scale[f32][dtype](scaled.data(), source, 0.3f, n);
        for (size_t i = 0; i < x.size(); ++i) {
            CHECK_NEAR(accumulated[i], y[i] + 0.75 * x[i],
                       2 * check::kUlp * (std::fabs(y[i]) + std::fabs(x[i])));
            CHECK(difference[i] == x[i] - y[i]);
            CHECK(scaled[i] == x[i] * 0.3f);
        }
    }
    std::vector<float> combined = check::unwritten(n), shifted = y;
    kernels.combine[f32](combined.data(), 2.0f, x.data(), -0.5f, y.data(), n);
    std::vector<uint16_t> combined_stored(static_cast<size_t>(n), 0x7fff);
    kernels.combine[bf16](combined_stored.data(), 2.0f, x_stored.data(), -0.5f, y_stored.data(), n);
    const double squares = kernels.add_and_sum_squares(shifted.data(), x.data(), n);
    double expected_squares = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double exact = 2.0 * x[i] - 0.5 * y[i], size = 2 * std::fabs(x[i]) + std::fabs(y[i]);
        CHECK_NEAR(combined[i], exact, 2 * check::kUlp * size);
        CHECK_NEAR(check::from_bf16(combined_stored[i]), exact, size / 256);  // half an ulp of 8 bits
        CHECK(shifted[i] == y[i] + x[i]);
        expected_squares += static_cast<double>(shifted[i]) * shifted[i];
    }
    CHECK_NEAR(squares, expected_squares, static_cast<double>(n + 2) * check::kUlp * expected_squares);
}

// What is written past the caches is what is written through them, to any address, and nothing around it.
void streamed(const RowKernels& kernels, int64_t n) {
    std::vector<float> x = check::normal(n, 6), y = check::normal(n, 7);
    const std::vector<uint16_t> x_stored = check::to_bf16(x), y_stored = check::to_bf16(y);
    for (int64_t shift = 0; shift < 3; ++shift) {
        const size_t size = static_cast<size_t>(n + 8), at = static_cast<size_t>(shift);
        std::vector<float> through(size, -7.0f), past = through;
        kernels.scale[f32][bf16](through.data() + at, x_stored.data(), 0.3f, n);
        kernels.scale_streamed[f32][bf16](past.data() + at, x_stored.data(), 0.3f, n);
        kernels.fence();
        CHECK(through == past);
        kernels.combine[f32](through.data() + at, 2.0f, x.data(), -0.5f, y.data(), n);
        kernels.combine_streamed[f32](past.data() + at, 2.0f, x.data(), -0.5f, y.data(), n);
        kernels.fence();
        CHECK(through == past);
        std::vector<uint16_t> through_stored(size, 0x1234), past_stored = through_stored;
        kernels.scale[bf16][f32](through_stored.data() + at, x.data(), 0.3f, n);
        kernels.scale_streamed[bf16][f32](past_stored.data() + at, x.data(), 0.3f, n);
        kernels.fence();
        CHECK(through_stored == past_stored);
        kernels.combine[bf16](through_stored.data() + at, 2.0f, x_stored.data(), -0.5f, y_stored.data(), n);
        kernels.combine_streamed[bf16](past_stored.data() + at, 2.0f, x_stored.data(), -0.5f, y_stored.data(),
                                       n);
        kernels.fence();
        CHECK(through_stored == past_stored);
    }
}

void rows_at_once(const RowKernels& kernels, int64_t n) {
    std::vector<std::vector<float>> rows;
    std::vector<std::vector<uint16_t>> stored;
    for (unsigned r = 0; r < 3; ++r) {
        rows.push_back(check::normal(n, 10 + r));
        stored.push_back(check::to_bf16(rows.back()));
    }
    const float weight[] = {0.5f, -1.25f, 2.0f};
    for (int count : {0, 1, 3}) {
        for (int dtype : {f32, bf16}) {
            const void* sources[3];
            for (size_t r = 0; r < 3; ++r)
                sources[r] = dtype == f32 ? static_cast<const void*>(rows[r].data()) : stored[r].data();
            const mooring::Ahead ahead = {sources, count, dtype == f32 ? 4 : 2};
            const float decay = count == 1 ? 0.0f : 0.75f;
            std::vector<float> acc = count == 1 ? check::unwritten(n) : check::normal(n, 20);
            const std::vector<float> before = count == 1 ? std::vector<float>(acc.size(), 0.0f) : acc;
            kernels.accumulate_rows[dtype](acc.data(), decay, sources, weight, count, n, ahead);
            for (size_t i = 0; i < acc.size(); ++i) {
                double exact = static_cast<double>(decay) * before[i], size = std::fabs(exact);
                for (int r = 0; r < count; ++r) {
                    const double term = static_cast<double>(weight[r]) * rows[static_cast<size_t>(r)][i];
                    exact += term;
                    size += std::fabs(term);
                }
                CHECK_NEAR(acc[i], exact, 4 * check::kUlp * size);
            }
        }
    }
}

// A product that fetches other rows meanwhile is the plain one, up to the order of its sum.
void fetching(const RowKernels& kernels, int64_t n) {
    std::vector<float> x = check::normal(n, 30), y = check::normal(n, 31);
    const std::vector<uint16_t> x_stored = check::to_bf16(x);
    const void* rows[] = {y.data()};
    double exact = 0, size = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        exact += static_cast<double>(x[i]) * y[i];
        size += std::fabs(static_cast<double>(x[i]) * y[i]);
    }
    const double tolerance = static_cast<double>(n + 2) * check::kUlp * size;
    CHECK_NEAR(kernels.dot_fetching[f32](x.data(), y.data(), n, {rows, 1, 4}), exact, tolerance);
    CHECK_NEAR(kernels.dot_fetching[bf16](x_stored.data(), y.data(), n, mooring::kNothingAhead), exact,
               tolerance);
}

void exponentials(const RowKernels& kernels, int64_t n) {
    const std::vector<float> x = check::normal(n, 5, 4.0f);
    double total = 0;
    for (float value : x) total += std::exp(static_cast<double>(value) - 2.0);
    // the argument is rounded (|x - 2| < 32: 2 ulp of 16), exp to an ulp or two, the sum n times
    const double tolerance = static_cast<double>(n + 40) * check::kUlp;
    CHECK_NEAR(kernels.sum_exp(x.data(), 2.0f, n), total, tolerance * total);
    std::vector<float> grad = check::unwritten(n);
    kernels.softmax_grad(grad.data(), x.data(), 9.0f, 0.01f, 3.0f, n);
    for (size_t i = 0; i < x.size(); ++i) {
        const double p = std::exp(static_cast<double>(x[i]) - 9.0);
        CHECK_NEAR(grad[i], 3.0 * (p - 0.01), 3 * check::kUlp * (40 * p + 0.02));
    }
}

void exp_over_its_range(const RowKernels& kernels) {
    for (float x = -87.0f; x <= 88.0f; x += 0.0173f) {
        const double exact = std::exp(static_cast<double>(x));
        CHECK_NEAR(kernels.sum_exp(&x, 0.0f, 1), exact, 2 * check::kUlp * exact);
    }
    const float below = -90.0f, minus_infinity = -INFINITY, above = 90.0f, not_a_number = check::nan();
    CHECK(kernels.sum_exp(&below, 0.0f, 1) == 0.0f);
    CHECK(kernels.sum_exp(&minus_infinity, 0.0f, 1) == 0.0f);
    CHECK(std::isinf(kernels.sum_exp(&above, 0.0f, 1)));
    CHECK(std::isnan(kernels.sum_exp(&not_a_number, 0.0f, 1)));
    for (int64_t n : {5, 16, 37}) {  // one NaN anywhere in the row reaches the sum
        for (int64_t place = 0; place < n; ++place) {
            std::vector<float> row = check::normal(n, 6);
            row[static_cast<size_t>(place)] = check::nan();
            CHECK(std::isnan(kernels.sum_exp(row.data(), 1.0f, n)));
        }
    }
}

void bf16_rounds_to_nearest_even(const RowKernels& kernels) {
    const std::vector<std::pair<uint32_t, uint16_t>> cases = {
        {0x3f800000u, 0x3f80},  // exact
        {0x3f808000u, 0x3f80},  // half way, even below
        {0x3f818000u, 0x3f82},  // half way, even above
        {0x3f808001u, 0x3f81},  // just over half
        {0x3f807fffu, 0x3f80},  // just under half
        {0x7f7fffffu, 0x7f80},  // largest finite overflows to infinity
        {0x7f800000u, 0x7f80},  // infinity
        {0xbf818000u, 0xbf82},  // sign
        {0x00000001u, 0x0000},  // subnormal
        {0x7f800001u, 0x7fc0},  // a NaN whose upper half alone would be infinity
        {0xffffffffu, 0xffff},  // a NaN that must not carry over
    };
    for (size_t count : {cases.size(), size_t{40}}) {  // in the tail and in whole vectors
        std::vector<float> x(count);
        for (size_t i = 0; i < count; ++i) {
            std::memcpy(&x[i], &cases[i % cases.size()].first, sizeof(float));
        }
        std::vector<uint16_t> stored(count, 0x1234);
        kernels.scale[bf16][f32](stored.data(), x.data(), 1.0f, static_cast<int64_t>(count));
        for (size_t i = 0; i < count; ++i) CHECK(stored[i] == cases[i % cases.size()].second);
    }
}

}  // namespace

int main() {
    check::begin();
    const RowKernels& kernels = mooring::row_kernels();
    for (int64_t n = 1; n <= 70; ++n) {
        sums(kernels, n);
        elementwise(kernels, n);
        streamed(kernels, n);
        fetching(kernels, n);
        rows_at_once(kernels, n);
        exponentials(kernels, n);
    }
    for (int64_t n : {257, 1000, 2048}) {
        sums(kernels, n);
        elementwise(kernels, n);
        exponentials(kernels, n);
    }
    exp_over_its_range(kernels);
    bf16_rounds_to_nearest_even(kernels);
}
