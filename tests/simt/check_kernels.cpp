// Runs the project's kernels under the executor against double-precision references.
//   check_kernels [num_seeds] [--only PREFIX]... [--stop]
// The exit code says whether a check failed; with --stop the first one that does ends the program.
#include <cstring>

#include "kernel_check.h"

namespace kernel_check {
void check_gemms();
void check_epilogues();
void check_hardware();
void check_grad_max();
void check_ops();
void check_factors();
void check_steps();
void check_skinny();
void check_plans();
void check_library();
}  // namespace kernel_check

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
      kernel_check::g_only.push_back(argv[++i]);
    } else if (std::strcmp(argv[i], "--stop") == 0) {
      kernel_check::g_stops = true;
    } else {
      kernel_check::g_num_seeds = std::atoi(argv[i]);
    }
  }
  kernel_check::check_gemms();
  kernel_check::check_epilogues();
  kernel_check::check_hardware();
  kernel_check::check_grad_max();
  kernel_check::check_ops();
  kernel_check::check_factors();
  kernel_check::check_steps();
  kernel_check::check_skinny();
  kernel_check::check_plans();
  kernel_check::check_library();
  if (kernel_check::g_num_checks == 0) check("a check was selected", false);
  return g_num_failed == 0 ? 0 : 1;
}
