// Row primitives: all that depends on the instruction set. The ops are plain loops over them.
#pragma once

#include <cstdint>

namespace mooring {

// Storage types of a row; bf16 is the upper half of an fp32 number. Arithmetic is always fp32.
enum class DType : int { f32 = 0, bf16 = 1 };
constexpr int kDTypes = 2;

// Rows of n elements that are brought into the cache while others are worked on, for what comes next.
struct Ahead {
    const void* const* rows;
    int count;
    int element_bytes;
};
constexpr Ahead kNothingAhead = {nullptr, 0, 0};

// One table per instruction set. `n` is the row length; arrays indexed by the DType of `x` (or `out`).
struct RowKernels {
    // sum_i x_i^2
    float (*sum_of_squares[kDTypes])(const void* x, int64_t n);
    // sum_i x_i y_i
    float (*dot[kDTypes])(const void* x, const float* y, int64_t n);
    // acc_i += a x_i
    void (*accumulate[kDTypes])(float* acc, float a, const void* x, int64_t n);
    // out_i = x_i - y_i
    void (*subtract[kDTypes])(float* out, const void* x, const float* y, int64_t n);
    // the same, while `ahead` is fetched
    float (*dot_fetching[kDTypes])(const void* x, const float* y, int64_t n, Ahead ahead);
    // acc_i = decay acc_i + sum_r weight_r rows_r,i over `count` rows, while `ahead` is fetched; with decay 0
    // acc is not read
    void (*accumulate_rows[kDTypes])(float* acc, float decay, const void* const* rows, const float* weight,
                                     int count, int64_t n, Ahead ahead);
    // out_i = x_i s, rounded to nearest even; first index: DType of out, second: DType of x
    void (*scale[kDTypes][kDTypes])(void* out, const void* x, float s, int64_t n);
    // the same, written past the caches: for results that no cache could hold; fence() ends them
    void (*scale_streamed[kDTypes][kDTypes])(void* out, const void* x, float s, int64_t n);
    // out_i = a g_i + b x_i; all three of one DType
    void (*combine[kDTypes])(void* out, float a, const void* g, float b, const void* x, int64_t n);
    void (*combine_streamed[kDTypes])(void* out, float a, const void* g, float b, const void* x, int64_t n);
    // makes this thread's streamed writes visible to the others
    void (*fence)();
    // y_i += x_i, returns sum_i y_i^2
    float (*add_and_sum_squares)(float* y, const float* x, int64_t n);
    // max_i x_i; a NaN may be passed over, sum_exp will find it
    float (*maximum)(const float* x, int64_t n);
    // sum_i x_i
    float (*sum)(const float* x, int64_t n);
    // sum_i exp(x_i - shift)
    float (*sum_exp)(const float* x, float shift, int64_t n);
    // x_i = exp(x_i - shift), returns their sum
    float (*exp_and_sum)(float* x, float shift, int64_t n);
    // x_i = a x_i + b
    void (*affine)(float* x, float a, float b, int64_t n);
    // out_i = s (exp(x_i - lse) - uniform)
    void (*softmax_grad)(float* out, const float* x, float lse, float uniform, float s, int64_t n);
};

namespace scalar {
extern const RowKernels row_kernels;
}
#ifdef MOORING_X86
namespace avx2 {
extern const RowKernels row_kernels;
}
namespace avx512 {
extern const RowKernels row_kernels;
}
#endif

// The table of the active capability.
const RowKernels& row_kernels();

}  // namespace mooring
