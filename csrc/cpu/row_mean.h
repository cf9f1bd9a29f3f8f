#pragma once

#include "cpu/row_pointer.h"

namespace mooring {

// mean = sum over the rows whose label is a class / max(their number, 1); inverse_count = 1 / that number.
// One thread, in order: the result depends on nothing but the rows.
inline void mean_of_valid_rows(const float* rows, const int64_t* labels, int64_t N, int64_t C, float* mean,
                               float* inverse_count) {
    double total = 0.0;
    int64_t count = 0;
    for (int64_t i = 0; i < N; ++i) {
        if (!is_class(labels[i], C)) continue;
        total += rows[i];
        ++count;
    }
    const double inverse = 1.0 / static_cast<double>(count > 0 ? count : 1);
    *mean = static_cast<float>(total * inverse);
    *inverse_count = static_cast<float>(inverse);
}

}  // namespace mooring
