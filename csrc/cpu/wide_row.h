// A row in fp32: in place where it is stored so, else widened into a buffer that stays in cache.
#pragma once

#include <vector>

#include "cpu/ops.h"
#include "cpu/row_pointer.h"

namespace mooring {

inline std::vector<float> wide_buffer(DType dtype, int64_t width) {
    return std::vector<float>(dtype == DType::f32 ? 0 : static_cast<size_t>(width));
}

inline const float* wide_row(const RowKernels& kernels, Matrix x, int64_t row, int64_t width, float* buffer) {
    const void* stored = row_at(x.data, x.dtype, row, width);
    if (x.dtype == DType::f32) return static_cast<const float*>(stored);
    kernels.scale[index_of(DType::f32)][index_of(x.dtype)](buffer, stored, 1.0f, width);
    return buffer;
}

// Where the fp32 result of a row is formed; round_row() brings it to its place.
inline float* result_row(void* out, DType dtype, int64_t row, int64_t width, float* buffer) {
    return dtype == DType::f32 ? static_cast<float*>(row_at(out, dtype, row, width)) : buffer;
}

inline void round_row(const RowKernels& kernels, void* out, DType dtype, int64_t row, int64_t width,
                      const float* buffer) {
    if (dtype == DType::f32) return;
    kernels.scale[index_of(dtype)][index_of(DType::f32)](row_at(out, dtype, row, width), buffer, 1.0f, width);
}

}  // namespace mooring
