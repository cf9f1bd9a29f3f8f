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

// More elements than any address space holds, and few enough that sums and products of them do not overflow.
constexpr int64_t kMostElements = int64_t{1} << 46;
constexpr int kMostThreads = 4096;

inline void require_size(const char* name, int64_t size, int64_t least) {
    if (size < least) refuse(std::string(name) + " must be >= " + std::to_string(least), size);
    if (size > kMostElements) {
        refuse(std::string(name) + " must be <= " + std::to_string(kMostElements), size);
    }
}

// Product of sizes.
template <typename... Sizes>
int64_t product_of(Sizes... sizes) {
    int64_t product = 1;
    bool fits = true;
    ((fits = fits && !__builtin_mul_overflow(product, static_cast<int64_t>(sizes), &product)), ...);
    if (!fits || product > kMostElements) {
        refuse("sizes must multiply to at most " + std::to_string(kMostElements), fits ? product : -1);
    }
    return product;
}

inline int thread_count(int threads) {
    if (threads < 1) refuse("threads must be >= 1", threads);
    if (threads > kMostThreads) refuse("threads must be <= " + std::to_string(kMostThreads), threads);
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
