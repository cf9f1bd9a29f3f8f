#include "check.h"

using mooring::DType;

namespace {

// Against rings that are written row after row.
void push_by_class(int64_t C, int64_t K, int64_t B, unsigned seed) {
    constexpr int64_t P = 3, D = 19;
    const std::vector<float> rows = check::normal(B * P * D, seed);
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int64_t> draw(-1, C);
    std::vector<int64_t> labels, heads, owner(static_cast<size_t>(C * K), -1);
    for (int64_t i = 0; i < B; ++i) labels.push_back(draw(generator));
    for (int64_t c = 0; c < C; ++c) heads.push_back(c % K);
    std::vector<int64_t> expected_heads = heads, slots(static_cast<size_t>(B), -9);
    for (int64_t i = 0; i < B; ++i) {
        const int64_t label = labels[static_cast<size_t>(i)];
        if (label < 0 || label >= C) continue;
        int64_t& head = expected_heads[static_cast<size_t>(label)];
        owner[static_cast<size_t>(label * K + head)] = i;
        head = (head + 1) % K;
    }
    std::vector<float> bank(static_cast<size_t>(C * K * P * D), -7.0f);
    std::vector<int64_t> bank_labels(static_cast<size_t>(C * K), -1);
    mooring::class_ring_push({{bank.data(), DType::f32, {rows.data(), DType::f32}, P, D}}, bank_labels.data(),
                             heads.data(), labels.data(), slots.data(), C, K, B, true, check::kThreads);
    CHECK(heads == expected_heads);
    std::vector<int64_t> expected_slots(static_cast<size_t>(B), -1);
    for (int64_t slot = 0; slot < C * K; ++slot) {
        const int64_t i = owner[static_cast<size_t>(slot)];
        CHECK(bank_labels[static_cast<size_t>(slot)] == (i < 0 ? -1 : slot / K));
        if (i >= 0) expected_slots[static_cast<size_t>(i)] = slot;
        for (int64_t p = 0; p < P; ++p) {
            const double norm = i < 0 ? 1 : check::norm(rows.data() + (i * P + p) * D, D);
            for (int64_t d = 0; d < D; ++d) {
                const double expected = i < 0 ? -7.0 : rows[static_cast<size_t>((i * P + p) * D + d)] / norm;
                CHECK_NEAR(bank[static_cast<size_t>((slot * P + p) * D + d)], expected,
                           30 * check::kUlp * std::fabs(expected));
            }
        }
    }
    CHECK(slots == expected_slots);
}

}  // namespace

int main() {
    check::begin();
    push_by_class(1, 1, 3, 1);
    push_by_class(3, 2, 11, 2);
    push_by_class(5, 7, 20, 3);
    push_by_class(5, 7, 0, 4);
}
