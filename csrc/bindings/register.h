// One function per family of bindings.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace dykaf::bindings {

void register_ops(py::module_& module);
void register_step(py::module_& module);

#if defined(DYKAF_SIMT)
// tests/simt/faulty_allocator.cpp
void register_faults(py::module_& module);
#endif

}  // namespace dykaf::bindings
