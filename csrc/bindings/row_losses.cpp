// Losses that read each row of logits once: means over the valid rows and what their backward needs.
#include <tuple>

#include "bindings/arguments.h"
#include "cpu/text_supervised_loss.h"
#include "cpu/two_head_cross_entropy.h"

namespace mooring::bindings {

namespace {

using Supervision = std::tuple<float, float, float>;               // 1 / tau, lambda_v, lambda_t
using Head = std::tuple<Address, int, Address, int64_t, int64_t>;  // logits, their dtype, labels, rows, C

TextSupervision supervision_of(const Supervision& by) {
    return {std::get<0>(by), std::get<1>(by), std::get<2>(by)};
}

HeadRows head_of(const char* name, const Head& head) {
    const auto [logits, dtype, labels, rows, C] = head;
    require_size("rows", rows, 0);
    require_size("C", C, 1);
    return {{pointer<const void>(name, logits, product_of(rows, C)), dtype_of(dtype)},
            pointer<const int64_t>("labels", labels, rows),
            rows,
            C};
}

void text_supervised_loss_forward_(Address logits, int logits_dtype, Address cosines, int cosines_dtype,
                                   Address labels, const Supervision& by, Address loss, Address inverse_count,
                                   Address lse_logits, Address lse_texts, int64_t B, int64_t C, int threads) {
    require_size("B", B, 0);
    require_size("C", C, 1);
    text_supervised_loss_forward(
        {pointer<const void>("logits", logits, product_of(B, C)), dtype_of(logits_dtype)},
        {pointer<const void>("cosines", cosines, product_of(B, C)), dtype_of(cosines_dtype)},
        pointer<const int64_t>("labels", labels, B), supervision_of(by), pointer<float>("loss", loss, 1),
        pointer<float>("inverse_count", inverse_count, 1), pointer<float>("lse_logits", lse_logits, B),
        pointer<float>("lse_texts", lse_texts, B), B, C, thread_count(threads));
}

// an address of 0 among the last two asks for no such gradient
void text_supervised_loss_backward_(Address logits, int logits_dtype, Address cosines, int cosines_dtype,
                                    Address labels, Address lse_logits, Address lse_texts,
                                    const Supervision& by, float scale, Address grad_logits,
                                    Address grad_cosines, int64_t B, int64_t C, int threads) {
    require_size("B", B, 0);
    require_size("C", C, 1);
    text_supervised_loss_backward(
        {pointer<const void>("logits", logits, product_of(B, C)), dtype_of(logits_dtype)},
        {pointer<const void>("cosines", cosines, product_of(B, C)), dtype_of(cosines_dtype)},
        pointer<const int64_t>("labels", labels, B), pointer<const float>("lse_logits", lse_logits, B),
        pointer<const float>("lse_texts", lse_texts, B), supervision_of(by), scale,
        reinterpret_cast<void*>(grad_logits), reinterpret_cast<void*>(grad_cosines), B, C,
        thread_count(threads));
}

void two_head_cross_entropy_forward_(const Head& target, const Head& source, float weight, float smoothing,
                                     const std::tuple<Address, Address, Address>& losses,
                                     Address inverse_counts, Address lse, int threads) {
    const HeadRows first = head_of("target_logits", target), second = head_of("source_logits", source);
    const TwoHeadLosses out = {pointer<float>("loss", std::get<0>(losses), 1),
                               pointer<float>("target_loss", std::get<1>(losses), 1),
                               pointer<float>("source_loss", std::get<2>(losses), 1)};
    two_head_cross_entropy_forward(
        first, second, weight, smoothing, out, pointer<float>("inverse_counts", inverse_counts, 2),
        pointer<float>("lse", lse, first.rows + second.rows), thread_count(threads));
}

void two_head_cross_entropy_backward_(const Head& target, const Head& source, Address lse, float target_scale,
                                      float source_scale, float smoothing, Address grad_target,
                                      Address grad_source, int threads) {
    const HeadRows first = head_of("target_logits", target), second = head_of("source_logits", source);
    two_head_cross_entropy_backward(first, second, pointer<const float>("lse", lse, first.rows + second.rows),
                                    target_scale, source_scale, smoothing,
                                    reinterpret_cast<void*>(grad_target),
                                    reinterpret_cast<void*>(grad_source), thread_count(threads));
}

}  // namespace

void bind_row_losses(py::module_& m) {
    m.def("text_supervised_loss_forward", &text_supervised_loss_forward_, release());
    m.def("text_supervised_loss_backward", &text_supervised_loss_backward_, release());
    m.def("two_head_cross_entropy_forward", &two_head_cross_entropy_forward_, release());
    m.def("two_head_cross_entropy_backward", &two_head_cross_entropy_backward_, release());
}

}  // namespace mooring::bindings
