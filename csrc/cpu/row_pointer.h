#pragma once

#include "cpu/row_kernels.h"

namespace mooring {

inline int64_t element_size(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

// Whether a result is written past the caches. One that they may hold is not: its reader comes next.
inline bool exceeds_caches(int64_t elements, DType dtype) {
    constexpr int64_t kBytes = 64 * 1024 * 1024;
    return elements * element_size(dtype) > kBytes;
}

inline int index_of(DType dtype) {
    return static_cast<int>(dtype);
}

inline const void* row_at(const void* data, DType dtype, int64_t row, int64_t width) {
    return static_cast<const char*>(data) + row * width * element_size(dtype);
}

inline void* row_at(void* data, DType dtype, int64_t row, int64_t width) {
    return static_cast<char*>(data) + row * width * element_size(dtype);
}

inline bool is_class(int64_t label, int64_t classes) {
    return label >= 0 && label < classes;
}

}  // namespace mooring
