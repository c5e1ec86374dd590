// The module dykaf._C.
#include <map>
#include <string>

#include "bindings/register.h"

namespace {

// What the build baked in; dykaf checks "torch" against the running one.
std::map<std::string, std::string> build_info() {
  return {{"version", DYKAF_VERSION},
          {"torch", DYKAF_TORCH_VERSION},
          {"cuda", DYKAF_CUDA_VERSION},
          {"cuda_archs", DYKAF_CUDA_ARCHS},
          {"compiler", DYKAF_COMPILER}};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The operations of dykaf; dykaf.ops documents them.";
  module.def("build_info", &build_info);
  dykaf::bindings::register_ops(module);
  dykaf::bindings::register_step(module);
#if defined(DYKAF_SIMT)
  dykaf::bindings::register_faults(module);
#endif
}
