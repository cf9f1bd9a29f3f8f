// Rows, ring and calibration: what DR-Tune does with its bank.
#include "bindings/arguments.h"
#include "cpu/ops.h"

namespace mooring::bindings {

namespace {

void row_normalise_forward_(Address x, int dtype, float eps, Address unit, Address norm, int64_t N, int64_t D,
                            int threads) {
    require_size("N", N, 0);
    require_size("D", D, 1);
    row_normalise_forward({pointer<const void>("x", x, product_of(N, D)), dtype_of(dtype)}, eps,
                          pointer<void>("unit", unit, product_of(N, D)), pointer<float>("norm", norm, N), N,
                          D, thread_count(threads));
}

void row_normalise_backward_(Address grad_unit, Address grad_norm, Address unit, Address norm, int dtype,
                             float eps, Address grad_x, int64_t N, int64_t D, int threads) {
    require_size("N", N, 0);
    require_size("D", D, 1);
    row_normalise_backward(pointer<const void>("grad_unit", grad_unit, product_of(N, D)),
                           pointer<const float>("grad_norm", grad_norm, N),
                           pointer<const void>("unit", unit, product_of(N, D)),
                           pointer<const float>("norm", norm, N), dtype_of(dtype), eps,
                           pointer<void>("grad_x", grad_x, product_of(N, D)), N, D, thread_count(threads));
}

// bank address, bank dtype, rows address, rows dtype, D
using FieldTuple = std::tuple<Address, int, Address, int, int64_t>;

void ring_push_(const std::vector<FieldTuple>& fields, Address bank_labels, Address labels, int64_t K,
                int64_t B, int64_t head, bool normalise, int threads) {
    require_size("K", K, 1);
    require_size("B", B, 0);
    if (B > K) refuse("B must be <= K = " + std::to_string(K), B);
    if (head < 0 || head >= K) refuse("head must be in 0.." + std::to_string(K - 1), head);
    std::vector<RingField> ring;
    for (const auto& [bank, bank_dtype, rows, rows_dtype, D] : fields) {
        require_size("D", D, 1);
        ring.push_back({pointer<void>("bank field", bank, product_of(K, D)),
                        dtype_of(bank_dtype),
                        {pointer<const void>("field", rows, product_of(B, D)), dtype_of(rows_dtype)},
                        D});
    }
    ring_push(ring, pointer<int64_t>("bank_labels", bank_labels, K),
              pointer<const int64_t>("labels", labels, B), K, B, head, normalise, thread_count(threads));
}

void class_statistics_(Address frozen, int frozen_dtype, Address tuned, int tuned_dtype, Address labels,
                       Address head_weight, float cga_scale, Address frozen_mean, Address tuned_mean,
                       Address count, int64_t K, int64_t D, int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    class_statistics({pointer<const void>("frozen", frozen, product_of(K, D)), dtype_of(frozen_dtype)},
                     {pointer<const void>("tuned", tuned, product_of(K, D)), dtype_of(tuned_dtype)},
                     pointer<const int64_t>("labels", labels, K),
                     pointer<const float>("head_weight", head_weight, product_of(C, D)), cga_scale,
                     pointer<float>("frozen_mean", frozen_mean, product_of(C, D)),
                     pointer<float>("tuned_mean", tuned_mean, product_of(C, D)),
                     pointer<float>("count", count, C), K, D, C, thread_count(threads));
}

void calibrate_residual_(Address frozen, int dtype, Address labels, Address frozen_mean, Address out,
                         int64_t K, int64_t D, int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    calibrate_residual({pointer<const void>("frozen", frozen, product_of(K, D)), dtype_of(dtype)},
                       pointer<const int64_t>("labels", labels, K),
                       pointer<const float>("frozen_mean", frozen_mean, product_of(C, D)),
                       pointer<float>("out", out, product_of(K, D)), K, D, C, thread_count(threads));
}

void calibrate_place_(Address rows, Address labels, Address tuned_mean, float scale, int64_t K, int64_t D,
                      int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    calibrate_place(pointer<float>("rows", rows, product_of(K, D)),
                    pointer<const int64_t>("labels", labels, K),
                    pointer<const float>("tuned_mean", tuned_mean, product_of(C, D)), scale, K, D, C,
                    thread_count(threads));
}

void calibrate_translate_(Address frozen, int dtype, Address labels, Address frozen_mean, Address tuned_mean,
                          float scale, Address out, int64_t K, int64_t D, int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    calibrate_translate({pointer<const void>("frozen", frozen, product_of(K, D)), dtype_of(dtype)},
                        pointer<const int64_t>("labels", labels, K),
                        pointer<const float>("frozen_mean", frozen_mean, product_of(C, D)),
                        pointer<const float>("tuned_mean", tuned_mean, product_of(C, D)), scale,
                        pointer<float>("out", out, product_of(K, D)), K, D, C, thread_count(threads));
}

}  // namespace

void bind_bank(py::module_& m) {
    m.def("row_normalise_forward", &row_normalise_forward_, release());
    m.def("row_normalise_backward", &row_normalise_backward_, release());
    m.def("ring_push", &ring_push_, release());
    m.def("class_statistics", &class_statistics_, release());
    m.def("calibrate_residual", &calibrate_residual_, release());
    m.def("calibrate_place", &calibrate_place_, release());
    m.def("calibrate_translate", &calibrate_translate_, release());
}

}  // namespace mooring::bindings
