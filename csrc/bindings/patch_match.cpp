// Concept-level contrast.
#include <cmath>

#include "bindings/arguments.h"
#include "cpu/patch_match.h"
#include "cpu/patch_match_kernels.h"

namespace mooring::bindings {

namespace {

void patch_match_info_nce_(Address query, Address own_key, Address labels, Address queue, int queue_dtype,
                           Address queue_valid, Address negative_classes, Address positive_pick,
                           float temperature, int64_t negatives_per_set, float epsilon, int rounds,
                           Address loss, Address grad, int64_t B, int64_t C, int64_t K, int64_t P, int64_t D,
                           int64_t M, int threads) {
    require_size("B", B, 0);
    require_size("C", C, 1);
    require_size("K", K, 0);
    require_size("P", P, 1);
    if (P > kMostPatches) refuse("P must be <= " + std::to_string(kMostPatches), P);
    require_size("D", D, 1);
    require_size("M", M, 0);
    require_size("negatives_per_set", negatives_per_set, 1);
    if (negatives_per_set > P * P) refuse("negatives_per_set must be <= P * P", negatives_per_set);
    require_size("rounds", rounds, 1);
    if (!(temperature > 0 && epsilon > 0)) {
        throw std::invalid_argument("temperature and epsilon must be > 0");
    }
    const PatchMatch given = {
        pointer<const float>("query", query, product_of(B, P, D)),
        pointer<const float>("own_key", own_key, product_of(B, P, D)),
        pointer<const int64_t>("labels", labels, B),
        {pointer<const void>("queue", queue, product_of(C, K, P, D)), dtype_of(queue_dtype)},
        pointer<const uint8_t>("queue_valid", queue_valid, product_of(C, K)),
        pointer<const int64_t>("negative_classes", negative_classes, product_of(B, M)),
        pointer<const int64_t>("positive_pick", positive_pick, product_of(B, (1 + K))),
        B,
        C,
        K,
        P,
        D,
        M,
        negatives_per_set,
        temperature,
        epsilon,
        rounds};
    // a null gradient asks for the loss alone
    patch_match_info_nce(given, pointer<float>("loss", loss, B), pointer<float>("grad", grad, 0),
                         thread_count(threads));
}

}  // namespace

void bind_patch_match(py::module_& m) {
    m.def("patch_match_info_nce", &patch_match_info_nce_, release());
}

}  // namespace mooring::bindings
