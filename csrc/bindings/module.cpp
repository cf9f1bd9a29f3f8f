// mooring_kernels._C: the CPU ops on raw addresses. No torch header is included, so one build serves
// every torch version; the callers in mooring_kernels check dtype, layout and shape before they take an
// address.
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/capability.h"

namespace {

std::vector<std::string> cpu_capabilities() {
    std::vector<std::string> names;
    for (mooring::Capability capability : mooring::available_capabilities()) {
        names.emplace_back(mooring::name_of(capability));
    }
    return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of mooring_kernels on raw addresses.";
    m.def("cpu_capability", [] { return std::string(mooring::name_of(mooring::active_capability())); });
    m.def("cpu_capabilities", &cpu_capabilities);
    m.def("set_cpu_capability", &mooring::set_capability, pybind11::arg("name"));
    mooring::bindings::bind_bank(m);
    mooring::bindings::bind_concept(m);
    mooring::bindings::bind_batchnorm(m);
    mooring::bindings::bind_losses(m);
    mooring::bindings::bind_queue(m);
    mooring::bindings::bind_row_losses(m);
    mooring::bindings::bind_parameters(m);
    mooring::bindings::bind_patch_match(m);
}
