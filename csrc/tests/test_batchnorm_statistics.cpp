#include "cpu/batchnorm_statistics.h"

#include "check.h"

using mooring::BatchnormLayer;
using mooring::DType;

namespace {

struct Result {
    std::vector<float> y, mean, var;
    std::vector<uint16_t> y_stored;
};

Result run(const void* x, DType dtype, const BatchnormLayer& layer, int64_t B, int64_t P, bool rows,
           int threads) {
    const int64_t size = B * layer.C * P;
    Result result{check::unwritten(size), check::unwritten(layer.C), check::unwritten(layer.C),
                  std::vector<uint16_t>(static_cast<size_t>(size), 0xffff)};
    void* y = dtype == DType::f32 ? static_cast<void*>(result.y.data()) : result.y_stored.data();
    if (rows) {
        mooring::batchnorm_statistics_rows(x, dtype, layer, y, result.mean.data(), result.var.data(), B * P,
                                           threads);
    } else {
        mooring::batchnorm_statistics_planes(x, dtype, layer, y, result.mean.data(), result.var.data(), B, P,
                                             threads);
    }
    return result;
}

void against_a_loop(int64_t B, int64_t C, int64_t P, bool rows, bool affine) {
    std::vector<float> x = check::normal(B * C * P, 1);
    const std::vector<uint16_t> stored = check::to_bf16(x);
    const std::vector<float> shift = check::normal(C, 2), weight = check::normal(C, 3),
                             bias = check::normal(C, 4);
    std::vector<float> spread = check::normal(C, 5);
    for (float& v : spread) v = v * v + 0.3f;
    const double eps = 1e-5;
    const BatchnormLayer layer{shift.data(),
                               spread.data(),
                               affine ? weight.data() : nullptr,
                               affine ? bias.data() : nullptr,
                               eps,
                               C};
    const Result result = run(x.data(), DType::f32, layer, B, P, rows, 1);
    const Result threaded = run(x.data(), DType::f32, layer, B, P, rows, check::kThreads);
    const Result from_bf16 = run(stored.data(), DType::bf16, layer, B, P, rows, check::kThreads);
    const double n = static_cast<double>(B * P);
    for (int64_t c = 0; c < C; ++c) {
        const size_t channel = static_cast<size_t>(c);
        double mean = 0, var = 0;
        const auto at = [&](int64_t b, int64_t p) {
            return static_cast<size_t>(rows ? (b * P + p) * C + c : (b * C + c) * P + p);
        };
        for (int64_t b = 0; b < B; ++b)
            for (int64_t p = 0; p < P; ++p) mean += x[at(b, p)] / n;
        for (int64_t b = 0; b < B; ++b) {
            for (int64_t p = 0; p < P; ++p) {
                const double d = x[at(b, p)], gamma = affine ? weight[channel] : 1.0;
                var += (d - mean) * (d - mean) / (n > 1 ? n - 1 : 1);
                const double scale = gamma / std::sqrt(spread[channel] + eps);
                const double y = (d - shift[channel]) * scale + (affine ? bias[channel] : 0.0);
                CHECK_NEAR(result.y[at(b, p)], y, check::kUlp * 4 * (std::fabs(y) + 8 * std::fabs(scale)));
                // bf16 rounds the same fp32 result once
                CHECK_NEAR(check::from_bf16(from_bf16.y_stored[at(b, p)]), result.y[at(b, p)],
                           std::fabs(y) / 256 + 1e-30);
            }
        }
        const double distance = (mean - shift[channel]) * (mean - shift[channel]);
        CHECK_NEAR(result.mean[channel], mean, check::kUlp * 300 * (1 + std::fabs(shift[channel])));
        CHECK_NEAR(result.var[channel], var, check::kUlp * 300 * (1 + var + distance));
    }
    // the same numbers in another storage, and another number of threads: the same sums
    CHECK(threaded.y == result.y && threaded.mean == result.mean && threaded.var == result.var);
    CHECK(from_bf16.mean == result.mean && from_bf16.var == result.var);
}

}  // namespace

int main() {
    check::begin();
    for (bool rows : {false, true}) {
        against_a_loop(3, 5, 37, rows, true);
        against_a_loop(7, 64, 49, rows, true);
        against_a_loop(2, 3, 4096 + 4099, rows, false);  // planes of more than one block
        against_a_loop(131, 33, 2, rows, true);          // rows of more than one part
        against_a_loop(1, 1, 1, rows, false);
        against_a_loop(40, 70, 33, rows, true);  // several tasks and channel tiles
    }
}
