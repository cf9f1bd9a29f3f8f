// Ops over lists of parameters.
#include <tuple>

#include "bindings/arguments.h"
#include "cpu/parameters.h"

namespace mooring::bindings {

namespace {

// parameter address, its dtype, anchor address (0: zeros), its dtype, size
using AnchoredTuple = std::tuple<Address, int, Address, int, int64_t>;

std::vector<Anchored> anchored(const std::vector<AnchoredTuple>& tuples) {
    std::vector<Anchored> list;
    for (const auto& [parameter, dtype, anchor, anchor_dtype, size] : tuples) {
        require_size("size", size, 0);
        list.push_back({pointer<const void>("parameter", parameter, size), dtype_of(dtype),
                        reinterpret_cast<const void*>(anchor), dtype_of(anchor_dtype), size});
    }
    return list;
}

double l2_sp_forward_(const std::vector<AnchoredTuple>& list, int threads) {
    return l2_sp_forward(anchored(list), thread_count(threads));
}

void l2_sp_backward_(const std::vector<AnchoredTuple>& list, const std::vector<Address>& grads, float scale,
                     int threads) {
    const std::vector<Anchored> items = anchored(list);
    if (grads.size() != items.size()) {
        refuse("grads must be as many as parameters (" + std::to_string(items.size()) + ")",
               static_cast<int64_t>(grads.size()));
    }
    std::vector<void*> written;
    for (size_t i = 0; i < items.size(); ++i) {
        written.push_back(pointer<void>("grad", grads[i], items[i].size));
    }
    l2_sp_backward(items, written, scale, thread_count(threads));
}

// average address (float32), source address (bfloat16), size
using FollowedTuple = std::tuple<Address, Address, int64_t>;

void lerp_from_bf16_(const std::vector<FollowedTuple>& tuples, float weight, int threads) {
    std::vector<Followed> list;
    for (const auto& [average, source, size] : tuples) {
        require_size("size", size, 0);
        list.push_back(
            {pointer<float>("average", average, size), pointer<const void>("source", source, size), size});
    }
    lerp_from_bf16(list, weight, thread_count(threads));
}

}  // namespace

void bind_parameters(py::module_& m) {
    m.def("l2_sp_forward", &l2_sp_forward_, release());
    m.def("l2_sp_backward", &l2_sp_backward_, release());
    m.def("lerp_from_bf16", &lerp_from_bf16_, release());
}

}  // namespace mooring::bindings
