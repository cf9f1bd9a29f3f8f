#include "cpu/parameters.h"

#include "check.h"
#include "cpu/parameter_kernels.h"

using mooring::Anchored;
using mooring::DType;

namespace {

// A parameter of one dtype, kept in both forms: bf16 values are exact in `wide`.
struct Values {
    std::vector<float> wide;
    std::vector<uint16_t> half;
    DType dtype;

    Values(int64_t size, unsigned seed, DType kind) : wide(check::normal(size, seed)), dtype(kind) {
        if (dtype == DType::bf16) half = check::to_bf16(wide);
    }
    const void* data() const {
        return dtype == DType::bf16 ? static_cast<const void*>(half.data()) : wide.data();
    }
};

double stored(const std::vector<char>& bytes, DType dtype, int64_t i) {
    if (dtype == DType::f32) {
        float value;
        std::memcpy(&value, bytes.data() + 4 * i, sizeof value);
        return value;
    }
    uint16_t value;
    std::memcpy(&value, bytes.data() + 2 * i, sizeof value);
    return check::from_bf16(value);
}

void penalty(DType dtype, DType anchor_dtype) {
    constexpr float scale = 0.3f;
    std::vector<Values> parameters, anchors;
    // around vector widths, and more than one block of 16384
    const std::vector<int64_t> sizes = {0, 1, 15, 16, 17, 63, 64, 65, 131, 16384, 40001};
    for (unsigned k = 0; k < sizes.size(); ++k) {
        parameters.emplace_back(sizes[k], 2 * k + 1, dtype);
        anchors.emplace_back(sizes[k], 2 * k + 2, anchor_dtype);
    }
    std::vector<Anchored> list;
    std::vector<std::vector<char>> grads;
    std::vector<void*> written;
    double expected = 0;
    for (size_t k = 0; k < sizes.size(); ++k) {
        const bool free = k % 3 == 2;
        list.push_back(
            {parameters[k].data(), dtype, free ? nullptr : anchors[k].data(), anchor_dtype, sizes[k]});
        // one byte more than needed, as a canary
        grads.emplace_back(static_cast<size_t>(sizes[k] * mooring::element_size(dtype) + 1), char{0x55});
        for (size_t i = 0; i < static_cast<size_t>(sizes[k]); ++i) {
            const double drift =
                parameters[k].wide[i] - (free ? 0.0 : static_cast<double>(anchors[k].wide[i]));
            expected += drift * drift;
        }
    }
    for (auto& grad : grads) written.push_back(grad.data());
    const double one = mooring::l2_sp_forward(list, 1), many = mooring::l2_sp_forward(list, check::kThreads);
    CHECK(one == many);
    CHECK_NEAR(one, expected, 100 * check::kUlp * expected);
    mooring::l2_sp_backward(list, written, scale, check::kThreads);
    for (size_t k = 0; k < sizes.size(); ++k) {
        CHECK(grads[k].back() == 0x55);
        for (int64_t i = 0; i < sizes[k]; ++i) {
            const size_t at = static_cast<size_t>(i);
            const double anchor = list[k].anchor ? static_cast<double>(anchors[k].wide[at]) : 0.0;
            const double drift = parameters[k].wide[at] - anchor;
            const double half_ulp = dtype == DType::bf16 ? 1.0 / 256 : 0;
            CHECK_NEAR(stored(grads[k], dtype, i), scale * drift,
                       (half_ulp + 4 * check::kUlp) * (std::fabs(drift) + 1e-6));
        }
    }
}

// Around the cache or not, the numbers are the same; an unaligned start is stored the ordinary way.
void streaming() {
    constexpr int64_t n = 83;
    const std::vector<float> x = check::normal(n, 7), y = check::normal(n, 8);
    const auto difference = mooring::parameter_kernels().scaled_difference[0][0];
    for (int64_t offset : {0, 1, 16}) {
        alignas(64) float plain[128], streamed[128];
        for (int i = 0; i < 128; ++i) plain[i] = streamed[i] = -9.0f;
        difference(plain + offset, x.data(), y.data(), 0.7f, n, false);
        difference(streamed + offset, x.data(), y.data(), 0.7f, n, true);
        CHECK(std::memcmp(plain, streamed, sizeof plain) == 0);
        CHECK(plain[offset + n] == -9.0f && (offset == 0 || plain[offset - 1] == -9.0f));
    }
}

void lerp(float weight) {
    for (int64_t n : {1, 16, 37, 20000}) {
        std::vector<float> average = check::normal(n, 3), source = check::normal(n, 4);
        const std::vector<float> before = average;
        const std::vector<uint16_t> half = check::to_bf16(source);
        mooring::lerp_from_bf16({{average.data(), half.data(), n}}, weight, check::kThreads);
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
            const double from = before[i], to = source[i];
            CHECK_NEAR(average[i], from + weight * (to - from),
                       2 * check::kUlp * (std::fabs(from) + std::fabs(to)));
            if (weight == 0.0f) CHECK(average[i] == before[i]);
            if (weight == 1.0f) CHECK(average[i] == source[i]);
        }
    }
}

}  // namespace

int main() {
    check::begin();
    for (DType dtype : {DType::f32, DType::bf16}) {
        for (DType anchor_dtype : {DType::f32, DType::bf16}) penalty(dtype, anchor_dtype);
    }
    streaming();
    for (float weight : {0.0f, 0.001f, 0.5f, 0.75f, 1.0f}) lerp(weight);
}
