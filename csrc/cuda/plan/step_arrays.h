// The large arrays of a step.
#pragma once

#include "dykaf/types.h"

namespace dykaf::cuda {

// How many elements the workspace of a step has for a matrix with factors.
struct StepArrays {
  int64_t H;                // [m, n], the gradient over tau
  int64_t scratch;          // [m, n]
  int64_t update;           // [m, n]
  int64_t left_increment;   // [m, m]; 0 without L
  int64_t right_increment;  // [n, n]; 0 without R

  explicit StepArrays(const Problem<float>& p)
      : H(p.size()),
        scratch(p.size()),
        update(p.size()),
        left_increment(p.L != nullptr ? p.m * p.m : 0),
        right_increment(p.R != nullptr ? p.n * p.n : 0) {}

  int64_t total() const { return H + scratch + update + left_increment + right_increment; }
};

}  // namespace dykaf::cuda
