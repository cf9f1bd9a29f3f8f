#pragma once

#include "cpu/row_kernels.h"

namespace mooring {

inline int64_t element_size(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
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
