// The first gradient of matrices, side by side.
#include <exception>
#include <vector>

#include "aten/ops.h"
#include "cpu/each_matrix.h"
#include "cpu/matrix.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {

template <typename T>
void reset_(const Problem<T>& p) {
  aten::reset_(aten::Matrix(p));
}

template <typename T>
void initialize_(std::span<const Problem<T>> problems, const Options& options) {
  std::vector<std::exception_ptr> failures(problems.size());
  for_each_matrix(problems, [&](size_t i) {
    if (problems[i].grad_max == 0) return;
    try {
      aten::initialize_(aten::Matrix(problems[i]), {.options = options});
    } catch (...) {
      failures[i] = std::current_exception();
    }
  });
  for (const std::exception_ptr& failure : failures) {
    if (!failure) continue;
    for (const Problem<T>& p : problems) reset_(p);
    std::rethrow_exception(failure);
  }
}

template void reset_(const Problem<float>&);
template void reset_(const Problem<double>&);
template void initialize_(std::span<const Problem<float>>, const Options&);
template void initialize_(std::span<const Problem<double>>, const Options&);

}  // namespace dykaf::cpu
