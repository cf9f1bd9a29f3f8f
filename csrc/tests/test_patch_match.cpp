#include "cpu/patch_match.h"

#include <algorithm>

#include "check.h"
#include "cpu/patch_match_kernels.h"

namespace {

// Keys of one problem by the definition in fp64: logarithmic rounds, columns that sum to 1.
std::vector<double> keys(const std::vector<double>& cosine, int64_t P, double epsilon, int rounds) {
    const auto at = [&](int64_t a, int64_t b) { return cosine[static_cast<size_t>(a * P + b)] / epsilon; };
    std::vector<double> u(static_cast<size_t>(P)), v(static_cast<size_t>(P)), key(static_cast<size_t>(P * P));
    for (int round = 0; round < rounds; ++round) {
        for (int side = 0; side < 2; ++side) {
            for (int64_t i = 0; i < P; ++i) {
                double highest = -INFINITY, sum = 0;
                const auto term = [&](int64_t j) {
                    return side == 0 ? at(i, j) + v[static_cast<size_t>(j)]
                                     : at(j, i) + u[static_cast<size_t>(j)];
                };
                for (int64_t j = 0; j < P; ++j) highest = std::fmax(highest, term(j));
                for (int64_t j = 0; j < P; ++j) sum += std::exp(term(j) - highest);
                (side == 0 ? u : v)[static_cast<size_t>(i)] = -highest - std::log(sum);
            }
        }
    }
    for (int64_t b = 0; b < P; ++b) {
        double others = 0;
        int64_t dominant = -1;
        for (int64_t a = 0; a < P; ++a) {
            const double own = at(a, b) + u[static_cast<size_t>(a)] + v[static_cast<size_t>(b)];
            key[static_cast<size_t>(a * P + b)] = own;
            if (own > std::log(0.6)) {
                dominant = a;
            } else {
                others += std::exp(own);
            }
        }
        if (dominant >= 0) {
            key[static_cast<size_t>(dominant * P + b)] = -std::log(std::fmax(others, 1.17549435e-38));
        }
    }
    return key;
}

// Every code holds its flat index, and its key is that of the definition: at most the grid's neighbour, and
// only where rounding may decide between the two.
bool codes_follow_the_plan(int64_t P, float epsilon, int rounds, float spread, unsigned seed) {
    const mooring::PatchMatchKernels& kernels = mooring::patch_match_kernels();
    const int W = kernels.lanes;
    const std::vector<float> drawn = check::normal(P * P * W, seed, spread);
    std::vector<float> cosines, codes = check::unwritten(P * P * W);
    for (float x : drawn) cosines.push_back(std::tanh(x));
    const bool scaled = kernels.rank(cosines.data(), P, epsilon, rounds, codes.data());
    for (int l = 0; l < W; ++l) {
        std::vector<double> problem;
        for (int64_t i = 0; i < P * P; ++i) problem.push_back(cosines[static_cast<size_t>(i * W + l)]);
        const std::vector<double> exact = keys(problem, P, epsilon, rounds);
        for (int64_t i = 0; i < P * P; ++i) {
            const int64_t code = static_cast<int64_t>(codes[static_cast<size_t>(i * W + l)]);
            const int64_t index = 255 - (code & 255);
            CHECK(index == i);
            const double key = static_cast<double>((code - (255 - i)) / 256) / 32.0;
            // an exponent of size 2 / epsilon is rounded a few times
            const double tolerance = 0.5 / 32 + 16 * check::kUlp * (1 + 2 / static_cast<double>(epsilon));
            CHECK_NEAR(key, std::fmax(exact[static_cast<size_t>(i)], -32767.0 / 32), tolerance);
        }
    }
    return scaled;
}

void the_group_layout_keeps_every_row(int64_t P, int64_t D, int count) {
    const mooring::PatchMatchKernels& kernels = mooring::patch_match_kernels();
    const int W = kernels.lanes;
    const std::vector<float> keys_of_sets = check::normal(count * P * D, 3), query = check::normal(D * P, 4);
    std::vector<const void*> sets;
    for (int l = 0; l < count; ++l) sets.push_back(keys_of_sets.data() + l * P * D);
    std::vector<float> packed = check::unwritten(P * D * W), cosines = check::unwritten(P * P * W);
    kernels.pack[0](sets.data(), count, P, D, packed.data());
    kernels.cosines(query.data(), packed.data(), P, D, cosines.data());
    for (int l = 0; l < W; ++l) {
        for (int64_t a = 0; a < P; ++a) {
            for (int64_t b = 0; b < P; ++b) {
                double exact = 0, size = 0;
                for (int64_t d = 0; d < D && l < count; ++d) {
                    const double term = static_cast<double>(query[static_cast<size_t>(d * P + a)]) *
                                        keys_of_sets[static_cast<size_t>((l * P + b) * D + d)];
                    exact += term;
                    size += std::fabs(term);
                }
                CHECK_NEAR(cosines[static_cast<size_t>((a * P + b) * W + l)], exact, 4 * check::kUlp * size);
            }
        }
    }
}

void the_largest_are_taken() {
    const mooring::PatchMatchKernels& kernels = mooring::patch_match_kernels();
    const int W = kernels.lanes;
    const int64_t P = 4;
    std::vector<float> codes(static_cast<size_t>(P * P * W)), cosines = check::normal(P * P * W, 5);
    std::vector<int32_t> take(static_cast<size_t>(W));
    std::mt19937 generator(6);
    for (int l = 0; l < W; ++l) {
        std::vector<int> order;
        for (int i = 0; i < P * P; ++i) order.push_back(i);
        std::shuffle(order.begin(), order.end(), generator);
        for (int i = 0; i < P * P; ++i)
            codes[static_cast<size_t>(i * W + l)] = static_cast<float>(order[static_cast<size_t>(i)]);
        take[static_cast<size_t>(l)] = l % 3 == 0 ? 0 : l % 3 == 1 ? 5 : -2;
    }
    auto pairs = std::vector<mooring::Pairs>(1);
    CHECK(kernels.select(codes.data(), cosines.data(), P, take.data(), pairs.data()));
    std::vector<int> seen(static_cast<size_t>(W));
    for (int64_t a = 0; a < P; ++a) {
        for (int32_t j = pairs[0].first[a]; j < pairs[0].first[a + 1]; ++j) {
            const int64_t l = pairs[0].row[j] / P, i = a * P + pairs[0].row[j] % P;
            const float code = codes[static_cast<size_t>(i * W + l)];
            CHECK(take[static_cast<size_t>(l)] == 5 ? code >= 11.0f : code == 14.0f);
            CHECK(pairs[0].cosine[j] == cosines[static_cast<size_t>(i * W + l)]);
            ++seen[static_cast<size_t>(l)];
        }
    }
    for (int l = 0; l < W; ++l) CHECK(seen[static_cast<size_t>(l)] == (l % 3 == 0 ? 0 : l % 3 == 1 ? 5 : 1));
    codes[1] = check::nan();  // lane 1 is used
    CHECK(!kernels.select(codes.data(), cosines.data(), P, take.data(), pairs.data()));
}

}  // namespace

int main() {
    check::begin();
    for (int64_t P : {1, 2, 3, 9, 11, 16}) {
        for (int rounds : {1, 2, 30}) {
            CHECK(codes_follow_the_plan(P, 0.05f, rounds, 0.3f, 1));
            codes_follow_the_plan(P, 0.01f, rounds, 0.3f, 2);
        }
    }
    // cost over epsilon far beyond fp32's range: the logarithmic rounds must take over
    CHECK(!codes_follow_the_plan(9, 0.0005f, 30, 1.0f, 3));
    for (int count : {1, 5, mooring::patch_match_kernels().lanes}) {
        the_group_layout_keeps_every_row(9, 37, count);
        the_group_layout_keeps_every_row(4, 3, count);
    }
    the_largest_are_taken();
}
