// Compiled once per instruction set; see row_kernels.cpp for what may not be used here.
#include "cpu/batchnorm_rows.h"

#include "cpu/vec.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

constexpr int64_t W = Vec::width;
// Elements of a plane that one set of lanes sums in fp32 before the sums go into a double.
constexpr int64_t kBlock = 4096;

// The constants and the two sums of one vector of elements.
struct Channel {
    Vec shift, scale, offset;

    // y, and d = x - shift into the sums
    Vec apply(Vec x, Vec& s1, Vec& s2) const {
        const Vec d = x - shift;
        s1 = s1 + d;
        s2 = fma(d, d, s2);
        return fma(d, scale, offset);
    }
};

template <typename T>
void planes(const void* x_void, void* y_void, const ChannelAffine& affine, int64_t channel, int64_t count,
            int64_t C, int64_t P, float* s1, float* s2) {
    const Vec zero = Vec::broadcast(0.0f);
    for (int64_t plane = 0; plane < count; ++plane) {
        const T* x = static_cast<const T*>(x_void) + plane * P;
        T* y = static_cast<T*>(y_void) + plane * P;
        const Channel constants{Vec::broadcast(affine.shift[channel]), Vec::broadcast(affine.scale[channel]),
                                Vec::broadcast(affine.offset[channel])};
        double sum = 0, squares = 0;
        for (int64_t begin = 0; begin < P; begin += kBlock) {
            const int64_t end = begin + kBlock < P ? begin + kBlock : P;
            // two of each hide the latency of the addition
            Vec even1 = zero, even2 = zero, odd1 = zero, odd2 = zero;
            int64_t i = begin;
            for (; i + 2 * W <= end; i += 2 * W) {
                constants.apply(Vec::load(x + i), even1, even2).store(y + i);
                constants.apply(Vec::load(x + i + W), odd1, odd2).store(y + i + W);
            }
            if (i + W <= end) {
                constants.apply(Vec::load(x + i), even1, even2).store(y + i);
                i += W;
            }
            if (i < end) {
                // lanes that hold the shift add nothing
                const int left = static_cast<int>(end - i);
                constants.apply(Vec::load(x + i, left, affine.shift[channel]), odd1, odd2).store(y + i, left);
            }
            sum += (even1 + odd1).sum();
            squares += (even2 + odd2).sum();
        }
        s1[plane] = static_cast<float>(sum);
        s2[plane] = static_cast<float>(squares);
        channel = channel + 1 == C ? 0 : channel + 1;
    }
}

// R rows from `x` on, all columns: each column's constants and sums are loaded once for the R rows.
template <int R, typename T>
inline void some_rows(const T* x, T* y, const ChannelAffine& affine, int64_t C, float* s1, float* s2) {
    int64_t j = 0;
    for (; j + W <= C; j += W) {
        const Channel constants{Vec::load(affine.shift + j), Vec::load(affine.scale + j),
                                Vec::load(affine.offset + j)};
        Vec sum = Vec::load(s1 + j), squares = Vec::load(s2 + j);
        for (int r = 0; r < R; ++r) {
            constants.apply(Vec::load(x + r * C + j), sum, squares).store(y + r * C + j);
        }
        sum.store(s1 + j);
        squares.store(s2 + j);
    }
    if (j < C) {
        // the missing lanes hold 0 - 0: they add nothing, and none of them is stored
        const int left = static_cast<int>(C - j);
        const Channel constants{Vec::load(affine.shift + j, left, 0.0f),
                                Vec::load(affine.scale + j, left, 0.0f),
                                Vec::load(affine.offset + j, left, 0.0f)};
        Vec sum = Vec::load(s1 + j, left, 0.0f), squares = Vec::load(s2 + j, left, 0.0f);
        for (int r = 0; r < R; ++r) {
            constants.apply(Vec::load(x + r * C + j, left, 0.0f), sum, squares).store(y + r * C + j, left);
        }
        sum.store(s1 + j, left);
        squares.store(s2 + j, left);
    }
}

template <typename T>
void rows(const void* x_void, void* y_void, const ChannelAffine& affine, int64_t count, int64_t C, float* s1,
          float* s2) {
    const T* x = static_cast<const T*>(x_void);
    T* y = static_cast<T*>(y_void);
    for (int64_t c = 0; c < C; ++c) s1[c] = s2[c] = 0.0f;
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) some_rows<4>(x + row * C, y + row * C, affine, C, s1, s2);
    for (; row < count; ++row) some_rows<1>(x + row * C, y + row * C, affine, C, s1, s2);
}

}  // namespace

const BatchnormKernels batchnorm_kernels = {{planes<float>, planes<Bf16>}, {rows<float>, rows<Bf16>}};

}  // namespace MOORING_ISA
}  // namespace mooring
