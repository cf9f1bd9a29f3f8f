#include <array>

#include "check.h"

using mooring::DType;

namespace {

void push(int64_t K, int64_t B, int64_t head, bool normalise) {
    constexpr int64_t wide = 19, narrow = 3;
    const std::vector<float> frozen = check::normal(B * wide, 1), tuned = check::normal(B * narrow, 2);
    std::vector<int64_t> labels(static_cast<size_t>(B)), bank_labels(static_cast<size_t>(K), -9);
    for (int64_t i = 0; i < B; ++i) labels[static_cast<size_t>(i)] = i % 4 == 3 ? -1 : 100 + i;
    std::vector<float> frozen_bank(static_cast<size_t>(K * wide), -7.0f);
    std::vector<uint16_t> tuned_bank(static_cast<size_t>(K * narrow), 0x1234);
    mooring::ring_push({{frozen_bank.data(), DType::f32, {frozen.data(), DType::f32}, wide},
                        {tuned_bank.data(), DType::bf16, {tuned.data(), DType::f32}, narrow}},
                       bank_labels.data(), labels.data(), K, B, head, normalise, check::kThreads);
    for (int64_t slot = 0; slot < K; ++slot) {
        const int64_t i = (slot - head + K) % K;  // the row that belongs here
        const size_t s = static_cast<size_t>(slot);
        if (i >= B) {  // untouched
            CHECK(bank_labels[s] == -9);
            for (int64_t j = 0; j < wide; ++j) CHECK(frozen_bank[s * wide + static_cast<size_t>(j)] == -7.0f);
            for (int64_t j = 0; j < narrow; ++j)
                CHECK(tuned_bank[s * narrow + static_cast<size_t>(j)] == 0x1234);
            continue;
        }
        CHECK(bank_labels[s] == labels[static_cast<size_t>(i)]);
        const double wide_norm = normalise ? check::norm(frozen.data() + i * wide, wide) : 1.0;
        const double narrow_norm = normalise ? check::norm(tuned.data() + i * narrow, narrow) : 1.0;
        for (int64_t j = 0; j < wide; ++j) {
            const double expected = frozen[static_cast<size_t>(i * wide + j)] / wide_norm;
            CHECK_NEAR(frozen_bank[s * wide + static_cast<size_t>(j)], expected,
                       30 * check::kUlp * std::fabs(expected));
        }
        for (int64_t j = 0; j < narrow; ++j) {
            const double expected = tuned[static_cast<size_t>(i * narrow + j)] / narrow_norm;
            const double stored = check::from_bf16(tuned_bank[s * narrow + static_cast<size_t>(j)]);
            CHECK_NEAR(stored, expected, std::fabs(expected) * (1.0 / 256 + 1e-6));
        }
    }
}

}  // namespace

int main() {
    check::begin();
    for (bool normalise : {false, true}) {
        for (int64_t head : {0, 1, 6}) {
            for (int64_t B : {0, 1, 4, 6, 7}) push(7, B, head, normalise);
        }
        push(1, 1, 0, normalise);
    }
}
