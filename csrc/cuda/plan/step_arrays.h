// The large arrays of a step.
#pragma once

#include <algorithm>

#include "dykaf/types.h"

namespace dykaf::cuda {

// Whether the step makes the matrix's update orthogonal.
inline bool orthogonalizes(const Problem<float>& p, const Options& options) {
  return options.orthogonalize > 0 && !p.is_adamw() && !p.is_skinny();
}

// Whether the step of the matrix is one pass over its elements.
inline bool is_element_wise(const Problem<float>& p, const Options& options) {
  return p.is_unsided() && p.exp_avg_sq_row == nullptr && !orthogonalizes(p, options);
}

// How many elements the workspace of a step has for a matrix.
struct StepArrays {
  int64_t H;                // [m, n], the gradient over tau; 0 where Adam takes it as it is
  int64_t scratch;          // [m, n]; 0 without a multiplication
  int64_t update;           // [m, n]
  int64_t left_increment;   // [m, m]; 0 without L. Before, a Newton-Schulz step has both
  int64_t right_increment;  // [n, n]; 0 without R. increments for its [s, s], s the short side

  StepArrays(const Problem<float>& p, const Options& options)
      : H(p.is_unsided() && p.exp_avg_sq_row == nullptr ? 0 : p.size()),
        scratch(p.is_unsided() && !orthogonalizes(p, options) ? 0 : p.size()),
        update(is_element_wise(p, options) ? 0 : p.size()),
        left_increment(p.L != nullptr ? p.m * p.m : 0),
        right_increment(p.R != nullptr ? p.n * p.n : 0) {
    if (!orthogonalizes(p, options)) return;
    const int64_t square = p.short_side() * p.short_side();
    left_increment = std::max(left_increment, square);
    right_increment = std::max(right_increment, square);
  }

  int64_t total() const { return H + scratch + update + left_increment + right_increment; }
};

}  // namespace dykaf::cuda
