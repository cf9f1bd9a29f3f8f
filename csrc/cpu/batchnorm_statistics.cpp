#include "cpu/batchnorm_statistics.h"

#include <cmath>

#include "cpu/batchnorm_rows.h"
#include "cpu/capability.h"
#include "cpu/parallel.h"
#include "cpu/row_pointer.h"

namespace mooring {

const BatchnormKernels& batchnorm_kernels() {
    switch (active_capability()) {
#ifdef MOORING_X86
        case Capability::avx512:
            return avx512::batchnorm_kernels;
        case Capability::avx2:
            return avx2::batchnorm_kernels;
#endif
        default:
            return scalar::batchnorm_kernels;
    }
}

namespace {

// Rows whose sums stay in fp32: rounding grows with this, not with their number.
constexpr int64_t kRowsPerPart = 128;
// Elements that a thread takes at a time.
constexpr int64_t kElementsPerTask = 64 * 1024;
constexpr int64_t kChannelsPerTile = 64;

struct Scales {
    std::vector<float> scale, offset;

    explicit Scales(const BatchnormLayer& layer)
        : scale(static_cast<size_t>(layer.C)), offset(static_cast<size_t>(layer.C)) {
        for (int64_t c = 0; c < layer.C; ++c) {
            const double gamma = layer.weight ? layer.weight[c] : 1.0;
            scale[static_cast<size_t>(c)] =
                static_cast<float>(gamma / std::sqrt(static_cast<double>(layer.running_var[c]) + layer.eps));
            offset[static_cast<size_t>(c)] = layer.bias ? layer.bias[c] : 0.0f;
        }
    }
};

// mean = shift + S1 / n, var = (S2 - S1^2 / n) / (n - 1), from `parts` partial sums of each channel.
void combine(const float* s1, const float* s2, int64_t parts, const BatchnormLayer& layer, double n,
             float* mean, float* var, int workers) {
    const int64_t C = layer.C, tiles = (C + kChannelsPerTile - 1) / kChannelsPerTile;
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * kChannelsPerTile;
        const int64_t width = C - first < kChannelsPerTile ? C - first : kChannelsPerTile;
        double sum[kChannelsPerTile] = {}, squares[kChannelsPerTile] = {};
        for (int64_t part = 0; part < parts; ++part) {
            for (int64_t j = 0; j < width; ++j) {
                sum[j] += s1[part * C + first + j];
                squares[j] += s2[part * C + first + j];
            }
        }
        for (int64_t j = 0; j < width; ++j) {
            const double between = sum[j] * sum[j] / n;
            // rounding may leave less than nothing; a NaN stays one
            const double within = squares[j] < between ? 0.0 : squares[j] - between;
            mean[first + j] = static_cast<float>(layer.running_mean[first + j] + sum[j] / n);
            var[first + j] = static_cast<float>(within / (n > 1 ? n - 1 : 1));
        }
    }
}

}  // namespace

void batchnorm_statistics_planes(const void* x, DType dtype, const BatchnormLayer& layer, void* y,
                                 float* mean, float* var, int64_t B, int64_t P, int threads) {
    const auto run = batchnorm_kernels().planes[index_of(dtype)];
    const Scales scales(layer);
    const ChannelAffine affine{layer.running_mean, scales.scale.data(), scales.offset.data()};
    const int64_t C = layer.C, planes = B * C;
    std::vector<float> s1(static_cast<size_t>(planes)), s2(static_cast<size_t>(planes));
    const int64_t per_task = kElementsPerTask / P > 1 ? kElementsPerTask / P : 1;
    const int64_t tasks = (planes + per_task - 1) / per_task;
    const int workers = useful_threads(threads, planes * P);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task * per_task;
        const int64_t count = planes - first < per_task ? planes - first : per_task;
        run(row_at(x, dtype, first, P), row_at(y, dtype, first, P), affine, first % C, count, C, P,
            s1.data() + first, s2.data() + first);
    }
    combine(s1.data(), s2.data(), B, layer, static_cast<double>(B) * static_cast<double>(P), mean, var,
            useful_threads(workers, planes));
}

void batchnorm_statistics_rows(const void* x, DType dtype, const BatchnormLayer& layer, void* y, float* mean,
                               float* var, int64_t R, int threads) {
    const auto run = batchnorm_kernels().rows[index_of(dtype)];
    const Scales scales(layer);
    const ChannelAffine affine{layer.running_mean, scales.scale.data(), scales.offset.data()};
    const int64_t C = layer.C, parts = (R + kRowsPerPart - 1) / kRowsPerPart;
    std::vector<float> s1(static_cast<size_t>(parts * C)), s2(static_cast<size_t>(parts * C));
    const int workers = useful_threads(threads, R * C);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * kRowsPerPart;
        const int64_t count = R - first < kRowsPerPart ? R - first : kRowsPerPart;
        run(row_at(x, dtype, first, C), row_at(y, dtype, first, C), affine, count, C, s1.data() + part * C,
            s2.data() + part * C);
    }
    combine(s1.data(), s2.data(), parts, layer, static_cast<double>(R), mean, var,
            useful_threads(workers, parts * C));
}

}  // namespace mooring
