// Checks that every binding shares: what can be checked on numbers alone is checked here, once more.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/row_kernels.h"

namespace mooring::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;
using release = py::call_guard<py::gil_scoped_release>;

[[noreturn]] inline void refuse(const std::string& expected, int64_t got) {
    throw std::invalid_argument(expected + "; got " + std::to_string(got));
}

inline DType dtype_of(int code) {
    if (code != 0 && code != 1) refuse("dtype code must be 0 (float32) or 1 (bfloat16)", code);
    return static_cast<DType>(code);
}

inline void require_size(const char* name, int64_t size, int64_t least) {
    if (size < least) refuse(std::string(name) + " must be >= " + std::to_string(least), size);
}

inline int thread_count(int threads) {
    if (threads < 1) refuse("threads must be >= 1", threads);
    return threads;
}

template <typename T>
T* pointer(const char* name, Address address, int64_t elements) {
    if (address == 0 && elements > 0) {
        throw std::invalid_argument(std::string(name) + " must point to " + std::to_string(elements) +
                                    " elements; got a null address");
    }
    return reinterpret_cast<T*>(address);
}

// One function per file of bindings; module.cpp calls them all.
void bind_bank(py::module_& m);
void bind_concept(py::module_& m);
void bind_batchnorm(py::module_& m);
void bind_losses(py::module_& m);
void bind_queue(py::module_& m);
void bind_row_losses(py::module_& m);
void bind_parameters(py::module_& m);
void bind_patch_match(py::module_& m);

}  // namespace mooring::bindings
