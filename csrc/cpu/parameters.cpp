#include "cpu/parameters.h"

#include <stddef.h>

#include "cpu/parallel.h"
#include "cpu/parameter_kernels.h"
#include "cpu/row_pointer.h"

namespace mooring {
namespace {

// Values that one fp32 partial sum covers: short enough to keep its rounding near 1e-7, long enough to
// hide the call. Blocks are fixed by the list alone, so no result depends on the number of threads.
constexpr int64_t kBlock = 16 * 1024;

// Gradients of more values than this do not fit a last-level cache: 32 MiB.
constexpr int64_t kCached = 8 * 1024 * 1024;

struct Block {
    size_t item;
    int64_t first, count;
};

template <typename Item>
std::vector<Block> blocks_of(const std::vector<Item>& list, int64_t& total) {
    std::vector<Block> blocks;
    total = 0;
    for (size_t item = 0; item < list.size(); ++item) {
        const int64_t size = list[item].size;
        total += size;
        for (int64_t first = 0; first < size; first += kBlock) {
            blocks.push_back({item, first, size - first < kBlock ? size - first : kBlock});
        }
    }
    return blocks;
}

}  // namespace

double l2_sp_forward(const std::vector<Anchored>& list, int threads) {
    const ParameterKernels& kernels = parameter_kernels();
    const RowKernels& rows = row_kernels();
    int64_t total;
    const std::vector<Block> blocks = blocks_of(list, total);
    std::vector<float> partial(blocks.size());
    const int workers = useful_threads(threads, total);
    const int64_t count = static_cast<int64_t>(blocks.size());
#pragma omp parallel for num_threads(workers) schedule(static)
    for (int64_t b = 0; b < count; ++b) {
        const Block& block = blocks[static_cast<size_t>(b)];
        const Anchored& item = list[block.item];
        const void* x = row_at(item.parameter, item.dtype, block.first, 1);
        float& sum = partial[static_cast<size_t>(b)];
        if (item.anchor) {
            const void* y = row_at(item.anchor, item.anchor_dtype, block.first, 1);
            sum = kernels.squared_distance[index_of(item.dtype)][index_of(item.anchor_dtype)](x, y,
                                                                                              block.count);
        } else {
            sum = rows.sum_of_squares[index_of(item.dtype)](x, block.count);
        }
    }
    double sum = 0;
    for (float value : partial) sum += value;
    return sum;
}

void l2_sp_backward(const std::vector<Anchored>& list, const std::vector<void*>& grads, float scale,
                    int threads) {
    const ParameterKernels& kernels = parameter_kernels();
    const RowKernels& rows = row_kernels();
    int64_t total;
    const std::vector<Block> blocks = blocks_of(list, total);
    const int workers = useful_threads(threads, total);
    const int64_t count = static_cast<int64_t>(blocks.size());
#pragma omp parallel for num_threads(workers) schedule(static)
    for (int64_t b = 0; b < count; ++b) {
        const Block& block = blocks[static_cast<size_t>(b)];
        const Anchored& item = list[block.item];
        const int own = index_of(item.dtype);
        const void* x = row_at(item.parameter, item.dtype, block.first, 1);
        void* out = row_at(grads[block.item], item.dtype, block.first, 1);
        if (item.anchor) {
            const void* y = row_at(item.anchor, item.anchor_dtype, block.first, 1);
            kernels.scaled_difference[own][index_of(item.anchor_dtype)](out, x, y, scale, block.count,
                                                                        total > kCached);
        } else {
            rows.scale[own][own](out, x, scale, block.count);
        }
    }
}

void lerp_from_bf16(const std::vector<Followed>& list, float weight, int threads) {
    const ParameterKernels& kernels = parameter_kernels();
    int64_t total;
    const std::vector<Block> blocks = blocks_of(list, total);
    const int workers = useful_threads(threads, total);
    const int64_t count = static_cast<int64_t>(blocks.size());
#pragma omp parallel for num_threads(workers) schedule(static)
    for (int64_t b = 0; b < count; ++b) {
        const Block& block = blocks[static_cast<size_t>(b)];
        const Followed& item = list[block.item];
        kernels.lerp_from_bf16(item.average + block.first, row_at(item.source, DType::bf16, block.first, 1),
                               weight, block.count);
    }
}

}  // namespace mooring
