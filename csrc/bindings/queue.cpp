// Class queues: writing into them, the contrastive loss against them.
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/queue_info_nce.h"

namespace mooring::bindings {

namespace {

using Queries = std::tuple<Address, Address, Address>;           // query, own (0: none), labels
using Queue = std::tuple<Address, int, Address>;                 // rows, their dtype, labels
using Results = std::tuple<Address, Address, Address, Address>;  // as QueueLosses; 0: not wanted
using Shape = std::tuple<int64_t, int64_t, int64_t>;             // B, N, D; C, K, B of a ring

int64_t workspace_(int64_t B, int64_t N, int64_t D, bool grad_query, int threads) {
    require_size("B", B, 0);
    require_size("N", N, 0);
    require_size("D", D, 1);
    product_of(B, N);
    product_of(B, D);
    product_of(N, D);
    return queue_info_nce_workspace(B, N, D, grad_query, thread_count(threads));
}

void queue_info_nce_(const Queries& queries, const Queue& queue, const Shape& shape,
                     float inverse_temperature, const Results& results, Address workspace, int threads) {
    const auto [B, N, D] = shape;
    const int64_t needed = workspace_(B, N, D, std::get<2>(results) != 0, threads);
    const QueueRows rows = {
        pointer<const float>("query", std::get<0>(queries), product_of(B, D)),
        reinterpret_cast<const float*>(std::get<1>(queries)),
        pointer<const int64_t>("labels", std::get<2>(queries), B),
        {pointer<const void>("queue", std::get<0>(queue), product_of(N, D)), dtype_of(std::get<1>(queue))},
        pointer<const int64_t>("queue_labels", std::get<2>(queue), N),
        B,
        N,
        D,
        inverse_temperature};
    const QueueLosses out = {
        pointer<float>("loss", std::get<0>(results), B), pointer<float>("positives", std::get<1>(results), B),
        reinterpret_cast<float*>(std::get<2>(results)), reinterpret_cast<float*>(std::get<3>(results))};
    queue_info_nce(rows, out, pointer<float>("workspace", workspace, needed), thread_count(threads));
}

// bank address, bank dtype, rows address, rows dtype, P, D
using FieldTuple = std::tuple<Address, int, Address, int, int64_t, int64_t>;
using Integers = std::tuple<Address, Address, Address, Address>;  // bank labels, heads, labels, slots

void class_ring_push_(const std::vector<FieldTuple>& fields, const Integers& integers, const Shape& shape,
                      bool normalise, int threads) {
    const auto [C, K, B] = shape;
    require_size("C", C, 1);
    require_size("K", K, 1);
    require_size("B", B, 0);
    std::vector<ClassRingField> rings;
    for (const auto& [bank, bank_dtype, rows, rows_dtype, P, D] : fields) {
        require_size("P", P, 1);
        require_size("D", D, 1);
        rings.push_back({pointer<void>("bank field", bank, product_of(C, K, P, D)),
                         dtype_of(bank_dtype),
                         {pointer<const void>("field", rows, product_of(B, P, D)), dtype_of(rows_dtype)},
                         P,
                         D});
    }
    class_ring_push(rings, pointer<int64_t>("bank_labels", std::get<0>(integers), product_of(C, K)),
                    pointer<int64_t>("heads", std::get<1>(integers), C),
                    pointer<const int64_t>("labels", std::get<2>(integers), B),
                    pointer<int64_t>("slots", std::get<3>(integers), B), C, K, B, normalise,
                    thread_count(threads));
}

}  // namespace

void bind_queue(py::module_& m) {
    m.def("class_ring_push", &class_ring_push_, release());
    m.def("queue_info_nce_workspace", &workspace_);
    m.def("queue_info_nce", &queue_info_nce_, release());
}

}  // namespace mooring::bindings
