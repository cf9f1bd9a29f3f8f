// Losses over rows of logits.
#include "bindings/arguments.h"
#include "cpu/ops.h"

namespace mooring::bindings {

namespace {

void softmax_cross_entropy_forward_(Address logits, Address labels, float smoothing, Address loss,
                                    Address lse, int64_t N, int64_t C, int threads) {
    require_size("N", N, 0);
    require_size("C", C, 1);
    softmax_cross_entropy_forward(
        pointer<const float>("logits", logits, N * C), pointer<const int64_t>("labels", labels, N), smoothing,
        pointer<float>("loss", loss, N), pointer<float>("lse", lse, N), N, C, thread_count(threads));
}

void softmax_cross_entropy_backward_(Address logits, Address labels, Address lse, float scale,
                                     float smoothing, Address grad, int64_t N, int64_t C, int threads) {
    require_size("N", N, 0);
    require_size("C", C, 1);
    softmax_cross_entropy_backward(pointer<const float>("logits", logits, N * C),
                                   pointer<const int64_t>("labels", labels, N),
                                   pointer<const float>("lse", lse, N), scale, smoothing,
                                   pointer<float>("grad", grad, N * C), N, C, thread_count(threads));
}

void softmax_cross_entropy_in_place_(Address logits, int64_t stride, Address labels, float smoothing,
                                     bool gradient, Address loss, int64_t N, int64_t C, int threads) {
    require_size("N", N, 0);
    require_size("C", C, 1);
    require_size("stride", stride, C);
    softmax_cross_entropy_in_place(pointer<float>("logits", logits, N * C), stride,
                                   pointer<const int64_t>("labels", labels, N), smoothing, gradient,
                                   pointer<float>("loss", loss, N), N, C, thread_count(threads));
}

}  // namespace

void bind_losses(py::module_& m) {
    m.def("softmax_cross_entropy_forward", &softmax_cross_entropy_forward_, release());
    m.def("softmax_cross_entropy_backward", &softmax_cross_entropy_backward_, release());
    m.def("softmax_cross_entropy_in_place", &softmax_cross_entropy_in_place_, release());
}

}  // namespace mooring::bindings
