// Losses over rows of logits.
#include "bindings/arguments.h"
#include "cpu/ops.h"

namespace mooring::bindings {

namespace {

void softmax_cross_entropy_in_place_(Address logits, int64_t stride, Address labels, float smoothing,
                                     bool gradient, Address loss, int64_t N, int64_t C, int threads) {
    require_size("N", N, 0);
    require_size("C", C, 1);
    require_size("stride", stride, C);
    product_of(N, stride);
    softmax_cross_entropy_in_place(pointer<float>("logits", logits, product_of(N, C)), stride,
                                   pointer<const int64_t>("labels", labels, N), smoothing, gradient,
                                   pointer<float>("loss", loss, N), N, C, thread_count(threads));
}

}  // namespace

void bind_losses(py::module_& m) {
    m.def("softmax_cross_entropy_in_place", &softmax_cross_entropy_in_place_, release());
}

}  // namespace mooring::bindings
