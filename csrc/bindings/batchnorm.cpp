// Statistics of BatchNorm layers.
#include "cpu/batchnorm_statistics.h"

#include "bindings/arguments.h"

namespace mooring::bindings {

namespace {

// running mean, running variance, weight or 0, bias or 0, eps
using LayerTuple = std::tuple<Address, Address, Address, Address, double>;

BatchnormLayer layer_of(const LayerTuple& layer, int64_t C) {
    const auto& [running_mean, running_var, weight, bias, eps] = layer;
    return {pointer<const float>("running_mean", running_mean, C),
            pointer<const float>("running_var", running_var, C),
            reinterpret_cast<const float*>(weight),
            reinterpret_cast<const float*>(bias),
            eps,
            C};
}

void batchnorm_statistics_planes_(Address x, int dtype, const LayerTuple& layer, Address y, Address mean,
                                  Address var, int64_t B, int64_t C, int64_t P, int threads) {
    require_size("B", B, 1);
    require_size("C", C, 1);
    require_size("P", P, 1);
    batchnorm_statistics_planes(pointer<const void>("x", x, product_of(B, C, P)), dtype_of(dtype),
                                layer_of(layer, C), pointer<void>("y", y, product_of(B, C, P)),
                                pointer<float>("mean", mean, C), pointer<float>("var", var, C), B, P,
                                thread_count(threads));
}

void batchnorm_statistics_rows_(Address x, int dtype, const LayerTuple& layer, Address y, Address mean,
                                Address var, int64_t R, int64_t C, int threads) {
    require_size("R", R, 1);
    require_size("C", C, 1);
    batchnorm_statistics_rows(pointer<const void>("x", x, product_of(R, C)), dtype_of(dtype),
                              layer_of(layer, C), pointer<void>("y", y, product_of(R, C)),
                              pointer<float>("mean", mean, C), pointer<float>("var", var, C), R,
                              thread_count(threads));
}

}  // namespace

void bind_batchnorm(py::module_& m) {
    m.def("batchnorm_statistics_planes", &batchnorm_statistics_planes_, release());
    m.def("batchnorm_statistics_rows", &batchnorm_statistics_rows_, release());
}

}  // namespace mooring::bindings
