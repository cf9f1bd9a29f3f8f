// Concept-Tuning's crop search.
#include <array>

#include "bindings/arguments.h"
#include "cpu/concept_boxes.h"

namespace mooring::bindings {

namespace {

// strides: image, channel, position, in elements; sizes: B, D, rows, columns, C
// rule: patches, group width, rank stride, rivals, negatives, image height, image width, patch side
void concept_boxes_(Address map, int dtype, const std::array<int64_t, 3>& strides, Address logits,
                    Address labels, Address head_weight, const std::array<int64_t, 5>& sizes,
                    const std::array<int64_t, 8>& rule, bool centred, Address boxes, Address negative_classes,
                    int threads) {
    const auto [B, D, rows, columns, C] = sizes;
    const auto [patches, group_width, rank_stride, rivals, negatives, height, width, side] = rule;
    require_size("B", B, 0);
    require_size("D", D, 1);
    require_size("rows of the map", rows, 1);
    require_size("columns of the map", columns, 1);
    require_size("C", C, 1);
    require_size("patches", patches, 1);
    require_size("group_width", group_width, 1);
    require_size("rank_stride", rank_stride, 0);
    const int64_t ranks = product_of(patches - 1, rank_stride) + group_width;
    if (ranks > D) refuse("ranks must end within D = " + std::to_string(D), ranks);
    require_size("image height", height, 1);
    require_size("image width", width, 1);
    require_size("patch side", side, 1);
    // the map may be a part of a larger tensor: how far its rows lie apart is the caller's to know
    for (const int64_t stride : strides) require_size("stride", stride, 0);
    product_of(B, strides[0]);
    product_of(D, strides[1]);
    product_of(product_of(rows, columns), strides[2]);
    require_size("rivals", rivals, 0);
    require_size("negatives", negatives, 0);
    if (rivals >= C || negatives >= C) refuse("rivals and negatives must be < C", C);
    concept_boxes({pointer<const void>("feature_map", map, product_of(B, D, rows, columns)), dtype_of(dtype),
                   strides[0], strides[1], strides[2], D, rows, columns},
                  pointer<const float>("logits", logits, product_of(B, C)),
                  pointer<const int64_t>("labels", labels, B),
                  pointer<const float>("head_weight", head_weight, product_of(C, D)),
                  {C, patches, group_width, rank_stride, rivals, negatives, height, width, side, centred},
                  pointer<float>("boxes", boxes, product_of(B, patches, 4)),
                  pointer<int64_t>("negative_classes", negative_classes, product_of(B, negatives)), B,
                  thread_count(threads));
}

}  // namespace

void bind_concept(py::module_& m) {
    m.def("concept_boxes", &concept_boxes_, release());
}

}  // namespace mooring::bindings
