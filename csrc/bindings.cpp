// mooring_kernels._C: the CPU ops on raw addresses. No torch header is included, so one build serves
// every torch version; the callers in mooring_kernels check dtype, layout and shape before they take an
// address, and what can be checked on numbers alone is checked again here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/capability.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace {

using mooring::DType;
using mooring::Matrix;
using Address = std::uintptr_t;

[[noreturn]] void refuse(const std::string& expected, int64_t got) {
    throw std::invalid_argument(expected + "; got " + std::to_string(got));
}

DType dtype_of(int code) {
    if (code != 0 && code != 1) refuse("dtype code must be 0 (float32) or 1 (bfloat16)", code);
    return static_cast<DType>(code);
}

void require_size(const char* name, int64_t size, int64_t least) {
    if (size < least) refuse(std::string(name) + " must be >= " + std::to_string(least), size);
}

int thread_count(int threads) {
    if (threads < 1) refuse("threads must be >= 1", threads);
    return threads;
}

template <typename T>
T* pointer(const char* name, Address address, int64_t elements) {
    if (address == 0 && elements > 0) {
        throw std::invalid_argument(std::string(name) + " must point to " + std::to_string(elements) +
                                    " elements; got a null address");
    }
    return reinterpret_cast<T*>(address);
}

void row_normalise_forward(Address x, int dtype, float eps, Address unit, Address norm, int64_t N, int64_t D,
                           int threads) {
    require_size("N", N, 0);
    require_size("D", D, 1);
    mooring::row_normalise_forward({pointer<const void>("x", x, N * D), dtype_of(dtype)}, eps,
                                   pointer<void>("unit", unit, N * D), pointer<float>("norm", norm, N), N, D,
                                   thread_count(threads));
}

void row_normalise_backward(Address grad_unit, Address grad_norm, Address unit, Address norm, int dtype,
                            float eps, Address grad_x, int64_t N, int64_t D, int threads) {
    require_size("N", N, 0);
    require_size("D", D, 1);
    mooring::row_normalise_backward(
        pointer<const void>("grad_unit", grad_unit, N * D), pointer<const float>("grad_norm", grad_norm, N),
        pointer<const void>("unit", unit, N * D), pointer<const float>("norm", norm, N), dtype_of(dtype), eps,
        pointer<void>("grad_x", grad_x, N * D), N, D, thread_count(threads));
}

// bank address, bank dtype, rows address, rows dtype, D
using FieldTuple = std::tuple<Address, int, Address, int, int64_t>;

void ring_push(const std::vector<FieldTuple>& fields, Address bank_labels, Address labels, int64_t K,
               int64_t B, int64_t head, bool normalise, int threads) {
    require_size("K", K, 1);
    require_size("B", B, 0);
    if (B > K) refuse("B must be <= K = " + std::to_string(K), B);
    if (head < 0 || head >= K) refuse("head must be in 0.." + std::to_string(K - 1), head);
    std::vector<mooring::RingField> ring;
    for (const auto& [bank, bank_dtype, rows, rows_dtype, D] : fields) {
        require_size("D", D, 1);
        ring.push_back({pointer<void>("bank field", bank, K * D),
                        dtype_of(bank_dtype),
                        {pointer<const void>("field", rows, B * D), dtype_of(rows_dtype)},
                        D});
    }
    mooring::ring_push(ring, pointer<int64_t>("bank_labels", bank_labels, K),
                       pointer<const int64_t>("labels", labels, B), K, B, head, normalise,
                       thread_count(threads));
}

void class_statistics(Address frozen, int frozen_dtype, Address tuned, int tuned_dtype, Address labels,
                      Address head_weight, float cga_scale, Address frozen_mean, Address tuned_mean,
                      Address count, int64_t K, int64_t D, int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    mooring::class_statistics({pointer<const void>("frozen", frozen, K * D), dtype_of(frozen_dtype)},
                              {pointer<const void>("tuned", tuned, K * D), dtype_of(tuned_dtype)},
                              pointer<const int64_t>("labels", labels, K),
                              pointer<const float>("head_weight", head_weight, C * D), cga_scale,
                              pointer<float>("frozen_mean", frozen_mean, C * D),
                              pointer<float>("tuned_mean", tuned_mean, C * D),
                              pointer<float>("count", count, C), K, D, C, thread_count(threads));
}

void calibrate_residual(Address frozen, int dtype, Address labels, Address frozen_mean, Address out,
                        int64_t K, int64_t D, int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    mooring::calibrate_residual({pointer<const void>("frozen", frozen, K * D), dtype_of(dtype)},
                                pointer<const int64_t>("labels", labels, K),
                                pointer<const float>("frozen_mean", frozen_mean, C * D),
                                pointer<float>("out", out, K * D), K, D, C, thread_count(threads));
}

void calibrate_place(Address rows, Address labels, Address tuned_mean, float scale, int64_t K, int64_t D,
                     int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    mooring::calibrate_place(pointer<float>("rows", rows, K * D), pointer<const int64_t>("labels", labels, K),
                             pointer<const float>("tuned_mean", tuned_mean, C * D), scale, K, D, C,
                             thread_count(threads));
}

void calibrate_translate(Address frozen, int dtype, Address labels, Address frozen_mean, Address tuned_mean,
                         float scale, Address out, int64_t K, int64_t D, int64_t C, int threads) {
    require_size("K", K, 0);
    require_size("D", D, 1);
    require_size("C", C, 1);
    mooring::calibrate_translate({pointer<const void>("frozen", frozen, K * D), dtype_of(dtype)},
                                 pointer<const int64_t>("labels", labels, K),
                                 pointer<const float>("frozen_mean", frozen_mean, C * D),
                                 pointer<const float>("tuned_mean", tuned_mean, C * D), scale,
                                 pointer<float>("out", out, K * D), K, D, C, thread_count(threads));
}

void softmax_cross_entropy_forward(Address logits, Address labels, float smoothing, Address loss, Address lse,
                                   int64_t N, int64_t C, int threads) {
    require_size("N", N, 0);
    require_size("C", C, 1);
    mooring::softmax_cross_entropy_forward(
        pointer<const float>("logits", logits, N * C), pointer<const int64_t>("labels", labels, N), smoothing,
        pointer<float>("loss", loss, N), pointer<float>("lse", lse, N), N, C, thread_count(threads));
}

void softmax_cross_entropy_backward(Address logits, Address labels, Address lse, float scale, float smoothing,
                                    Address grad, int64_t N, int64_t C, int threads) {
    require_size("N", N, 0);
    require_size("C", C, 1);
    mooring::softmax_cross_entropy_backward(pointer<const float>("logits", logits, N * C),
                                            pointer<const int64_t>("labels", labels, N),
                                            pointer<const float>("lse", lse, N), scale, smoothing,
                                            pointer<float>("grad", grad, N * C), N, C, thread_count(threads));
}

std::vector<std::string> cpu_capabilities() {
    std::vector<std::string> names;
    for (mooring::Capability capability : mooring::available_capabilities()) {
        names.emplace_back(mooring::name_of(capability));
    }
    return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "CPU kernels of mooring_kernels on raw addresses.";
    m.def("cpu_capability", [] { return std::string(mooring::name_of(mooring::active_capability())); });
    m.def("cpu_capabilities", &cpu_capabilities);
    m.def("set_cpu_capability", &mooring::set_capability, py::arg("name"));
    m.def("row_normalise_forward", &row_normalise_forward, release());
    m.def("row_normalise_backward", &row_normalise_backward, release());
    m.def("ring_push", &ring_push, release());
    m.def("class_statistics", &class_statistics, release());
    m.def("calibrate_residual", &calibrate_residual, release());
    m.def("calibrate_place", &calibrate_place, release());
    m.def("calibrate_translate", &calibrate_translate, release());
    m.def("softmax_cross_entropy_forward", &softmax_cross_entropy_forward, release());
    m.def("softmax_cross_entropy_backward", &softmax_cross_entropy_backward, release());
}
