// One function per family of bindings.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace dykaf::bindings {

void register_ops(py::module_& module);
void register_step(py::module_& module);

}  // namespace dykaf::bindings
