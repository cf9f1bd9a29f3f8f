#pragma once

#include <cstdint>

#include "cpu/row_kernels.h"

namespace mooring {

// Feature map [B, D, N]: positions n = row * columns + column, element strides given.
struct FeatureMap {
    const void* data;
    DType dtype;
    int64_t stride_image, stride_channel, stride_position;
    int64_t D, rows, columns;
};

struct ConceptRule {
    int64_t C, patches, group_width, rank_stride, rivals, negatives;
    int64_t image_height, image_width, patch_side;
    bool centred;  // the box's centre is the middle of the cell, and it is shifted inside the image
};

// boxes [B, patches, 4] (x1, y1, x2, y2 in pixels), negative_classes [B, negatives]. A masked row gets the
// patch in the middle of the image and the class -1.
void concept_boxes(const FeatureMap& map, const float* logits, const int64_t* labels,
                   const float* head_weight, const ConceptRule& rule, float* boxes, int64_t* negative_classes,
                   int64_t B, int threads);

}  // namespace mooring
