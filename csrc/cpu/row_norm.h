// The Euclidean norm of a row, safe against overflow and underflow of the squares.
#pragma once

#include <cfloat>
#include <cmath>

#include "cpu/row_kernels.h"
#include "cpu/row_pointer.h"

namespace mooring {

inline float row_norm(const RowKernels& kernels, const void* x, DType dtype, int64_t D) {
    const float squares = kernels.sum_of_squares[index_of(dtype)](x, D);
    if (squares >= FLT_MIN && squares <= FLT_MAX) return std::sqrt(squares);
    // Rare: zero, tiny, huge or NaN entries. A widened copy in small pieces, squared in fp64.
    constexpr int64_t kPiece = 256;
    float piece[kPiece];
    double total = 0;
    for (int64_t begin = 0; begin < D; begin += kPiece) {
        const int64_t n = D - begin < kPiece ? D - begin : kPiece;
        const void* from = static_cast<const char*>(x) + begin * element_size(dtype);
        kernels.scale[index_of(DType::f32)][index_of(dtype)](piece, from, 1.0f, n);
        for (int64_t i = 0; i < n; ++i) total += static_cast<double>(piece[i]) * piece[i];
    }
    // beyond FLT_MAX the norm is infinite; spelled out because the cast alone would be undefined
    const double norm = std::sqrt(total);
    return norm > FLT_MAX ? HUGE_VALF : static_cast<float>(norm);
}

}  // namespace mooring
