// Compiled once per instruction set, like row_kernels.cpp and under its rules: everything lies in the
// namespace MOORING_ISA and nothing from the standard library's templates is used.
#include "cpu/softmax_pair_kernels.h"

#include "cpu/vec.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

constexpr int64_t W = Vec::width;
constexpr float kLowest = -__builtin_inff();

SoftmaxPair sums(const float* z, const float* v, float k, int64_t n) {
    const int64_t whole = n - n % W;
    const int rest = static_cast<int>(n - whole);
    Vec highest_z = Vec::broadcast(kLowest), highest_v = highest_z;
    for (int64_t i = 0; i < whole; i += W) {
        highest_z = max(highest_z, Vec::load(z + i));
        highest_v = max(highest_v, Vec::load(v + i));
    }
    if (rest != 0) {
        highest_z = max(highest_z, Vec::load(z + whole, rest, kLowest));
        highest_v = max(highest_v, Vec::load(v + whole, rest, kLowest));
    }
    const float peak_z = highest_z.maximum(), peak_v = highest_v.maximum();

    const Vec origin_z = Vec::broadcast(peak_z), origin_v = Vec::broadcast(peak_v),
              factor = Vec::broadcast(k);
    Vec total_z = Vec::broadcast(0.0f), total_v = total_z, mixed = total_z;
    for (int64_t i = 0; i < whole; i += W) {
        const Vec below = Vec::load(z + i) - origin_z;
        const Vec weight = exp(factor * (Vec::load(v + i) - origin_v));
        total_z = total_z + exp(below);
        total_v = total_v + weight;
        mixed = fma(weight, below, mixed);
    }
    if (rest != 0) {
        // missing lanes: exp(-inf) adds nothing, and the weight 0 meets the difference 0, not -inf
        const Vec weight = exp(factor * (Vec::load(v + whole, rest, kLowest) - origin_v));
        total_z = total_z + exp(Vec::load(z + whole, rest, kLowest) - origin_z);
        total_v = total_v + weight;
        mixed = fma(weight, Vec::load(z + whole, rest, peak_z) - origin_z, mixed);
    }
    return {peak_z, total_z.sum(), peak_v, total_v.sum(), mixed.sum()};
}

void grads(float* grad_z, float* grad_v, const float* z, const float* v, float k, float lse_z, float lse_v,
           float s_z, float mix, float s_v, int64_t n) {
    const Vec factor = Vec::broadcast(k), minus_lse_v = Vec::broadcast(-lse_v),
              offset_z = Vec::broadcast(lse_z);
    const Vec scale_z = Vec::broadcast(s_z), minus_mix = Vec::broadcast(-mix), scale_v = Vec::broadcast(s_v);
    const int64_t whole = n - n % W;
    const int rest = static_cast<int>(n - whole);
    for (int64_t i = 0; i < whole; i += W) {
        const Vec weight = exp(fma(factor, Vec::load(v + i), minus_lse_v));
        if (grad_z) (scale_z * fma(minus_mix, weight, exp(Vec::load(z + i) - offset_z))).store(grad_z + i);
        if (grad_v) (scale_v * weight).store(grad_v + i);
    }
    if (rest != 0) {
        const Vec weight = exp(fma(factor, Vec::load(v + whole, rest, 0.0f), minus_lse_v));
        if (grad_z) {
            const Vec softmax = exp(Vec::load(z + whole, rest, 0.0f) - offset_z);
            (scale_z * fma(minus_mix, weight, softmax)).store(grad_z + whole, rest);
        }
        if (grad_v) (scale_v * weight).store(grad_v + whole, rest);
    }
}

}  // namespace

extern const SoftmaxPairKernels softmax_pair_kernels;
const SoftmaxPairKernels softmax_pair_kernels = {sums, grads};

}  // namespace MOORING_ISA
}  // namespace mooring
